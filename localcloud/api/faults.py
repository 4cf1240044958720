"""Faults on demand: what goes wrong at Google now and then, made to happen here, again and in the same way.

A fault is for requests of a method (`compute.instances.insert`, or `compute.*`), or for a part by its name:

    latency            the answer comes `seconds` later
    error              `status` in place of the work, with a Retry-After of `retryAfter` seconds
    lost-answer        the work is done, and the connection is cut before the answer
    failed-operation   the operation begins its work and fails half way
    no-boot            the instance `target` is said to run, and nothing of it does
    read-only-registry the registry gives no leave to push to the repository `target`, nor to delete there
    no-control-plane   the API server of the cluster `target` is away, for `seconds` or until it is cleared

The first `after` matching events pass, then `times` of them are hit (0: all), each with `probability`. Chance
is drawn from `seed`, the fault's name and the number of the event alone, so that the same faults and the same
requests give the same run.
"""

from __future__ import annotations

import contextvars
import fnmatch
import random
import threading
from collections.abc import Callable
from typing import Any

from localcloud.api.errors import ApiError
from localcloud.specs import BackendError
from localcloud.store import Json, Record, Store

FAULT = "localcloud.faults"
OF_REQUESTS = ("latency", "error", "lost-answer", "failed-operation")
OF_PARTS = ("no-boot", "read-only-registry", "no-control-plane")
_DEFAULTS: Json = {
    "method": "*",
    "target": "*",
    "status": 503,
    "retryAfter": 1,
    "seconds": 1.0,
    "times": 1,
    "after": 0,
    "probability": 1.0,
    "seed": 0,
}
_LONGEST_SECONDS = 600.0
_MOST_HITS_KEPT = 100

operation_fails: contextvars.ContextVar[bool] = contextvars.ContextVar("operation_fails", default=False)
"""Whether the operation that this request begins is to fail."""
work_fails: contextvars.ContextVar[bool] = contextvars.ContextVar("work_fails", default=False)
"""Whether this is the work of such an operation, and has not failed yet."""


def add(store: Store, given: Json) -> Json:
    """Keep a new fault.

    Raises:
        ApiError: 400, it is none.
    """
    kind = given.get("kind")
    if kind not in (*OF_REQUESTS, *OF_PARTS):
        raise ApiError(
            400, f"unknown kind of fault: {kind}; there are {', '.join((*OF_REQUESTS, *OF_PARTS))}"
        )
    unknown = set(given) - set(_DEFAULTS) - {"kind", "name"}
    if unknown:
        raise ApiError(400, f"unknown settings of a fault: {', '.join(sorted(unknown))}")
    # Without `seconds` a control plane is away until it is told to come back.
    body = _DEFAULTS | ({"seconds": 0.0} if kind == "no-control-plane" else {}) | given
    for name, default in _DEFAULTS.items():
        if isinstance(default, float) and isinstance(body[name], int):
            body[name] = float(body[name])
        if type(body[name]) is not type(default):
            raise ApiError(400, f"{name} must be of the type of {default!r}, not {body[name]!r}")
    in_range = (
        0 <= body["seconds"] <= _LONGEST_SECONDS
        and 0 <= body["probability"] <= 1
        and 400 <= body["status"] <= 599
        and min(body["times"], body["after"], body["retryAfter"]) >= 0
    )
    if not in_range:
        raise ApiError(400, "a fault's setting is out of its range")
    with store.transaction():
        names = {record.name for record in store.list(FAULT)}
        body.setdefault("name", next(f"f{n}" for n in range(1, len(names) + 2) if f"f{n}" not in names))
        if not isinstance(body["name"], str) or body["name"] in names or "/" in body["name"]:
            raise ApiError(400, f"a fault needs a name of its own, not {body['name']!r}")
        store.put(Record(f"faults/{body['name']}", FAULT, body | {"seen": 0, "hit": 0, "hits": []}))
    return body


def faults(store: Store) -> list[Json]:
    return [record.body for record in store.list(FAULT)]


def clear(store: Store, name: str = "") -> list[Json]:
    """Forget a fault, or all of them; gives what was forgotten.

    Raises:
        ApiError: 404, no fault has this name.
    """
    with store.transaction():
        gone = [record for record in store.list(FAULT) if name in ("", record.name)]
        if name and not gone:
            raise ApiError(404, f"there is no fault {name}")
        for record in gone:
            store.delete(record.key)
    return [record.body for record in gone]


def due(store: Store, kinds: tuple[str, ...], event: str) -> list[Json]:
    """The faults that hit an event now: a request, by its method's id, or a part's, by the part's name."""
    if not store.list(FAULT):
        return []
    hit = []
    with store.transaction():
        for record in store.list(FAULT):
            fault = record.body
            pattern = fault["method"] if fault["kind"] in OF_REQUESTS else fault["target"]
            if fault["kind"] not in kinds or not fnmatch.fnmatchcase(event, pattern):
                continue
            fault["seen"] += 1
            if _strikes(fault):
                fault["hit"] += 1
                fault["hits"] = [*fault["hits"], [fault["seen"], event]][-_MOST_HITS_KEPT:]
                hit.append(fault)
            store.put(record)
    return hit


def _strikes(fault: Json) -> bool:
    if fault["seen"] <= fault["after"] or 0 < fault["times"] <= fault["hit"]:
        return False
    chance = random.Random(f"{fault['seed']}/{fault['name']}/{fault['seen']}").random()  # noqa: S311
    return bool(chance < fault["probability"])


class RequestFaults:
    """What the faults of one request do before its work, and say for afterwards."""

    def __init__(self, store: Store, method: str, wait: Callable[[float], object]) -> None:
        found = due(store, OF_REQUESTS, method)
        self.answer_is_lost = any(fault["kind"] == "lost-answer" for fault in found)
        self.operation_fails = any(fault["kind"] == "failed-operation" for fault in found)
        for fault in found:
            if fault["kind"] == "latency":
                wait(fault["seconds"])
        for fault in found:
            if fault["kind"] == "error":
                raise ApiError(
                    fault["status"],
                    f"fault {fault['name']}: {method} is to answer {fault['status']}",
                    reason="rateLimitExceeded" if fault["status"] == 429 else "",
                    headers=(("Retry-After", str(fault["retryAfter"])),),
                )


class FaultyBackends:
    """The backends, but for what the faults say."""

    def __init__(self, backends: Any, store: Store) -> None:
        self._backends = backends
        self._store = store

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backends, name)

        def call(*arguments: Any) -> Any:
            target = getattr(arguments[0], "name", "") if arguments else ""
            if name == "start_instance" and due(self._store, ("no-boot",), target):
                return None
            result = function(*arguments)
            if work_fails.get():
                work_fails.set(False)
                raise BackendError(f"fault: {name} was done, and the operation is to fail")
            return result

        return call if callable(function) else function


class ControlPlanes:
    """Takes control planes away, and has them brought back when their fault is over."""

    def __init__(self, suspend: Callable[[str], None], restore: Callable[[], None]) -> None:
        self._suspend = suspend
        self._restore = restore

    def begin(self, store: Store, fault: Json, clusters: list[str]) -> None:
        """Begin a fault of a control plane; with `seconds` it ends by itself."""
        for cluster in clusters:
            if due(store, ("no-control-plane",), cluster):
                self._suspend(cluster)
        if fault["seconds"]:
            timer = threading.Timer(fault["seconds"], self._over, (store, fault["name"]))
            timer.daemon = True
            timer.start()

    def end(self, ended: list[Json]) -> None:
        if any(fault["kind"] == "no-control-plane" for fault in ended):
            self._restore()

    def _over(self, store: Store, name: str) -> None:
        if any(record.name == name for record in store.list(FAULT)):
            self.end(clear(store, name))
