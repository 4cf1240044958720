"""Configuration: defaults are usable, and a wrong value is one line that names key and what is allowed."""

from __future__ import annotations

import pulumi
import pytest
import yaml

from components import config
from components.providers.signature import generate_key
from tests.unit.conftest import REPOSITORY, Run


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def load(run: Run, values: dict[str, str]) -> config.StackConfig:
    """Load a configuration under mocks, outside of which there is none."""
    loaded: list[config.StackConfig] = []

    def program() -> None:
        pulumi.runtime.set_all_config(values)
        loaded.append(config.load())

    run(program)
    return loaded[0]


def test_the_defaults_of_the_local_stack_are_valid(run: Run, defaults: dict[str, str]) -> None:
    loaded = load(run, defaults)
    assert loaded.google == config.GoogleConfig("localcloud-dev", "europe-west1", "europe-west1-b", True)
    assert loaded.app.port == 8080
    assert loaded.network.sources == ("0.0.0.0/0",)
    assert loaded.signing_key is None


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("awesome-wasm:appPort", "0", "from 1 to 65535"),
        ("awesome-wasm:appPort", "65536", "from 1 to 65535"),
        ("awesome-wasm:appPort", "http", "a whole number"),
        ("awesome-wasm:appPort", "10250", "the node agent's own"),
        ("awesome-wasm:appName", "Primorial", "lower-case"),
        ("awesome-wasm:appCrate", "nowhere", "Cargo.toml"),
        ("awesome-wasm:namespace", "default", "for this app alone"),
        ("awesome-wasm:namespace", "kube-system", "for this app alone"),
        ("awesome-wasm:memorylimit", "64Mi", "did you mean memoryLimit? `pulumi config rm memorylimit`"),
        ("awesome-wasm:nodename", "x", "no such key; did you mean nodeName?"),
        ("awesome-wasm:colour", "red", "no such key; `pulumi config rm colour` removes"),
        ("awesome-wasm:nodeName", "n" * 64, "lower-case"),
        ("awesome-wasm:nodeName", "node-", "not ending in a hyphen"),
        ("awesome-wasm:clusterName", "c" * 41, "39"),
        ("awesome-wasm:releaseChannel", "FAST", "RAPID, REGULAR"),
        ("awesome-wasm:sourceRanges", "[]", "at least one"),
        ("awesome-wasm:sourceRanges", '["10.0.0.1/8"]', "CIDR"),
        ("awesome-wasm:sourceRanges", "[10]", "CIDR"),
        ("awesome-wasm:sourceRanges", '["0.0.0.0/0", "::/0"]', "all of IPv4 or all of IPv6"),
        ("awesome-wasm:networkCidr", "8.8.8.0/24", "private"),
        ("awesome-wasm:podCidr", "10.10.0.0/16", "apart from networkCidr"),
        ("awesome-wasm:podCidr", "127.0.0.0/16", "neither loopback"),
        ("awesome-wasm:wasmPodCidr", "10.20.0.0/16", "apart from podCidr"),
        ("awesome-wasm:wasmPodCidr", "10.10.0.0/20", "apart from networkCidr"),
        ("awesome-wasm:wasmPodCidr", "10.70.0.0/21", "at most 20 bits"),
        ("awesome-wasm:wasmPodCidr", "127.64.0.0/16", "neither loopback nor link-local"),
        ("awesome-wasm:wasmPodCidr", "8.8.0.0/16", "private"),
        ("awesome-wasm:wasmPodCidr", "10.70.0.0", "at most 20 bits"),
        ("awesome-wasm:registryName", "eu.gcr.io", "europe"),
        ("awesome-wasm:registryName", "asia-1.gcr.io", "gcr.io, us.gcr.io"),
        ("awesome-wasm:memoryLimit", "64MB", "64Mi"),
        ("awesome-wasm:cpuLimit", "0", "500m"),
        ("awesome-wasm:maxPods", "0", "from 1"),
        ("awesome-wasm:deletionProtection", "perhaps", "true or false"),
        ("awesome-wasm:signingKey", "rubbish", "PEM"),
        (
            "awesome-wasm:signingKey",
            "gcpkms://projects/a-project/locations/global",
            "nothing is where keyRings",
        ),
        ("awesome-wasm:signingKey", "awskms:///alias/key", "gcpkms://projects/P/locations/L/keyRings/R"),
        ("gcp:project", "X", "project"),
        ("gcp:zone", "us-east1-b", "europe-west1"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_value_and_what_is_allowed(
    run: Run, defaults: dict[str, str], key: str, value: str, allowed: str
) -> None:
    with pytest.raises(pulumi.RunError) as caught:
        load(run, {**defaults, key: value})
    message = str(caught.value)
    assert "\n" not in message
    assert allowed in message
    named = key.removeprefix("awesome-wasm:")
    assert f"configuration {named}:" in message or "registryLocation" in message
    if named == "signingKey" and "kms://" not in value:
        assert value not in message


@pytest.mark.parametrize(
    ("max_pods", "mask"), [("1", "/24"), ("110", "/24"), ("128", "/24"), ("129", "/23"), ("500", "/22")]
)
def test_a_vm_gets_twice_as_many_addresses_as_it_has_pods(
    run: Run, defaults: dict[str, str], max_pods: str, mask: str
) -> None:
    given = {"awesome-wasm:maxPods": max_pods, "awesome-wasm:wasmPodCidr": "10.70.0.0/16"}
    assert load(run, defaults | given).node.pod_range == mask
    assert load(run, defaults).node.pod_range == ""


@pytest.mark.parametrize("key", ["credentials", "accessToken", "impersonateServiceAccount"])
def test_credentials_that_would_reach_one_plugin_alone_are_refused_unseen(
    run: Run, defaults: dict[str, str], key: str
) -> None:
    with pytest.raises(config.ConfigError, match=f"gcp:{key}: .*(APPLICATION_CREDENTIALS|login)") as caught:
        load(run, {**defaults, f"gcp:{key}": "SECRET"})
    assert "SECRET" not in str(caught.value)


def test_a_missing_value_is_named(run: Run, defaults: dict[str, str]) -> None:
    without = {key: value for key, value in defaults.items() if key != "gcp:project"}
    with pytest.raises(config.ConfigError, match="gcp:project: None was given"):
        load(run, without)


def test_a_signing_key_is_kept_as_a_secret(run: Run, defaults: dict[str, str]) -> None:
    loaded = load(run, {**defaults, "awesome-wasm:signingKey": generate_key().private_key})
    assert loaded.signing_key is not None


def test_a_key_in_cloud_kms_is_named_in_place_of_a_private_one(run: Run, defaults: dict[str, str]) -> None:
    reference = "gcpkms://projects/a-project/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"
    loaded = load(run, {**defaults, "awesome-wasm:signingKey": reference})
    assert (loaded.kms_key, loaded.signing_key) == (reference, None)
    assert load(run, defaults).kms_key is None


def test_a_gcr_name_is_allowed_where_google_has_it(run: Run, defaults: dict[str, str]) -> None:
    values = {**defaults, "awesome-wasm:registryName": "gcr.io", "awesome-wasm:registryLocation": "us"}
    assert load(run, values).registry == config.RegistryConfig("gcr.io", "us")


def test_every_declared_key_has_type_default_and_description() -> None:
    declared = yaml.safe_load((REPOSITORY / "Pulumi.yaml").read_text())["config"]
    for key, schema in declared.items():
        assert {"type", "default", "description"} <= schema.keys(), key
