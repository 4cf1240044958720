"""Compute Engine's operations: global ones, and those of regions and zones."""

from __future__ import annotations

from localcloud.api.compute.catalog import ZONES, zones
from localcloud.api.compute.common import OPERATION, aggregated, listed, require
from localcloud.api.errors import not_ready
from localcloud.api.service import TABLE, Call
from localcloud.store import Json

_WAIT_SECONDS = 120.0
"""Google's `wait` comes back after two minutes at most, whether or not the operation is done."""


def _scope(call: Call) -> str:
    for name in ("zone", "region"):
        if name in call.path:
            return f"projects/{call.project}/{name}s/{call.path[name]}"
    return f"projects/{call.project}/global"


def _key(call: Call) -> str:
    return f"{_scope(call)}/operations/{call.path['operation']}"


@TABLE.serves("compute.zoneOperations.get", "compute.regionOperations.get", "compute.globalOperations.get")
def _get(call: Call) -> Json:
    return require(call.store, _key(call)).body


@TABLE.serves("compute.zoneOperations.wait", "compute.regionOperations.wait", "compute.globalOperations.wait")
def _wait(call: Call) -> Json:
    require(call.store, _key(call))
    record = call.services.operations.wait(_key(call), _WAIT_SECONDS)
    return record.body if record is not None else require(call.store, _key(call)).body


@TABLE.serves("compute.zoneOperations.list", "compute.regionOperations.list", "compute.globalOperations.list")
def _list(call: Call) -> Json:
    path = f"{_scope(call)}/operations"
    items = [record.body for record in call.store.list(OPERATION, f"{path}/")]
    return listed(call, items, "compute#operationList", path)


@TABLE.serves("compute.globalOperations.aggregatedList")
def _aggregated(call: Call) -> Json:
    items = [record.body for record in call.store.list(OPERATION, f"projects/{call.project}/")]
    scopes = ["global", *(f"regions/{region}" for region in ZONES), *(f"zones/{zone}" for zone in zones())]
    return aggregated(call, items, "compute#operationAggregatedList", "operations", scopes)


@TABLE.serves(
    "compute.zoneOperations.delete", "compute.regionOperations.delete", "compute.globalOperations.delete"
)
def _delete(call: Call) -> Json:
    record = require(call.store, _key(call))
    if not record.private["done"]:
        raise not_ready(record.key)
    call.store.delete(record.key)
    return {}
