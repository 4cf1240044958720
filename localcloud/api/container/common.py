"""What Kubernetes Engine's methods share: spellings, links, locations."""

from __future__ import annotations

import re
from typing import Any

from localcloud.api.compute.catalog import ZONES, zones
from localcloud.api.errors import ApiError
from localcloud.api.service import Call, fingerprint
from localcloud.store import Json, Record

CLUSTER = "container.clusters"
OPERATION = "container.operations"
NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?")
LINK = "https://container.googleapis.com/v1/"


def spellings(*methods: str) -> list[str]:
    """A method's ids under both parents."""
    return [
        f"container.projects.{parent}.{method}" for parent in ("locations", "zones") for method in methods
    ]


def rendered(value: Any, version: str) -> Any:
    """A response with its links in the spelling of an API's version."""
    if isinstance(value, str) and value.startswith(LINK):
        return LINK.replace("/v1/", f"/{version}/") + value.removeprefix(LINK)
    if isinstance(value, list):
        return [rendered(item, version) for item in value]
    if isinstance(value, dict):
        return {key: rendered(item, version) for key, item in value.items()}
    return value


def location_of(call: Call) -> str:
    """The call's location; `-` stands for all of them, where Google takes it.

    Raises:
        ApiError: 400, Google has no such zone or region.
    """
    location = call.path.get("location") or call.path["zone"]
    if location != "-" and location not in ZONES and location not in zones():
        raise ApiError(400, f'Location "{location}" does not exist.')
    return location


def parent(call: Call) -> str:
    return f"projects/{call.project}/locations/{location_of(call)}"


def in_location(call: Call, kind: str) -> list[Record]:
    prefix = f"projects/{call.project}/" if location_of(call) == "-" else f"{parent(call)}/"
    return call.store.list(kind, prefix)


def gke_version(version: str) -> str:
    """Kubernetes' version as Kubernetes Engine writes it."""
    return f"{version}-gke.1000000"


def check_version(call: Call, wanted: str, what: str) -> None:
    """
    Raises:
        ApiError: 400, localcloud's clusters are of another version.
    """
    version = call.services.backends.cluster_version()
    if wanted not in ("", "-", "latest", version.rpartition(".")[0], version, gke_version(version)):
        raise ApiError(
            400,
            f'{what} version "{wanted}" is unsupported. No valid versions with the prefix "{wanted}" found.',
        )


def find_cluster(call: Call) -> Record:
    """
    Raises:
        ApiError: 404, no such cluster.
    """
    key = f"{parent(call)}/clusters/{call.path['cluster']}"
    record = call.store.get(key)
    if record is None:
        raise ApiError(404, f"Not found: {key}.")
    return record


def changeable(call: Call) -> Record:
    """The call's cluster.

    Raises:
        ApiError: 404, no such cluster; 400, it is being made or deleted.
    """
    record = find_cluster(call)
    if record.body["status"] not in ("RUNNING", "ERROR"):
        raise ApiError(
            400,
            f"Cluster is running incompatible operation: status is {record.body['status']}.",
            status="FAILED_PRECONDITION",
            reason="failedPrecondition",
        )
    return record


def stamped(body: Json) -> Json:
    """A cluster or a node pool with the etag of its content."""
    body["etag"] = fingerprint({key: value for key, value in body.items() if key != "etag"})
    return body
