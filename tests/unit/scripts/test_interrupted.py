"""What a killed pulumi left unfinished is taken up under the right id."""

from typing import Any

import pytest

from scripts.lib.interrupted import identity, settle

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
