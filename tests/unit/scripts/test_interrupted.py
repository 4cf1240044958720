"""What a killed pulumi left unfinished is taken up under the right id."""

from typing import Any

import pytest

from scripts.lib.interrupted import identity, settle, take_up

PLACE = {"project": "p", "zone": "z", "location": "l", "region": "r"}


@pytest.mark.parametrize(
    ("kind", "inputs", "known"),
    [
        ("gcp:compute/instance:Instance", {"name": "vm"}, "projects/p/zones/z/instances/vm"),
        ("gcp:container/cluster:Cluster", {"name": "c"}, "projects/p/locations/l/clusters/c"),
        (
            "gcp:serviceaccount/account:Account",
            {"accountId": "a"},
            "projects/p/serviceAccounts/a@p.iam.gserviceaccount.com",
        ),
        (
            "gcp:container/nodePool:NodePool",
            {"name": "n", "cluster": "projects/q/locations/m/clusters/c"},
            "projects/q/locations/m/clusters/c/nodePools/n",
        ),
        ("kubernetes:core/v1:Pod", {"metadata": {"name": "pod", "namespace": "wasm"}}, "wasm/pod"),
        ("kubernetes:core/v1:Namespace", {"metadata": {"name": "wasm"}}, "wasm"),
        ("pulumi-python:dynamic/oci:Artifact", {"repository": "r"}, None),
    ],
)
def test_a_resource_has_the_id_that_its_provider_gives_it(
    kind: str, inputs: dict[str, Any], known: str | None
) -> None:
    assert identity(kind, {**PLACE, **inputs}) == known


def _operation(kind: str, urn: str, name: str) -> dict[str, Any]:
    namespace = {"urn": urn, "type": "kubernetes:core/v1:Namespace", "inputs": {"metadata": {"name": name}}}
    return {"type": kind, "resource": namespace}


def test_an_interrupted_creation_becomes_a_resource_and_the_rest_is_forgotten() -> None:
    deployment = {
        "resources": [{"urn": "urn:kept"}],
        "pending_operations": [
            _operation("creating", "urn:new", "n"),
            _operation("creating", "urn:kept", "k"),
            _operation("deleting", "urn:gone", "d"),
        ],
    }
    settle(deployment)
    assert [resource["urn"] for resource in deployment["resources"]] == ["urn:kept", "urn:new"]
    assert deployment["resources"][1]["id"] == "n"
    assert "pending_operations" not in deployment


def test_an_interrupted_replacement_leaves_neither_half_behind() -> None:
    deleted = {"urn": "urn:deleted", "id": "web", "pendingReplacement": True}
    old = {"urn": "urn:old", "id": "old-1"}
    deployment: dict[str, Any] = {
        "resources": [deleted, old, {"urn": "urn:dependent"}],
        "pending_operations": [
            _operation("creating", "urn:deleted", "web"),
            _operation("creating", "urn:old", "old-2"),
        ],
    }
    settle(deployment)
    resources = deployment["resources"]
    assert [(r["urn"], r.get("id"), r.get("delete", False)) for r in resources] == [
        ("urn:deleted", "web", False),
        ("urn:old", "old-1", False),
        ("urn:dependent", None, False),
        ("urn:old", "old-2", True),
    ]
    assert "pendingReplacement" not in resources[0]


CLUSTER = "gcp:container/cluster:Cluster"


def _replaced() -> list[dict[str, Any]]:
    """Cluster `a` was replaced by `b`, with what is in it; what is of `a` is still to be deleted."""
    return [
        {"urn": "urn:cluster", "id": "projects/p/locations/l/clusters/b", "type": CLUSTER},
        {"urn": "urn:pool", "id": "b/pool", "dependencies": ["urn:cluster"]},
        {"urn": "urn:provider", "id": "2", "dependencies": ["urn:cluster"]},
        {"urn": "urn:space", "id": "wasm", "provider": "urn:provider::2"},
        {"urn": "urn:other", "id": "new"},
        {"urn": "urn:cluster", "id": "projects/p/locations/l/clusters/a", "type": CLUSTER, "delete": True},
        {"urn": "urn:pool", "id": "a/pool", "dependencies": ["urn:cluster"], "delete": True},
        {"urn": "urn:provider", "id": "1", "dependencies": ["urn:cluster"], "delete": True},
        {"urn": "urn:space", "id": "wasm", "provider": "urn:provider::1", "delete": True},
        {"urn": "urn:other", "id": "old", "delete": True},
        {"urn": "urn:component", "delete": True},
    ]


def _preview(name: str, op: str = "replace") -> list[dict[str, Any]]:
    state = {"type": CLUSTER, "inputs": {**PLACE, "name": name}}
    return [{"op": op, "urn": "urn:cluster", "newState": state}, {"op": "delete", "urn": "urn:gone"}]


@pytest.mark.parametrize("op", ["create", "replace", "create-replacement"])
def test_what_is_to_be_deleted_and_wanted_again_is_taken_up_with_what_is_in_it(op: str) -> None:
    deployment = {"resources": _replaced()}
    taken = take_up(deployment, _preview("a", op))
    assert taken == ["urn:cluster", "urn:pool", "urn:provider", "urn:space"]
    lives = {r["urn"]: r["id"] for r in deployment["resources"] if not r.get("delete")}
    goes = {r["urn"]: r.get("id") for r in deployment["resources"] if r.get("delete")}
    assert lives == {
        "urn:cluster": "projects/p/locations/l/clusters/a",
        "urn:pool": "a/pool",
        "urn:provider": "1",
        "urn:space": "wasm",
        "urn:other": "new",
    }
    assert goes.keys() == {*lives, "urn:component"}
    assert str(goes["urn:cluster"]).endswith("/b")


COMPONENT = [{"op": "create", "urn": "urn:component", "newState": {"type": "awesome-wasm:node:KrustletNode"}}]


@pytest.mark.parametrize(
    "steps", [_preview("c"), _preview("a", "same"), _preview("a", "update"), COMPONENT, []]
)
def test_what_nobody_wants_again_goes_as_it_was_planned(steps: list[dict[str, Any]]) -> None:
    deployment = {"resources": _replaced()}
    assert take_up(deployment, steps) == []
    assert deployment["resources"] == _replaced()


def test_what_vanished_meanwhile_is_taken_up_as_well() -> None:
    old = [resource for resource in _replaced() if resource.get("delete")]
    deployment = {"resources": old}
    assert "urn:cluster" in take_up(deployment, _preview("a", "create"))
    assert [r["urn"] for r in old if r.get("delete")] == ["urn:other", "urn:component"]
