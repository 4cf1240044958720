"""policy/: each rule, over the spellings that a resource may have."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from google.protobuf import struct_pb2  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from pulumi.runtime.proto import analyzer_pb2, analyzer_pb2_grpc

from scripts.lib import venv
from tests.unit.conftest import REPOSITORY

SECRET = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270"}
DIGEST = "registry.example/app@sha256:" + "0a" * 32


def _load(path: Path) -> Any:
    """The pack's module, which stands in no package: the pack's own directory is what Python runs."""
    spec = importlib.util.spec_from_file_location("policy_rules", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


rules = _load(REPOSITORY / "policy" / "rules.py")


def judged(
    rule: str, type_: str, props: dict[str, Any], stack: str = "local", secrets: Any = ()
) -> list[str]:
    """The violations of one rule."""
    return list(rules.RULES[rule](rules.Resource(type_, props, stack, secrets)))


def pod(**changes: Any) -> dict[str, Any]:
    """A pod that keeps to every rule, with changes of its container."""
    limits = {"resources": {"limits": {"cpu": "1", "memory": "64Mi"}}}
    return {
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": DIGEST, **limits, **changes}]},
    }


def _deployment(of: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {}, "spec": {"replicas": 1, "template": of}}


def _cron(of: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {}, "spec": {"jobTemplate": _deployment(of)}}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"items": [{"metadata": {}}, of]}


HOLDERS = [dict, _deployment, _cron, _list]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("images-by-digest", {"image": "app:latest"}),
    ("images-by-digest", {"image": "app"}),
    ("images-by-digest", {"image": ""}),
    ("images-by-digest", {"image": "app:v1@sha256:0a0a"}),
    ("images-by-digest", {"image": f"{DIGEST} "}),
    ("granted-capabilities", {"securityContext": {"privileged": True}}),
    ("granted-capabilities", {"securityContext": {"allowPrivilegeEscalation": True}}),
    ("granted-capabilities", {"securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}),
    ("limits-set", {"resources": {}}),
    ("limits-set", {"resources": {"limits": {"cpu": "1"}}}),
    ("limits-set", {"resources": {"requests": {"cpu": "1", "memory": "1Mi"}}}),
]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", ["containers", "initContainers", "ephemeralContainers"])
@pytest.mark.parametrize(("rule", "change"), BAD)
def test_a_container_that_breaks_a_rule_is_found_wherever_it_is(
    holder: Any, kind: str, rule: str, change: dict[str, Any]
) -> None:
    bad, good = pod(**change), pod()
    spec = {"containers": good["spec"]["containers"], kind: bad["spec"]["containers"]}
    props = holder({"metadata": {}, "spec": spec})
    assert judged(rule, "kubernetes:apps/v1:Any", props)
    assert not judged(rule, "gcp:compute/network:Network", props)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_pod_as_it_should_be_breaks_no_rule(holder: Any, rule: str) -> None:
    unknown = pod(image=rules.UNKNOWN)
    for good in (pod(), unknown):
        assert judged(rule, "kubernetes:core/v1:Pod", holder(good)) == []


def test_a_container_that_is_only_prepared_needs_no_limits() -> None:
    prepared = pod(resources={})
    prepared["metadata"] = {"annotations": {"krustlet.dev/prepare-only": "true"}}
    assert judged("limits-set", "kubernetes:core/v1:Pod", prepared) == []
    prepared["metadata"] = {"annotations": {"krustlet.dev/prepare-only": "false"}}
    assert judged("limits-set", "kubernetes:core/v1:Pod", prepared)


@pytest.mark.parametrize(
    "spec",
    [
        {"hostNetwork": True},
        {"hostPID": True},
        {"hostIPC": True},
        {"volumes": [{"name": "v", "hostPath": {}}]},
    ],
)
def test_nothing_of_the_node_is_granted(spec: dict[str, Any]) -> None:
    props = pod()
    props["spec"] |= spec
    assert judged("granted-capabilities", "kubernetes:core/v1:Pod", props)


@pytest.mark.parametrize(
    ("hosts", "violations"), [("", 0), ("example.com", 1), ("a.example,*.b.example:80", 1)]
)
def test_hosts_are_granted_by_name(hosts: str, violations: int) -> None:
    props = pod()
    props["metadata"]["annotations"] = {"krustlet.dev/allowed-hosts": hosts}
    assert len(judged("granted-capabilities", "kubernetes:core/v1:Pod", props)) == violations


WORLD = ["0.0.0.0/0", "::/0", "0.0.0.0/1", "128.0.0.0/1", "64.0.0.0/2", "2000::/3", "not a network"]
OWN = ["10.10.0.0/20", "10.0.0.0/8", "192.168.0.0/16", "203.0.113.7/32", "fd00::/48"]
HIT = [["10250"], [10250], ["10000-11000"], ["80", "1-65535"], [], None]
MISS = [["80"], ["10251-65535"], ["1-10249"], ["443", "8080"]]


@given(
    ranges=st.lists(st.sampled_from([*WORLD, *OWN]), min_size=1, max_size=3),
    ports=st.sampled_from([*HIT, *MISS]),
    protocol=st.sampled_from(["tcp", "TCP", "6", "all", "udp", "icmp"]),
    direction=st.sampled_from(["INGRESS", None, "EGRESS"]),
    disabled=st.sampled_from([None, False, True]),
)
@settings(deadline=None)
def test_the_agent_s_port_is_open_to_no_world_however_it_is_written(
    ranges: list[str], ports: Any, protocol: str, direction: str | None, disabled: bool | None
) -> None:
    props = {
        "allows": [{"protocol": "icmp"}, {"protocol": protocol, "ports": ports}],
        "sourceRanges": ranges,
        "direction": direction,
        "disabled": disabled,
    }
    opened = ports in HIT and protocol not in ("udp", "icmp") and direction != "EGRESS" and not disabled
    found = judged("no-agent-port-to-the-world", rules.FIREWALL, props)
    assert bool(found) == (opened and not set(ranges).isdisjoint(WORLD))


def test_a_firewall_without_any_source_is_open_to_everybody() -> None:
    props: dict[str, Any] = {"allows": [{"protocol": "tcp", "ports": ["10250"]}]}
    assert judged("no-agent-port-to-the-world", rules.FIREWALL, props)
    assert not judged("no-agent-port-to-the-world", rules.FIREWALL, {**props, "sourceTags": ["a"]})
    assert not judged("no-agent-port-to-the-world", rules.FIREWALL, {**props, "sourceRanges": rules.UNKNOWN})


@pytest.mark.parametrize(
    "value",
    [
        "-----BEGIN EC PRIVATE KEY-----\nMHc",
        "token: abcdef.0123456789abcdef",
        '{"users":[{"user":{"token":"abcdef.0123456789abcdef"}}]}',
        "client-key-data: LS0tLS1CRUdJTg==",
        "export PASSWORD=correct-horse",
        "ya29.a0AfH6SMB",
        '{"private_key": "x1234567"}',
    ],
)
def test_a_credential_in_metadata_has_to_be_a_secret(value: str) -> None:
    for key in ("anything", "startup-script"):
        props = {"metadata": {key: value}}
        assert judged("no-secret-in-metadata", rules.INSTANCE, props)
        assert not judged("no-secret-in-metadata", rules.INSTANCE, props, secrets={key})
        assert not judged("no-secret-in-metadata", rules.INSTANCE, props | {"metadata": {key: rules.UNKNOWN}})
    assert judged("no-secret-in-metadata", rules.INSTANCE, {"metadataStartupScript": value})


def test_what_the_program_tells_a_vm_in_clear_is_no_credential() -> None:
    metadata = {
        "startup-script": (REPOSITORY / "components" / "startup.sh").read_text(),
        "krustlet-verification-key": "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYI\n-----END",
        "krustlet-image": DIGEST,
        "krustlet-sha256": "0a" * 32,
        "krustlet-node-labels": "krustlet.dev/runtime=wasmtime,krustlet.dev/configuration=bd4ae07478b1",
    }
    for rule in rules.RULES:
        assert judged(rule, rules.INSTANCE, {"metadata": metadata}) == []
    tagged = {"metadata": {**metadata, "krustlet-image": "registry.example/krustlet:1"}}
    assert judged("images-by-digest", rules.INSTANCE, tagged)


@pytest.mark.parametrize("stack", ["prod", "prod-eu", "eu.prod", "production", "Prod2", "organization_prod"])
@pytest.mark.parametrize("value", [False, "false", "False"])
def test_a_stack_of_production_keeps_its_cluster(stack: str, value: object) -> None:
    assert judged("deletion-protection-in-production", rules.CLUSTER, {"deletionProtection": value}, stack)


@pytest.mark.parametrize(
    ("stack", "value"), [("prod", True), ("prod", None), ("dev", False), ("reproduce", False)]
)
def test_any_other_may_lose_it(stack: str, value: object) -> None:
    props = {"deletionProtection": value}
    assert not judged("deletion-protection-in-production", rules.CLUSTER, props, stack)


@pytest.fixture(scope="module")
def pack() -> Iterator[Any]:
    """The pack as the engine runs it."""
    environment = {**os.environ, "PYTHONPATH": str(venv.policies()), "PYTHONWARNINGS": "ignore"}
    command = [str(REPOSITORY / "policy" / "__main__.py"), "127.0.0.1:9"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            with grpc.insecure_channel(f"127.0.0.1:{int(process.stdout.readline())}") as channel:
                yield analyzer_pb2_grpc.AnalyzerStub(channel)
        finally:
            process.kill()


def asked(pack: Any, type_: str, props: dict[str, Any]) -> dict[str, str]:
    """What the engine is told of a resource: the policies that it breaks, and the first message of each."""
    given = struct_pb2.Struct()
    given.update(props)
    what = {"type": type_, "properties": given, "urn": f"urn:pulumi:prod::p::{type_}::n", "name": "n"}
    pack.Remediate(analyzer_pb2.AnalyzeRequest(**what))
    answer = pack.Analyze(analyzer_pb2.AnalyzeRequest(**what))
    levels = {diagnostic.enforcementLevel for diagnostic in answer.diagnostics}
    assert levels <= {analyzer_pb2.MANDATORY}
    return {diagnostic.policyName: diagnostic.message for diagnostic in answer.diagnostics}


def test_the_engine_is_told_what_a_resource_breaks(pack: Any) -> None:
    opened = {"allows": [{"protocol": "tcp", "ports": ["10250"]}], "sourceRanges": ["0.0.0.0/0"]}
    assert "open to 0.0.0.0/0" in asked(pack, rules.FIREWALL, opened)["no-agent-port-to-the-world"]
    found = asked(pack, "kubernetes:core/v1:Pod", pod(image="app:latest", resources={}))
    assert set(found) == {"images-by-digest", "limits-set"}
    assert asked(pack, "kubernetes:core/v1:Pod", pod()) == {}
    assert asked(pack, "kubernetes:core/v1:Pod", pod(image=rules.UNKNOWN)) == {}
    assert set(asked(pack, rules.CLUSTER, {"deletionProtection": False})) == {
        "deletion-protection-in-production"
    }


@pytest.mark.parametrize("value", ["token: abcdef.0123456789abcdef", rules.UNKNOWN])
def test_the_engine_tells_a_secret_of_a_vm_from_what_is_in_clear(pack: Any, value: str) -> None:
    secret = {**SECRET, "value": value}
    clear = asked(pack, rules.INSTANCE, {"metadata": {"note": value, "other": "x"}})
    assert set(clear) == (set() if value == rules.UNKNOWN else {"no-secret-in-metadata"})
    assert asked(pack, rules.INSTANCE, {"metadata": {"note": secret, "other": "x"}}) == {}
    whole = {**SECRET, "value": {"note": value}}
    assert asked(pack, rules.INSTANCE, {"metadata": whole}) == {}
