"""Node pools: the requests.

A pool is a part of its cluster's record. Its machines are a number: those that really join are the user's
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from localcloud.api.compute.catalog import ZONES, region_of, zones
from localcloud.api.compute.common import link
from localcloud.api.compute.ranges import secondary
from localcloud.api.container.common import (
    CLUSTER,
    LINK,
    NAME,
    changeable,
    check_version,
    find_cluster,
    gke_version,
    spellings,
    stamped,
)
from localcloud.api.container.operations import begin
from localcloud.api.errors import ApiError
from localcloud.api.masks import merged
from localcloud.api.service import TABLE, Call, Services
from localcloud.store import Json, Record, Store

DEFAULT_POOL = "default-pool"
_LARGEST = 1000
"""Nodes of a pool in one zone: Google's limit."""

_CONFIG_DEFAULTS: Json = {
    "machineType": "e2-medium",
    "diskSizeGb": 100,
    "diskType": "pd-balanced",
    "imageType": "COS_CONTAINERD",
    "serviceAccount": "default",
}
_IN_POOL = {
    "nodeDrainConfig": "nodeDrainConfig",
    "queuedProvisioning": "queuedProvisioning",
    "upgradeSettings": "upgradeSettings",
    "maintenancePolicy": "maintenancePolicy",
    "locations": "locations",
}
"""What an update says beside the nodes' configuration: its field, and the pool's."""
_WRAPPED = {"labels": "labels", "taints": "taints", "tags": "tags", "resourceLabels": "labels"}
"""Fields of an update that are a message around a list or a map: an empty one is not the same as none."""
_ADDRESSED = {"name", "projectId", "zone", "clusterId", "nodePoolId", "etag"}


def described(call: Call, pool: Json, cluster: Json, key: str) -> Json:
    """A new pool as Google shows it; `key` is its cluster's.

    Raises:
        ApiError: 400, Google would refuse it.
    """
    name = pool.get("name", "")
    if not NAME.fullmatch(name):
        raise _invalid("name", name, f"Must be a match of regex '(?:{NAME.pattern})'.")
    _check_size(pool.get("initialNodeCount", 0), "initial_node_count")
    _check_autoscaling(pool.get("autoscaling", {}))
    check_version(call, pool.get("version", ""), "Node")
    places = pool.get("locations") or cluster["locations"]
    _check_places(places, cluster)
    version = gke_version(call.services.backends.cluster_version())
    body = pool | {
        "config": _CONFIG_DEFAULTS | pool.get("config", {}),
        "initialNodeCount": pool.get("initialNodeCount", 0),
        "selfLink": f"{LINK}{_zonal(key)}/nodePools/{name}",
        "version": version,
        "status": "RUNNING",
        "locations": places,
        "management": pool.get("management", {"autoUpgrade": True, "autoRepair": True}),
        "maxPodsConstraint": pool.get("maxPodsConstraint", {"maxPodsPerNode": "110"}),
        "upgradeSettings": pool.get("upgradeSettings", {"maxSurge": 1, "strategy": "SURGE"}),
        "networkConfig": _network(call, pool.get("networkConfig", {}), cluster),
        "podIpv4CidrSize": 24,
    }
    return _restated(body, key)


def count(cluster: Json) -> None:
    """Bring what a cluster says of its nodes, in its older fields too, to what its pools say."""
    pools: list[Json] = cluster["nodePools"]
    total = sum(pool["initialNodeCount"] * len(pool["locations"]) for pool in pools)
    cluster.pop("currentNodeCount", None)
    if total:
        cluster["currentNodeCount"] = total
    for pool in pools:
        # The one that came of this field. Without it the field stays as it was asked for.
        if pool["name"] == DEFAULT_POOL:
            cluster["initialNodeCount"] = pool["initialNodeCount"]
    if pools:
        cluster.setdefault("initialNodeCount", pools[0]["initialNodeCount"])
        cluster["nodeConfig"] = pools[0]["config"]


def groups(store: Store, project: str) -> list[Json]:
    """The managed instance groups of all pools: name, zone and size, by zone and name."""
    found = [
        {"name": _group(record.key, pool["name"]), "zone": zone, "size": pool["initialNodeCount"]}
        for record in store.list(CLUSTER, f"projects/{project}/")
        for pool in record.body["nodePools"]
        for zone in pool["locations"]
    ]
    return sorted(found, key=lambda group: (group["zone"], group["name"]))


def _network(call: Call, given: Json, cluster: Json) -> Json:
    """A pool's network: its pods are in the cluster's range, if it names no other one of the subnetwork.

    Raises:
        ApiError: 400, there is no such range.
    """
    subnetwork = call.store.get(cluster["networkConfig"]["subnetwork"])
    there = secondary(subnetwork.body) if subnetwork is not None else {}
    name = given.get("podRange") or cluster["ipAllocationPolicy"].get("clusterSecondaryRangeName", "")
    if name and name not in there:
        raise _invalid("network_config.pod_range", name, "The subnetwork has no such range.")
    cidr = there.get(name, cluster["clusterIpv4Cidr"])
    return (
        {"enablePrivateNodes": False}
        | given
        | {"podIpv4CidrBlock": cidr}
        | ({"podRange": name} if name else {})
    )


def _zonal(key: str) -> str:
    """A cluster's key as links spell it: zonal clusters are below `zones`."""
    parts = key.split("/")
    return key.replace("/locations/", "/zones/", 1) if parts[3] in zones() else key


def _group(key: str, pool: str) -> str:
    cluster = key.rpartition("/")[2]
    mark = hashlib.sha256(f"{key}/{pool}".encode()).hexdigest()[:8]
    return f"gke-{cluster[:18].rstrip('-')}-{pool[:18].rstrip('-')}-{mark}-grp"


def _restated(pool: Json, key: str) -> Json:
    """A pool with what follows from the rest of it: its groups and its etag."""
    project = key.split("/")[1]
    pool["instanceGroupUrls"] = [
        link(f"projects/{project}/zones/{zone}/instanceGroupManagers/{_group(key, pool['name'])}")
        for zone in pool["locations"]
    ]
    return stamped(pool)


def _invalid(field: str, value: object, why: str) -> ApiError:
    return ApiError(400, f'Invalid value for field "node_pool.{field}": "{value}". {why}')


def _check_size(size: int, field: str) -> None:
    if not 0 <= size <= _LARGEST:
        raise _invalid(field, size, f"Must be between 0 and {_LARGEST}.")


def _check_autoscaling(autoscaling: Json) -> None:
    for least, most in (("minNodeCount", "maxNodeCount"), ("totalMinNodeCount", "totalMaxNodeCount")):
        low, high = autoscaling.get(least, 0), autoscaling.get(most, 0)
        if autoscaling.get("enabled") and (low < 0 or (most in autoscaling and high < max(low, 1))):
            raise _invalid(f"autoscaling.{most}", high, f"{most} must be at least 1 and at least {least}.")


def _check_places(places: list[str], cluster: Json) -> None:
    location = cluster["location"]
    region = region_of(location) if location in zones() else location
    for place in places:
        if place not in [f"{region}-{letter}" for letter in ZONES[region]]:
            raise _invalid("locations", place, f"It is no zone of the region {region}.")


def _pool(call: Call, record: Record, name: str = "") -> Json:
    name = name or call.path["nodePool"]
    for pool in record.body["nodePools"]:
        if pool["name"] == name:
            found: Json = pool
            return found
    raise ApiError(404, f"Not found: {record.key}/nodePools/{name}.")


@TABLE.serves(*spellings("clusters.nodePools.list"))
def _list(call: Call) -> Json:
    pools = find_cluster(call).body["nodePools"]
    return {"nodePools": pools} if pools else {}


@TABLE.serves(*spellings("clusters.nodePools.get"))
def _get(call: Call) -> Json:
    return _pool(call, find_cluster(call))


@TABLE.serves(*spellings("clusters.nodePools.create"))
def _create(call: Call) -> Json:
    record = changeable(call)
    if record.body.get("autopilot", {}).get("enabled"):
        raise ApiError(400, "Autopilot clusters do not support mutating node pools.")
    pool = described(call, call.body.get("nodePool", {}), record.body, record.key)
    if any(other["name"] == pool["name"] for other in record.body["nodePools"]):
        raise ApiError(409, f"Already exists: {record.key}/nodePools/{pool['name']}.")
    record.body["nodePools"].append(pool)
    return _work(call, record, pool, "CREATE_NODE_POOL", "PROVISIONING")


@TABLE.serves(*spellings("clusters.nodePools.delete"))
def _delete(call: Call) -> Json:
    record = changeable(call)
    return _work(call, record, _pool(call, record), "DELETE_NODE_POOL", "STOPPING")


@TABLE.serves(*spellings("clusters.nodePools.setSize"))
def _set_size(call: Call) -> Json:
    size = call.body.get("nodeCount", 0)
    _check_size(size, "node_count")
    return _change(call, "SET_NODE_POOL_SIZE", lambda pool: pool.update(initialNodeCount=size))


@TABLE.serves(
    "container.projects.locations.clusters.nodePools.setAutoscaling",
    "container.projects.zones.clusters.nodePools.autoscaling",
)
def _set_autoscaling(call: Call) -> Json:
    autoscaling = call.body.get("autoscaling", {})
    _check_autoscaling(autoscaling)
    return _change(call, "UPDATE_CLUSTER", lambda pool: pool.update(autoscaling=autoscaling))


@TABLE.serves(*spellings("clusters.nodePools.setManagement"))
def _set_management(call: Call) -> Json:
    management = call.body.get("management", {})
    return _change(call, "SET_NODE_POOL_MANAGEMENT", lambda pool: pool.update(management=management))


@TABLE.serves(*spellings("clusters.nodePools.rollback"))
def _rollback(call: Call) -> Json:
    """No upgrade ever fails here, and then Google too has nothing to roll back."""
    return _change(call, "UPGRADE_NODES", lambda _pool: None)


@TABLE.serves("container.projects.locations.clusters.nodePools.completeUpgrade")
def _complete(call: Call) -> Json:
    _pool(call, find_cluster(call))
    return {}


@TABLE.serves(*spellings("clusters.nodePools.update"))
def _update(call: Call) -> Json:
    record = changeable(call)
    etag = call.body.get("etag")
    if etag is not None and etag != _pool(call, record)["etag"]:
        raise ApiError(409, "The etag does not match the node pool's current etag.", status="ABORTED")
    check_version(call, call.body.get("nodeVersion", ""), "Node")
    if call.body.get("locations"):
        _check_places(call.body["locations"], record.body)
    return _change(call, "UPGRADE_NODES", lambda pool: _apply(call, pool))


def _apply(call: Call, pool: Json) -> None:
    """Apply an update's fields. Every one of them is either the pool's or its nodes'."""
    for field, value in call.body.items():
        if field in _ADDRESSED:
            continue
        if field == "nodeVersion":
            pool["version"] = gke_version(call.services.backends.cluster_version())
        elif field == "nodeNetworkConfig":
            pool["networkConfig"] = merged(pool["networkConfig"], value)
        elif field in _IN_POOL:
            pool[_IN_POOL[field]] = value
        elif field in _WRAPPED:
            pool["config"][field] = value.get(_WRAPPED[field], {})
            if not pool["config"][field]:
                del pool["config"][field]
        else:
            pool["config"][field] = int(value) if field == "diskSizeGb" else value


def set_autoscaling(call: Call, record: Record, name: str, autoscaling: Json) -> None:
    """What the update of a cluster can change of a pool, as the official gcp plugin does it.

    Raises:
        ApiError: 400 or 404, Google would refuse it.
    """
    _check_autoscaling(autoscaling)
    pool = _pool(call, record, name)
    pool["autoscaling"] = autoscaling
    stamped(pool)


def _change(call: Call, kind: str, change: Callable[[Json], None]) -> Json:
    record = changeable(call)
    pool = _pool(call, record)
    change(pool)
    return _work(call, record, pool, kind, "RECONCILING")


def _work(call: Call, record: Record, pool: Json, kind: str, status: str) -> Json:
    """Keep a changed pool, and begin the operation at whose end it is as it should be."""
    pool["status"] = status
    _restated(pool, record.key)
    count(record.body)
    stamped(record.body)
    call.store.put(record)
    return begin(call, kind, record, "container.node_pools.settle", pool["name"])


@TABLE.task("container.node_pools.settle")
def _settle(services: Services, arguments: Json) -> None:
    with services.store.transaction():
        record = services.store.get(arguments["key"])
        if record is None:
            return
        kept = []
        for pool in record.body["nodePools"]:
            if pool["name"] != arguments["pool"]:
                kept.append(pool)
            elif pool["status"] != "STOPPING":
                kept.append(pool | {"status": "RUNNING"})
        record.body["nodePools"] = kept
        count(record.body)
        stamped(record.body)
        services.store.put(record)
