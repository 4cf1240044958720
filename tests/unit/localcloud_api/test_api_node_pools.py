"""Node pools of Kubernetes Engine: sizes, settings, and what a cluster says of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.localcloud_api.client import CLUSTERS, COMPUTE, Client

CLUSTER = f"{CLUSTERS}/c1"
POOLS = f"{CLUSTER}/nodePools"
Json = dict[str, Any]


@pytest.fixture
def pools(client: Client) -> str:
    """A cluster of one node; gives the path of its node pools."""
    client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "initialNodeCount": 1}}))
    return POOLS


def _counts(client: Client, pool: str = "default-pool") -> tuple[int, int]:
    """The sizes that the cluster and one of its pools show."""
    cluster = client.ok("GET", CLUSTER)
    found = client.ok("GET", f"{POOLS}/{pool}")
    assert found in cluster["nodePools"]
    return cluster.get("currentNodeCount", 0), found.get("initialNodeCount", 0)


def test_pool_is_made_and_counted(client: Client, pools: str) -> None:
    client.backends.gate.clear()
    operation = client.ok(
        "POST", pools, {"nodePool": {"name": "more", "initialNodeCount": 2, "config": {"diskSizeGb": 20}}}
    )
    assert operation["operationType"] == "CREATE_NODE_POOL"
    assert operation["targetLink"].endswith("/zones/europe-west1-b/clusters/c1/nodePools/more")
    client.backends.gate.set()
    client.done(operation)
    pool = client.ok("GET", f"{pools}/more")
    assert (pool["status"], pool["version"]) == ("RUNNING", "1.37.2-gke.1000000")
    assert (pool["config"]["diskSizeGb"], pool["config"]["machineType"]) == (20, "e2-medium")
    assert pool["locations"] == ["europe-west1-b"]
    assert _counts(client, "more") == (3, 2)
    assert [item["name"] for item in client.ok("GET", pools)["nodePools"]] == ["default-pool", "more"]


def test_pool_is_resized_in_place(client: Client, pools: str) -> None:
    before = client.ok("GET", CLUSTER)
    for size in (3, 0, 2):
        operation = client.ok("POST", f"{pools}/default-pool:setSize", {"nodeCount": size})
        assert operation["operationType"] == "SET_NODE_POOL_SIZE"
        client.done(operation)
        assert _counts(client) == (size, size)
    after = client.ok("GET", CLUSTER)
    assert after["initialNodeCount"] == 2
    assert after["etag"] != before["etag"]
    changing = {"etag", "currentNodeCount", "initialNodeCount", "nodePools"}
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    # No control plane was started for it.
    assert client.backends.calls == [("create_cluster", "c1")]


def test_regional_pool_has_its_size_in_every_zone(client: Client) -> None:
    clusters = CLUSTERS.replace("europe-west1-b", "europe-west1")
    client.done(client.ok("POST", clusters, {"cluster": {"name": "r1", "initialNodeCount": 1}}))
    assert client.ok("GET", f"{clusters}/r1")["currentNodeCount"] == 3
    client.done(client.ok("POST", f"{clusters}/r1/nodePools/default-pool:setSize", {"nodeCount": 2}))
    assert client.ok("GET", f"{clusters}/r1")["currentNodeCount"] == 6
    body = {"locations": ["europe-west1-b"]}
    client.done(client.ok("PUT", f"{clusters}/r1/nodePools/default-pool", body))
    assert client.ok("GET", f"{clusters}/r1")["currentNodeCount"] == 2


def test_deleted_pool_is_counted_no_more(client: Client, pools: str) -> None:
    client.done(client.ok("POST", pools, {"nodePool": {"name": "more", "initialNodeCount": 2}}))
    operation = client.ok("DELETE", f"{pools}/default-pool")
    assert operation["operationType"] == "DELETE_NODE_POOL"
    client.done(operation)
    assert _counts(client, "more") == (2, 2)
    client.error(404, "GET", f"{pools}/default-pool")
    client.error(404, "POST", f"{pools}/default-pool:setSize", {"nodeCount": 1})
    assert client.ok("GET", CLUSTER)["initialNodeCount"] == 1


@pytest.mark.parametrize(
    ("code", "pool", "message"),
    [
        (409, {"name": "default-pool"}, "Already exists: projects/localcloud-dev/locations/europe-west1-b/"),
        (400, {"name": "Bad"}, "node_pool.name"),
        (400, {}, "node_pool.name"),
        (400, {"name": "a", "initialNodeCount": -1}, "node_pool.initial_node_count"),
        (400, {"name": "a", "initialNodeCount": 100_000}, "node_pool.initial_node_count"),
        (400, {"name": "a", "version": "1.2"}, "No valid versions"),
        (400, {"name": "a", "locations": ["us-east1-b"]}, "us-east1-b"),
        (400, {"name": "a", "autoscaling": {"enabled": True, "minNodeCount": 3, "maxNodeCount": 2}}, "max"),
    ],
)
def test_pool_that_google_refuses_is_refused(
    client: Client, pools: str, code: int, pool: Json, message: str
) -> None:
    before = client.ok("GET", CLUSTER)
    assert message in client.error(code, "POST", pools, {"nodePool": pool})
    assert client.ok("GET", CLUSTER) == before


@pytest.mark.parametrize("size", [-1, 100_000])
def test_size_that_google_refuses_is_refused(client: Client, pools: str, size: int) -> None:
    client.error(400, "POST", f"{pools}/default-pool:setSize", {"nodeCount": size})
    assert _counts(client) == (1, 1)


def test_a_cluster_whose_pools_are_given_counts_them_all(client: Client) -> None:
    given = [{"name": "a", "initialNodeCount": 2}, {"name": "b", "initialNodeCount": 1}]
    client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "nodePools": given}}))
    assert _counts(client, "a") == (3, 2)


@pytest.mark.parametrize(
    ("request_line", "body", "operation", "shown"),
    [
        (
            *("POST :setAutoscaling", {"autoscaling": {"enabled": True, "maxNodeCount": 3}}),
            *("UPDATE_CLUSTER", {"autoscaling": {"enabled": True, "maxNodeCount": 3}}),
        ),
        (
            *("POST :setManagement", {"management": {"autoRepair": False, "autoUpgrade": True}}),
            *("SET_NODE_POOL_MANAGEMENT", {"management": {"autoRepair": False, "autoUpgrade": True}}),
        ),
        ("PUT ", {"labels": {"labels": {"a": "b"}}}, "UPGRADE_NODES", {"config.labels": {"a": "b"}}),
        ("PUT ", {"taints": {"taints": []}}, "UPGRADE_NODES", {"config.taints": None}),
        ("PUT ", {"tags": {"tags": ["web"]}}, "UPGRADE_NODES", {"config.tags": ["web"]}),
        ("PUT ", {"machineType": "e2-small"}, "UPGRADE_NODES", {"config.machineType": "e2-small"}),
        ("PUT ", {"diskSizeGb": "50"}, "UPGRADE_NODES", {"config.diskSizeGb": 50}),
        ("PUT ", {"upgradeSettings": {"maxSurge": 2}}, "UPGRADE_NODES", {"upgradeSettings.maxSurge": 2}),
        ("PUT ", {"nodeVersion": "-"}, "UPGRADE_NODES", {"version": "1.37.2-gke.1000000"}),
        ("POST :rollback", {}, "UPGRADE_NODES", {"status": "RUNNING"}),
    ],
)
def test_settings_of_a_pool_are_changed_in_place(  # noqa: PLR0917
    client: Client, pools: str, request_line: str, body: Json, operation: str, shown: Json
) -> None:
    verb, path = request_line.split(" ")
    before = client.ok("GET", f"{pools}/default-pool")
    begun = client.ok(verb, f"{pools}/default-pool{path}", body)
    assert begun["operationType"] == operation
    client.done(begun)
    pool = client.ok("GET", f"{pools}/default-pool")
    assert pool["initialNodeCount"] == before["initialNodeCount"]
    for field, value in shown.items():
        found: Any = pool
        for part in field.split("."):
            found = found.get(part)
        assert found == value


def test_pool_is_changed_under_its_older_spelling_too(client: Client, pools: str) -> None:
    zonal = pools.replace("/locations/", "/zones/")
    client.done(client.ok("POST", f"{zonal}/default-pool/setSize", {"nodeCount": 2}))
    client.done(client.ok("POST", f"{zonal}/default-pool/autoscaling", {"autoscaling": {}}))
    assert _counts(client) == (2, 2)
    beta = f"{pools}/default-pool:setSize".replace("/v1/", "/v1beta1/")
    client.done(client.ok("POST", beta, {"nodeCount": 1}))
    assert _counts(client) == (1, 1)


def test_pool_with_an_old_etag_or_an_unknown_version_is_not_changed(client: Client, pools: str) -> None:
    assert "etag" in client.error(409, "PUT", f"{pools}/default-pool", {"etag": "old", "diskSizeGb": "20"})
    client.error(400, "PUT", f"{pools}/default-pool", {"nodeVersion": "1.2"})
    etag = client.ok("GET", f"{pools}/default-pool")["etag"]
    client.done(client.ok("PUT", f"{pools}/default-pool", {"etag": etag, "diskSizeGb": "20"}))
    assert client.ok("GET", f"{pools}/default-pool")["etag"] != etag


def test_cluster_updates_a_pool_by_its_id(client: Client, pools: str) -> None:
    update = {
        "desiredNodePoolId": "default-pool",
        "desiredNodePoolAutoscaling": {"enabled": True, "minNodeCount": 1, "maxNodeCount": 2},
    }
    client.done(client.ok("PUT", CLUSTER, {"update": update}))
    assert client.ok("GET", f"{pools}/default-pool")["autoscaling"]["maxNodeCount"] == 2
    missing = {"desiredNodePoolId": "none", "desiredNodePoolAutoscaling": {}}
    client.error(404, "PUT", CLUSTER, {"update": missing})


def test_pool_of_an_autopilot_cluster_cannot_be_made(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "autopilot": {"enabled": True}}}))
    assert "Autopilot" in client.error(400, "POST", POOLS, {"nodePool": {"name": "a"}})


def test_group_of_a_pool_has_its_size(client: Client, pools: str) -> None:
    """The official gcp plugin reads a pool's size from its managed instance groups."""
    client.done(client.ok("POST", f"{pools}/default-pool:setSize", {"nodeCount": 4}))
    (url,) = client.ok("GET", f"{pools}/default-pool")["instanceGroupUrls"]
    zone, _, name = url.partition("/zones/")[2].partition("/instanceGroupManagers/")
    groups = f"{COMPUTE}/zones/{zone}/instanceGroupManagers"
    group = client.ok("GET", f"{groups}/{name}")
    assert (group["targetSize"], group["name"]) == (4, name)
    assert [item["name"] for item in client.ok("GET", groups)["items"]] == [name]
    client.done(client.ok("DELETE", f"{pools}/default-pool"))
    client.error(404, "GET", f"{groups}/{name}")
