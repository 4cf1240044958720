"""Kubernetes Engine v1 and v1beta1: clusters, their node pools and operations, by zone and by location.

A cluster is a real control plane. Its node pools are records: the machines that join are the user's own.
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from contextlib import suppress
from functools import partial
from typing import Any

from localcloud.api.compute.catalog import ZONES, region_of, zones
from localcloud.api.compute.networks import find_network, find_subnetwork, subnetwork_of
from localcloud.api.errors import ApiError
from localcloud.api.service import PROJECT_NUMBER, TABLE, Call, Services, fingerprint, now
from localcloud.api.tokens import webhook_url
from localcloud.specs import BackendError, ClusterSpec
from localcloud.store import Json, Record

CLUSTER = "container.clusters"
OPERATION = "container.operations"
_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?")
_LINK = "https://container.googleapis.com/v1/"
_UPDATES = {"desiredNodeVersion": "currentNodeVersion", "desiredMasterVersion": "currentMasterVersion"}


def _spellings(*methods: str) -> list[str]:
    """A method's ids under both parents."""
    return [
        f"container.projects.{parent}.{method}" for parent in ("locations", "zones") for method in methods
    ]


def rendered(value: Any, base: str, version: str) -> Any:
    """A response with its links below this server."""
    if isinstance(value, str) and value.startswith(_LINK):
        return f"{base}/container/{version}/{value.removeprefix(_LINK)}"
    if isinstance(value, list):
        return [rendered(item, base, version) for item in value]
    if isinstance(value, dict):
        return {key: rendered(item, base, version) for key, item in value.items()}
    return value


def _location(call: Call) -> str:
    """The call's location; `-` stands for all of them, where Google takes it.

    Raises:
        ApiError: 400, Google has no such zone or region.
    """
    location = call.path.get("location") or call.path["zone"]
    if location != "-" and location not in ZONES and location not in zones():
        raise ApiError(400, f'Location "{location}" does not exist.')
    return location


def _parent(call: Call) -> str:
    return f"projects/{call.project}/locations/{_location(call)}"


def _find(call: Call) -> Record:
    key = f"{_parent(call)}/clusters/{call.path['cluster']}"
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


@TABLE.serves(*_spellings("clusters.create"))
def _create(call: Call) -> Json:
    if "cluster" not in call.body:
        raise ApiError(400, "Cluster must be specified.")
    cluster: Json = call.body["cluster"]
    name = cluster.get("name", "")
    if not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f'Invalid value for field "cluster.name": "{name}". Must be a match of regex '
            f"'(?:{_NAME.pattern})' (only alphanumerics and hyphens, at most 40 characters).",
        )
    key = f"{_parent(call)}/clusters/{name}"
    for other in call.store.list(CLUSTER):
        if other.key == key:
            raise ApiError(409, f"Already exists: {key}.")
        if other.name == name:
            raise ApiError(409, f"Already exists: {other.key}: localcloud runs one cluster of a name.")
    _check_pools(cluster)
    _check_version(call, cluster)
    record = Record(key, CLUSTER, _filled(call, cluster, key))
    call.store.put(record)
    return _begin(call, "CREATE_CLUSTER", record, "container.clusters.create")


def _check_pools(cluster: Json) -> None:
    pools, count = cluster.get("nodePools", []), cluster.get("initialNodeCount")
    if cluster.get("autopilot", {}).get("enabled"):
        return
    if pools and count:
        raise ApiError(400, "Cluster.initial_node_count can't be set when node_pools are specified.")
    if not pools and not (count and count > 0):
        raise ApiError(400, "Cluster.initial_node_count must be greater than zero.")
    names = [pool.get("name", "") for pool in pools]
    if any(not _NAME.fullmatch(name) for name in names) or len(set(names)) < len(names):
        raise ApiError(400, "Each node pool needs a name of its own, like 'default-pool'.")


def _check_version(call: Call, cluster: Json) -> None:
    wanted = cluster.get("initialClusterVersion", "")
    version = call.services.backends.cluster_version()
    full = _gke(version)
    if wanted not in ("", "-", "latest", version.rpartition(".")[0], version, full):
        raise ApiError(
            400,
            f'Master version "{wanted}" is unsupported. No valid versions with the prefix "{wanted}" found.',
        )


def _gke(version: str) -> str:
    """Kubernetes' version as Kubernetes Engine writes it."""
    return f"{version}-gke.1000000"


def _filled(call: Call, cluster: Json, key: str) -> Json:
    """The cluster as Google would show it right after the request."""
    location, version = _location(call), _gke(call.services.backends.cluster_version())
    zonal = location in zones()
    region = region_of(location) if zonal else location
    network = find_network(call, cluster.get("network", "default"))
    given = cluster.get("subnetwork")
    subnetwork = find_subnetwork(call, given, region) if given else subnetwork_of(call.store, network, region)
    if subnetwork is None:
        raise ApiError(
            400, f'Network "{network.name}" has no subnetwork in region "{region}"; specify a subnetwork.'
        )
    nodes = [location] if zonal else [f"{region}-{letter}" for letter in ZONES[region]]
    body = cluster | {
        "id": secrets.token_hex(32),
        "network": network.name,
        "subnetwork": subnetwork.name,
        "selfLink": _LINK + (key.replace("/locations/", "/zones/") if zonal else key),
        "location": location,
        "zone": location,
        "locations": cluster.get("locations") or nodes,
        "status": "PROVISIONING",
        "initialClusterVersion": version,
        "currentMasterVersion": version,
        "currentNodeVersion": version,
        "createTime": now(),
        "labelFingerprint": fingerprint(cluster.get("resourceLabels", {})),
        "networkConfig": cluster.get("networkConfig", {})
        | {"network": network.key, "subnetwork": subnetwork.key},
        "nodePools": _pools(cluster, key, version, nodes),
    }
    defaults: Json = {
        "loggingService": "none",
        "monitoringService": "none",
        "clusterIpv4Cidr": "10.8.0.0/14",
        "servicesIpv4Cidr": "10.12.0.0/20",
        "addonsConfig": {},
        "legacyAbac": {},
        "masterAuthorizedNetworksConfig": {},
        "networkPolicy": {},
        "ipAllocationPolicy": {},
        "databaseEncryption": {"state": "DECRYPTED"},
        "shieldedNodes": {"enabled": True},
        "releaseChannel": {"channel": "REGULAR"},
        "defaultMaxPodsConstraint": {"maxPodsPerNode": "110"},
        "verticalPodAutoscaling": {},
        "autoscaling": {"autoscalingProfile": "BALANCED"},
        "nodeConfig": body["nodePools"][0]["config"] if body["nodePools"] else {},
        "autopilot": {},
    }
    body |= {field: value for field, value in defaults.items() if field not in body}
    body["etag"] = fingerprint(body)
    return body


def _pools(cluster: Json, key: str, version: str, nodes: list[str]) -> list[Json]:
    if cluster.get("autopilot", {}).get("enabled"):
        return []
    given = cluster.get("nodePools") or [
        {
            "name": "default-pool",
            "initialNodeCount": cluster["initialNodeCount"],
            "config": cluster.get("nodeConfig", {}),
        }
    ]
    config_defaults: Json = {
        "machineType": "e2-medium",
        "diskSizeGb": 100,
        "diskType": "pd-balanced",
        "imageType": "COS_CONTAINERD",
        "serviceAccount": "default",
    }
    return [
        pool
        | {
            "config": config_defaults | pool.get("config", {}),
            "selfLink": f"{_LINK}{key}/nodePools/{pool['name']}",
            "version": version,
            "status": "RUNNING",
            "locations": pool.get("locations") or nodes,
            "management": pool.get("management", {"autoUpgrade": True, "autoRepair": True}),
            "maxPodsConstraint": pool.get("maxPodsConstraint", {"maxPodsPerNode": "110"}),
            "podIpv4CidrSize": 24,
            "instanceGroupUrls": [],
            "etag": fingerprint(pool),
        }
        for pool in given
    ]


@TABLE.serves(*_spellings("clusters.get"))
def _get(call: Call) -> Json:
    return _find(call).body


@TABLE.serves(*_spellings("clusters.list"))
def _list(call: Call) -> Json:
    bodies = [record.body for record in _in_location(call, CLUSTER)]
    return {"clusters": bodies} if bodies else {}


def _in_location(call: Call, kind: str) -> list[Record]:
    prefix = f"projects/{call.project}/" if _location(call) == "-" else f"{_parent(call)}/"
    return call.store.list(kind, prefix)


@TABLE.serves(*_spellings("clusters.delete"))
def _delete(call: Call) -> Json:
    record = _changeable(call)
    if record.body.get("deletionProtection"):
        raise ApiError(400, f"Cluster {record.name} has deletion protection.", status="FAILED_PRECONDITION")
    record.body["status"] = "STOPPING"
    call.store.put(record)
    return _begin(call, "DELETE_CLUSTER", record, "container.clusters.delete")


@TABLE.serves(*_spellings("clusters.update"))
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
    return _begin(call, kind, record, "compute.nothing")


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


@TABLE.serves(*_spellings("clusters.nodePools.list"))
def _list_pools(call: Call) -> Json:
    return {"nodePools": _find(call).body["nodePools"]}


def _pool(call: Call, record: Record) -> Json:
    for pool in record.body["nodePools"]:
        if pool["name"] == call.path["nodePool"]:
            found: Json = pool
            return found
    raise ApiError(404, f"Not found: {record.key}/nodePools/{call.path['nodePool']}.")


@TABLE.serves(*_spellings("clusters.nodePools.get"))
def _get_pool(call: Call) -> Json:
    return _pool(call, _find(call))


@TABLE.serves(*_spellings("clusters.nodePools.delete"))
def _delete_pool(call: Call) -> Json:
    record = _changeable(call)
    record.body["nodePools"].remove(_pool(call, record))
    return _changed(call, record, "DELETE_NODE_POOL")


@TABLE.serves("container.projects.locations.getServerConfig", "container.projects.zones.getServerconfig")
def _server_config(call: Call) -> Json:
    _location(call)
    version = _gke(call.services.backends.cluster_version())
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


def _begin(call: Call, kind: str, target: Record, task: str) -> Json:
    name = f"operation-{time.time_ns() // 1_000_000}-{secrets.token_hex(16)}"
    location = target.body["location"]
    parent = f"projects/{call.project}/locations/{location}"
    number = f"projects/{PROJECT_NUMBER}/{'zones' if location in zones() else 'locations'}/{location}"
    body: Json = {
        "name": name,
        "zone": location,
        "location": location,
        "operationType": kind,
        "status": "RUNNING",
        "selfLink": f"{_LINK}{number}/operations/{name}",
        "targetLink": f"{_LINK}{number}/clusters/{target.name}",
        "startTime": now(),
    }
    record = Record(f"{parent}/operations/{name}", OPERATION, body)
    return call.services.operations.submit(record, target.key, task, {"key": target.key})


def finish(body: Json, _response: Json | None, error: ApiError | None) -> None:
    """Write an operation's end into its body."""
    body |= {"status": "DONE", "endTime": now()}
    if error is not None:
        body |= {"statusMessage": error.message, "error": {"code": 13, "message": error.message}}


@TABLE.serves(*_spellings("operations.get"))
def _get_operation(call: Call) -> Json:
    key = f"{_parent(call)}/operations/{call.path['operation']}"
    record = call.store.get(key)
    if record is None or record.kind != OPERATION:
        raise ApiError(404, f"Not found: {key}.")
    return record.body


@TABLE.serves(*_spellings("operations.list"))
def _list_operations(call: Call) -> Json:
    return {"operations": [record.body for record in _in_location(call, OPERATION)]}


def _spec(services: Services, record: Record) -> ClusterSpec:
    project = record.key.split("/")[1]
    return ClusterSpec(record.name, project, record.body["location"], webhook_url(services.home))


@TABLE.task("container.clusters.create")
def _do_create(services: Services, arguments: Json) -> None:
    """Start the control plane. One that cannot be started stays, in the state ERROR, as on Google."""
    record = services.store.get(arguments["key"])
    if record is None:
        return
    try:
        cluster = services.backends.create_cluster(_spec(services, record))
    except BackendError as error:
        _show(services, record.key, {"status": "ERROR", "statusMessage": str(error)})
        raise
    _show(services, record.key, _running(cluster.endpoint, cluster.ca_certificate_pem, cluster.version))


def _running(endpoint: str, certificate: str, version: str) -> Json:
    return {
        "status": "RUNNING",
        "endpoint": endpoint,
        "masterAuth": {"clusterCaCertificate": base64.b64encode(certificate.encode()).decode()},
        "currentMasterVersion": _gke(version),
    }


def _show(services: Services, key: str, fields: Json) -> None:
    with services.store.transaction():
        record = services.store.get(key)
        if record is not None:
            record.body |= fields
            if fields["status"] == "RUNNING":
                record.body.pop("statusMessage", None)
            services.store.put(record)


@TABLE.task("container.clusters.delete")
def _do_delete(services: Services, arguments: Json) -> None:
    """End the control plane first and forget it afterwards, so that a crash in between loses no work."""
    key = arguments["key"]
    try:
        services.backends.delete_cluster(key.rpartition("/")[2])
    except BackendError as error:
        _show(services, key, {"status": "ERROR", "statusMessage": str(error)})
        raise
    services.store.delete(key)


def reconcile(services: Services) -> None:
    """Make every control plane that should run do so; one that cannot is shown in the state ERROR."""
    for record in services.store.list(CLUSTER):
        services.operations.schedule(record.key, partial(_restore, services, record.key))


def _restore(services: Services, key: str) -> None:
    record = services.store.get(key)
    if record is not None and record.body["status"] in ("RUNNING", "ERROR"):
        with suppress(BackendError):  # the record says why: see _do_create
            _do_create(services, {"key": key})
