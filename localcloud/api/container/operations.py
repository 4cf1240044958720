"""Kubernetes Engine's operations."""

from __future__ import annotations

import secrets
import time

from localcloud.api.compute.catalog import zones
from localcloud.api.container.common import LINK, OPERATION, in_location, parent, spellings
from localcloud.api.errors import ApiError
from localcloud.api.service import TABLE, Call, now
from localcloud.specs import PROJECT_NUMBER
from localcloud.store import Json, Record


def begin(call: Call, kind: str, target: Record, task: str, pool: str = "") -> Json:
    """Record an operation on a cluster, or on one of its node pools, and answer with it."""
    name = f"operation-{time.time_ns() // 1_000_000}-{secrets.token_hex(16)}"
    location = target.body["location"]
    within = f"projects/{call.project}/locations/{location}"
    number = f"projects/{PROJECT_NUMBER}/{'zones' if location in zones() else 'locations'}/{location}"
    body: Json = {
        "name": name,
        "zone": location,
        "location": location,
        "operationType": kind,
        "status": "RUNNING",
        "selfLink": f"{LINK}{number}/operations/{name}",
        "targetLink": f"{LINK}{number}/clusters/{target.name}{f'/nodePools/{pool}' if pool else ''}",
        "startTime": now(),
    }
    record = Record(f"{within}/operations/{name}", OPERATION, body)
    return call.services.operations.submit(record, target.key, task, {"key": target.key, "pool": pool})


def finish(body: Json, _response: Json | None, error: ApiError | None) -> None:
    """Write an operation's end into its body."""
    body |= {"status": "DONE", "endTime": now()}
    if error is not None:
        body |= {"statusMessage": error.message, "error": {"code": 13, "message": error.message}}


@TABLE.serves(*spellings("operations.get"))
def _get_operation(call: Call) -> Json:
    key = f"{parent(call)}/operations/{call.path['operation']}"
    record = call.store.get(key)
    if record is None or record.kind != OPERATION:
        raise ApiError(404, f"Not found: {key}.")
    return record.body


@TABLE.serves(*spellings("operations.list"))
def _list_operations(call: Call) -> Json:
    return {"operations": [record.body for record in in_location(call, OPERATION)]}
