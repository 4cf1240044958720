"""Configuration: defaults are usable, and a wrong value is one line that names key and what is allowed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import pulumi
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from components import config, reader
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
    assert loaded.apps == (
        config.AppConfig("primorial", "wasm_app", 8080, "64Mi", "500m", {}, (), None, None),
    )
    assert loaded.network.sources == ("0.0.0.0/0",)
    assert loaded.signing_key is None


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("awesome-wasm:apps", "[]", "at least one app"),
        ("awesome-wasm:apps", "{}", "a list of apps"),
        ("awesome-wasm:apps", "primorial", "a list of apps"),
        ("awesome-wasm:namespace", "default", "for this app alone"),
        ("awesome-wasm:namespace", "kube-system", "for this app alone"),
        ("awesome-wasm:maxpods", "7", "did you mean maxPods? `pulumi config rm maxpods`"),
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
        ("awesome-wasm:nodes", "0", "from 1 to 20"),
        ("awesome-wasm:nodes", "21", "from 1 to 20"),
        ("awesome-wasm:nodes", "two", "from 1 to 20"),
        ("awesome-wasm:registryName", "eu.gcr.io", "europe"),
        ("awesome-wasm:registryName", "asia-1.gcr.io", "gcr.io, us.gcr.io"),
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


def test_several_nodes_are_alike_but_for_their_names(run: Run, defaults: dict[str, str]) -> None:
    def named(**given: str) -> list[str]:
        settings = {f"awesome-wasm:{key}": value for key, value in given.items()}
        nodes = load(run, {**defaults, **settings}).nodes
        assert {replace(node, name="") for node in nodes} == {replace(nodes[0], name="")}
        return [node.name for node in nodes]

    assert named() == ["krustlet-1"]
    assert named(nodes="3") == ["krustlet-1", "krustlet-2", "krustlet-3"]
    assert named(nodes="2", nodeName="edge") == ["edge", "edge-2"]
    assert named(nodeName="n" * 63) == ["n" * 63]
    with pytest.raises(pulumi.RunError, match=r"configuration nodeName: .* at most 22 characters"):
        named(nodes="2", nodeName="n" * 23)


@pytest.mark.parametrize(("nodes", "prefix"), [(1, 24), (2, 23), (3, 22), (4, 22), (5, 21)])
def test_the_range_for_pods_has_a_part_for_each_node(
    run: Run, defaults: dict[str, str], nodes: int, prefix: int
) -> None:
    given = {"awesome-wasm:nodes": str(nodes), "awesome-wasm:maxPods": "100"}

    def with_range(length: int) -> config.StackConfig:
        return load(run, {**defaults, **given, "awesome-wasm:wasmPodCidr": f"10.70.0.0/{length}"})

    assert {node.pod_range for node in with_range(prefix).nodes} == {"/24"}
    with pytest.raises(pulumi.RunError, match=rf"configuration wasmPodCidr: .* at most {prefix} bits"):
        with_range(prefix + 1)


def apps(
    run: Run, defaults: dict[str, str], given: list[Any], **settings: str
) -> tuple[config.AppConfig, ...]:
    """Load a configuration with these apps."""
    more = {f"awesome-wasm:{key}": value for key, value in settings.items()}
    return load(run, {**defaults, **more, "awesome-wasm:apps": json.dumps(given)}).apps


RANGE = {"wasmPodCidr": "10.70.0.0/16"}
SECOND = {"name": "second", "crate": "wasm_app", "port": 8090}


@pytest.mark.parametrize(
    ("given", "key", "allowed"),
    [
        ({"port": 0}, "port", "from 1 to 65535"),
        ({"port": 65536}, "port", "from 1 to 65535"),
        ({"port": "http"}, "port", "a whole number"),
        ({"port": 80.5}, "port", "a whole number"),
        ({"port": True}, "port", "a whole number"),
        ({"port": [8090]}, "port", "a whole number"),
        ({"port": None}, "port", "a whole number"),
        ({"port": 10250}, "port", "the node agent's own"),
        ({"port": 8080}, "port", "a port of the node's that apps[0] does not have, or replicas"),
        ({"name": "Second"}, "name", "lower-case"),
        ({"name": {}}, "name", "lower-case"),
        ({"name": None}, "name", "lower-case"),
        ({"name": "primorial"}, "name", "a name apart from that of apps[0]"),
        ({"name": "krustlet"}, "name", "the node agent's image"),
        ({"crate": "nowhere"}, "crate", "Cargo.toml"),
        ({"crate": None}, "crate", "Cargo.toml"),
        ({"memoryLimit": "64MB"}, "memoryLimit", "64Mi"),
        ({"cpuLimit": 0}, "cpuLimit", "500m"),
        ({"environment": ["A"]}, "environment", "a map"),
        ({"environment": {"A": {"b": 1}}}, "environment.A", "a plain value"),
        ({"environment": {"A": None}}, "environment.A", "a plain value"),
        ({"environment": {"A=B": "1"}}, "environment", "a variable's name"),
        ({"allowedHosts": "example.com"}, "allowedHosts", "a list"),
        ({"allowedHosts": ["a.example", "http://b.example"]}, "allowedHosts[1]", "host or host:port"),
        ({"allowedHosts": ["a.example:0"]}, "allowedHosts[0]", "host or host:port"),
        ({"allowedHosts": ["a.example:65536"]}, "allowedHosts[0]", "host or host:port"),
        ({"allowedHosts": ["a.example,b.example"]}, "allowedHosts[0]", "host or host:port"),
        ({"allowedHosts": [8080]}, "allowedHosts[0]", "host or host:port"),
        ({"replicas": 0}, "replicas", "from 1 to 10000"),
        ({"replicas": "many"}, "replicas", "a whole number"),
        ({"autoscaling": 3}, "autoscaling", "an object"),
        ({"autoscaling": {}}, "autoscaling.maxReplicas", "a whole number"),
        ({"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}, "autoscaling.maxReplicas", "from 3"),
        ({"autoscaling": {"maxReplicas": 2, "cpu": 101}}, "autoscaling.cpu", "from 1 to 100"),
        ({"autoscaling": {"maxReplicas": 2}, "replicas": 3}, "replicas", "from 1 to 2"),
        ({"autoscaling": {"maxreplicas": 2}}, "autoscaling.maxReplicas", "a whole number"),
        ({"autoscaling": {"maxReplicas": 2, "max": 2}}, "autoscaling.max", "no such key"),
        (
            {"memorylimit": "64Mi"},
            "memorylimit",
            "did you mean memoryLimit? `pulumi config rm --path 'apps[1].",
        ),
        ({"colour": "red"}, "colour", "no such key; `pulumi config rm --path 'apps[1].colour'`"),
    ],
)
def test_a_wrong_field_of_an_app_is_one_line_that_names_the_app_and_the_field(
    run: Run, defaults: dict[str, str], given: dict[str, Any], key: str, allowed: str
) -> None:
    with pytest.raises(pulumi.RunError) as caught:
        apps(run, defaults, [{}, SECOND | given], **RANGE)
    message = str(caught.value)
    assert message.startswith(f"configuration apps[1].{key}: ")
    assert allowed in message
    assert "\n" not in message


# Whatever JSON has, and what is nearly right.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("name", "crate", "port", "memoryLimit", "environment", "allowedHosts", "replicas", "autoscaling")


@given(entry=ANY | st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=3))
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_an_app_is_taken_or_is_one_line(entry: Any) -> None:
    class Source:
        get_object = staticmethod(lambda _: [SECOND, entry])

    keys = reader.Reader(cast(pulumi.Config, Source()))
    network = config.NetworkConfig("10.10.0.0/20", "", "", "10.70.0.0/16", (), True)
    try:
        found = config.read_apps(keys, network)
    except pulumi.RunError as error:
        said = str(error)
    else:
        assert len({app.name for app in found}) == 2
        return
    assert said.startswith("configuration apps[1]")
    assert len(said.splitlines()) == 1


def test_what_an_app_does_not_say_has_its_default(run: Run, defaults: dict[str, str]) -> None:
    [default] = load(run, defaults).apps
    assert apps(run, defaults, [{}]) == (default,)
    # As `pulumi config set --path` writes it where no app is in the stack's file.
    [first] = apps(run, defaults, [{"memoryLimit": "32Mi"}])
    assert first == replace(default, memory_limit="32Mi")
    _, second = apps(run, defaults, [{}, SECOND])
    assert second == replace(default, name="second", port=8090)


def test_an_app_says_what_it_is_told_and_what_it_may_reach(run: Run, defaults: dict[str, str]) -> None:
    told = {"GREETING": "hello", "LEVEL": 3, "VERBOSE": True, "EMPTY": ""}
    hosts = ["api.example.com", "*.example.com:8443", "[::1]:80", "10.0.0.1", "second.wasm.svc"]
    [app] = apps(run, defaults, [{"environment": told, "allowedHosts": hosts}])
    assert app.environment == {"GREETING": "hello", "LEVEL": "3", "VERBOSE": "true", "EMPTY": ""}
    assert app.allowed_hosts == tuple(hosts)


def test_replicas_need_addresses_and_share_a_port(run: Run, defaults: dict[str, str]) -> None:
    many: list[dict[str, Any]] = [{}, SECOND | {"port": 8080, "replicas": 3}]
    _, second = apps(run, defaults, many, **RANGE)
    assert (second.replicas, second.port) == (3, 8080)
    with pytest.raises(reader.ConfigError, match=r"apps\[1\].replicas: 3 was given; .*wasmPodCidr"):
        apps(run, defaults, many)
    scaled = {"autoscaling": {"minReplicas": 2, "maxReplicas": 5}}
    [app] = apps(run, defaults, [scaled], **RANGE)
    assert (app.replicas, app.autoscaling) == (2, config.AutoscalingConfig(2, 5, 80))
    with pytest.raises(reader.ConfigError, match=r"apps\[0\].autoscaling: .*wasmPodCidr"):
        apps(run, defaults, [scaled])


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("appName", "another", "'apps[0].name' another"),
        ("appCrate", "wasm app", "'apps[0].crate' 'wasm app'"),
        ("appPort", "8081", "'apps[0].port' 8081"),
        ("memoryLimit", "32Mi", "'apps[0].memoryLimit' 32Mi"),
        ("cpuLimit", "1", "'apps[0].cpuLimit' 1"),
    ],
)
def test_a_key_of_the_only_app_says_what_to_write_instead(
    run: Run, defaults: dict[str, str], key: str, value: str, instead: str
) -> None:
    with pytest.raises(pulumi.RunError) as caught:
        load(run, {**defaults, f"awesome-wasm:{key}": value})
    assert str(caught.value).startswith(f"configuration {key}: ")
    assert f"`pulumi config set --path {instead}`, then `pulumi config rm {key}`" in str(caught.value)


@pytest.mark.parametrize(
    ("max_pods", "mask"), [("1", "/24"), ("110", "/24"), ("128", "/24"), ("129", "/23"), ("500", "/22")]
)
def test_a_vm_gets_twice_as_many_addresses_as_it_has_pods(
    run: Run, defaults: dict[str, str], max_pods: str, mask: str
) -> None:
    given = {"awesome-wasm:maxPods": max_pods, "awesome-wasm:wasmPodCidr": "10.70.0.0/16"}
    assert load(run, defaults | given).nodes[0].pod_range == mask
    assert load(run, defaults).nodes[0].pod_range == ""


@pytest.mark.parametrize("key", ["credentials", "accessToken", "impersonateServiceAccount"])
def test_credentials_that_would_reach_one_plugin_alone_are_refused_unseen(
    run: Run, defaults: dict[str, str], key: str
) -> None:
    with pytest.raises(reader.ConfigError, match=f"gcp:{key}: .*(APPLICATION_CREDENTIALS|login)") as caught:
        load(run, {**defaults, f"gcp:{key}": "SECRET"})
    assert "SECRET" not in str(caught.value)


def test_a_missing_value_is_named(run: Run, defaults: dict[str, str]) -> None:
    without = {key: value for key, value in defaults.items() if key != "gcp:project"}
    with pytest.raises(reader.ConfigError, match="gcp:project: None was given"):
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
