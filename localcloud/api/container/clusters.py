"""Clusters: the requests. A cluster is a real control plane (see `control_planes.py`)."""

from __future__ import annotations

from localcloud.api.container import node_pools
from localcloud.api.container.common import (
    CLUSTER,
    NAME,
    changeable,
    check_version,
    find_cluster,
    gke_version,
    in_location,
    location_of,
    parent,
    spellings,
    stamped,
)
from localcloud.api.container.description import filled, maintained
from localcloud.api.container.operations import begin
from localcloud.api.errors import ApiError
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.store import Json, Record

_UPDATES = ("desiredNodeVersion", "desiredMasterVersion")
_ELSEWHERE = {
    "desiredClusterAutoscaling": ("autoscaling",),
    "desiredDnsConfig": ("networkConfig", "dnsConfig"),
    "desiredGatewayApiConfig": ("networkConfig", "gatewayApiConfig"),
    "desiredDefaultSnatStatus": ("networkConfig", "defaultSnatStatus"),
    "desiredDatapathProvider": ("networkConfig", "datapathProvider"),
    "desiredStackType": ("ipAllocationPolicy", "stackType"),
}
"""Fields of an update that are not the cluster's field of the same name."""


@TABLE.serves(*spellings("clusters.create"))
def _create(call: Call) -> Json:
    if "cluster" not in call.body:
        raise ApiError(400, "Cluster must be specified.")
    cluster: Json = call.body["cluster"]
    name = cluster.get("name", "")
    if not NAME.fullmatch(name):
        raise ApiError(
            400,
            f'Invalid value for field "cluster.name": "{name}". Must be a match of regex '
            f"'(?:{NAME.pattern})' (only alphanumerics and hyphens, at most 40 characters).",
        )
    key = f"{parent(call)}/clusters/{name}"
    for other in call.store.list(CLUSTER):
        if other.key == key:
            raise ApiError(409, f"Already exists: {key}.")
        if other.name == name:
            raise ApiError(409, f"Already exists: {other.key}: localcloud runs one cluster of a name.")
    _check_pools(cluster)
    check_version(call, cluster.get("initialClusterVersion", ""), "Master")
    record = Record(key, CLUSTER, filled(call, cluster, key))
    call.store.put(record)
    return begin(call, "CREATE_CLUSTER", record, "container.clusters.create")


def _check_pools(cluster: Json) -> None:
    pools, count = cluster.get("nodePools", []), cluster.get("initialNodeCount")
    if cluster.get("autopilot", {}).get("enabled"):
        return
    if pools and count:
        raise ApiError(400, "Cluster.initial_node_count can't be set when node_pools are specified.")
    if not pools and not (count and count > 0):
        raise ApiError(400, "Cluster.initial_node_count must be greater than zero.")
    names = [pool.get("name", "") for pool in pools]
    if any(not NAME.fullmatch(name) for name in names) or len(set(names)) < len(names):
        raise ApiError(400, "Each node pool needs a name of its own, like 'default-pool'.")


@TABLE.serves(*spellings("clusters.get"))
def _get(call: Call) -> Json:
    return find_cluster(call).body


@TABLE.serves(*spellings("clusters.list"))
def _list(call: Call) -> Json:
    bodies = [record.body for record in in_location(call, CLUSTER)]
    return {"clusters": bodies} if bodies else {}


@TABLE.serves(*spellings("clusters.delete"))
def _delete(call: Call) -> Json:
    record = changeable(call)
    if record.body.get("deletionProtection"):
        raise ApiError(400, f"Cluster {record.name} has deletion protection.", status="FAILED_PRECONDITION")
    record.body["status"] = "STOPPING"
    call.store.put(record)
    return begin(call, "DELETE_CLUSTER", record, "container.clusters.delete")


@TABLE.serves(*spellings("clusters.update"))
def _update(call: Call) -> Json:
    record = changeable(call)
    update: Json = call.body.get("update", {})
    etag = update.pop("etag", record.body["etag"])
    if etag != record.body["etag"]:
        raise ApiError(409, "The etag does not match the cluster's current etag.", status="ABORTED")
    if not update:
        raise ApiError(400, "Must specify a field to update.")
    known = call.schema("Cluster")
    pool = update.pop("desiredNodePoolId", "")
    for wanted, value in update.items():
        field = wanted.removeprefix("desired")
        field = field[:1].lower() + field[1:]
        if wanted in _UPDATES:
            check_version(call, value, "Master" if wanted == "desiredMasterVersion" else "Node")
        elif wanted in _ELSEWHERE:
            *above, last = _ELSEWHERE[wanted]
            (record.body.setdefault(above[0], {}) if above else record.body)[last] = value
        elif wanted == "desiredNodePoolAutoscaling":
            node_pools.set_autoscaling(call, record, pool or node_pools.DEFAULT_POOL, value)
        elif wanted.startswith("desired") and field in known:
            record.body[field] = value
        else:
            raise ApiError(501, f"localcloud does not serve the update of {wanted}")
    return _changed(call, record, "UPDATE_CLUSTER")


def _changed(call: Call, record: Record, kind: str) -> Json:
    node_pools.count(record.body)
    stamped(record.body)
    call.store.put(record)
    return begin(call, kind, record, "compute.nothing")


@TABLE.serves(
    "container.projects.locations.clusters.setResourceLabels",
    "container.projects.zones.clusters.resourceLabels",
)
def _set_labels(call: Call) -> Json:
    record = changeable(call)
    if call.body.get("labelFingerprint") != record.body["labelFingerprint"]:
        raise ApiError(
            400,
            "Labels could not be set due to fingerprint mismatch: the labels have changed.",
            status="FAILED_PRECONDITION",
        )
    record.body["resourceLabels"] = call.body.get("resourceLabels", {})
    record.body["labelFingerprint"] = fingerprint(record.body["resourceLabels"])
    return _changed(call, record, "UPDATE_CLUSTER")


@TABLE.serves(*spellings("clusters.setMaintenancePolicy"))
def _set_maintenance_policy(call: Call) -> Json:
    record = changeable(call)
    policy: Json = call.body.get("maintenancePolicy") or {}
    version = record.body["maintenancePolicy"]["resourceVersion"]
    if policy.get("resourceVersion", version) != version:
        raise ApiError(
            400,
            "The maintenance policy has changed: its resourceVersion is another.",
            status="FAILED_PRECONDITION",
        )
    record.body["maintenancePolicy"] = maintained(policy)
    return _changed(call, record, "SET_MAINTENANCE_POLICY")


@TABLE.serves("container.projects.locations.getServerConfig", "container.projects.zones.getServerconfig")
def _server_config(call: Call) -> Json:
    location_of(call)
    version = gke_version(call.services.backends.cluster_version())
    channels = [
        {"channel": name, "defaultVersion": version, "validVersions": [version]}
        for name in ("RAPID", "REGULAR", "STABLE")
    ]
    return {
        "defaultClusterVersion": version,
        "validMasterVersions": [version],
        "validNodeVersions": [version],
        "defaultImageType": "COS_CONTAINERD",
        "validImageTypes": ["COS_CONTAINERD"],
        "channels": channels,
    }
