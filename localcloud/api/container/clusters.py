"""Clusters and node pools: the requests.

A cluster is a real control plane (see `control_planes.py`). Its node pools are records: machines that join
are the user's own.
"""

from __future__ import annotations

from localcloud.api.container.common import (
    CLUSTER,
    NAME,
    gke_version,
    in_location,
    location_of,
    parent,
    spellings,
)
from localcloud.api.container.description import filled
from localcloud.api.container.operations import begin
from localcloud.api.errors import ApiError
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.store import Json, Record

_UPDATES = ("desiredNodeVersion", "desiredMasterVersion")


def _find(call: Call) -> Record:
    key = f"{parent(call)}/clusters/{call.path['cluster']}"
    record = call.store.get(key)
    if record is None:
        raise ApiError(404, f"Not found: {key}.")
    return record


def _changeable(call: Call) -> Record:
    """
    Raises:
        ApiError: 400, the cluster is being made or deleted.
    """
    record = _find(call)
    if record.body["status"] not in ("RUNNING", "ERROR"):
        raise ApiError(
            400,
            f"Cluster is running incompatible operation: status is {record.body['status']}.",
            status="FAILED_PRECONDITION",
            reason="failedPrecondition",
        )
    return record


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
    _check_version(call, cluster)
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


def _check_version(call: Call, cluster: Json) -> None:
    wanted = cluster.get("initialClusterVersion", "")
    version = call.services.backends.cluster_version()
    full = gke_version(version)
    if wanted not in ("", "-", "latest", version.rpartition(".")[0], version, full):
        raise ApiError(
            400,
            f'Master version "{wanted}" is unsupported. No valid versions with the prefix "{wanted}" found.',
        )


@TABLE.serves(*spellings("clusters.get"))
def _get(call: Call) -> Json:
    return _find(call).body


@TABLE.serves(*spellings("clusters.list"))
def _list(call: Call) -> Json:
    bodies = [record.body for record in in_location(call, CLUSTER)]
    return {"clusters": bodies} if bodies else {}


@TABLE.serves(*spellings("clusters.delete"))
def _delete(call: Call) -> Json:
    record = _changeable(call)
    if record.body.get("deletionProtection"):
        raise ApiError(400, f"Cluster {record.name} has deletion protection.", status="FAILED_PRECONDITION")
    record.body["status"] = "STOPPING"
    call.store.put(record)
    return begin(call, "DELETE_CLUSTER", record, "container.clusters.delete")


@TABLE.serves(*spellings("clusters.update"))
def _update(call: Call) -> Json:
    record = _changeable(call)
    update: Json = call.body.get("update", {})
    etag = update.pop("etag", record.body["etag"])
    if etag != record.body["etag"]:
        raise ApiError(409, "The etag does not match the cluster's current etag.", status="ABORTED")
    if not update:
        raise ApiError(400, "Must specify a field to update.")
    known = call.schema("Cluster")
    for wanted, value in update.items():
        field = wanted.removeprefix("desired")
        field = field[:1].lower() + field[1:]
        if wanted in _UPDATES:
            _check_version(call, {"initialClusterVersion": value})
        elif wanted.startswith("desired") and field in known:
            record.body[field] = value
        else:
            raise ApiError(501, f"localcloud does not serve the update of {wanted}")
    return _changed(call, record, "UPDATE_CLUSTER")


def _changed(call: Call, record: Record, kind: str) -> Json:
    record.body["etag"] = fingerprint({key: value for key, value in record.body.items() if key != "etag"})
    call.store.put(record)
    return begin(call, kind, record, "compute.nothing")


@TABLE.serves(
    "container.projects.locations.clusters.setResourceLabels",
    "container.projects.zones.clusters.resourceLabels",
)
def _set_labels(call: Call) -> Json:
    record = _changeable(call)
    if call.body.get("labelFingerprint") != record.body["labelFingerprint"]:
        raise ApiError(
            400,
            "Labels could not be set due to fingerprint mismatch: the labels have changed.",
            status="FAILED_PRECONDITION",
        )
    record.body["resourceLabels"] = call.body.get("resourceLabels", {})
    record.body["labelFingerprint"] = fingerprint(record.body["resourceLabels"])
    return _changed(call, record, "UPDATE_CLUSTER")


@TABLE.serves(*spellings("clusters.nodePools.list"))
def _list_pools(call: Call) -> Json:
    return {"nodePools": _find(call).body["nodePools"]}


def _pool(call: Call, record: Record) -> Json:
    for pool in record.body["nodePools"]:
        if pool["name"] == call.path["nodePool"]:
            found: Json = pool
            return found
    raise ApiError(404, f"Not found: {record.key}/nodePools/{call.path['nodePool']}.")


@TABLE.serves(*spellings("clusters.nodePools.get"))
def _get_pool(call: Call) -> Json:
    return _pool(call, _find(call))


@TABLE.serves(*spellings("clusters.nodePools.delete"))
def _delete_pool(call: Call) -> Json:
    record = _changeable(call)
    record.body["nodePools"].remove(_pool(call, record))
    return _changed(call, record, "DELETE_NODE_POOL")


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
