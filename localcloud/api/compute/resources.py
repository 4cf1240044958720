"""The verbs that networks, subnetworks, firewalls and addresses have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from localcloud.api.compute.catalog import ZONES, check_region
from localcloud.api.compute.common import (
    LINK,
    aggregated,
    begin,
    check_labels,
    check_new,
    key_of,
    listed,
    new_body,
    require,
    resolve,
    set_labels,
)
from localcloud.api.errors import ApiError, in_use, invalid_value
from localcloud.api.masks import merged
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.store import Json, Record, Store


@dataclass(frozen=True)
class Collection:
    """One kind of resource that is a record and nothing else.

    `prepare` checks a new body and fills in what Google would; `users` yields the keys of what needs a
    resource; `patchable` are the fields that may change; `view` adds what is only known when
    a resource is read; `changed` checks a patched resource against the body before.
    """

    name: str
    kind: str
    regional: bool
    prepare: Callable[[Call, Record], None]
    users: Callable[[Store, Record], Iterator[str]]
    patchable: frozenset[str] = frozenset()
    check: Callable[[Json], None] = lambda _body: None
    view: Callable[[Store, Record], Json] = lambda _store, record: record.body
    forget: Callable[[Store, Record], None] = lambda _store, _record: None
    changed: Callable[[Call, Record, Json], None] = lambda _call, _record, _before: None
    labelled: bool = False

    @property
    def singular(self) -> str:
        return "address" if self.name == "addresses" else self.name.removesuffix("s")

    @property
    def record_kind(self) -> str:
        return f"compute.{self.name}"

    def parent(self, call: Call) -> str:
        scope = f"regions/{check_region(call)}" if self.regional else "global"
        return f"projects/{call.project}/{scope}/{self.name}"

    def key(self, call: Call) -> str:
        return f"{self.parent(call)}/{call.path.get('resource') or call.path[self.singular]}"

    def bodies(self, store: Store, prefix: str) -> list[Json]:
        return [self.view(store, record) for record in store.list(self.record_kind, prefix)]


def create(call: Call, collection: Collection, record: Record) -> None:
    """Check a new resource, fill in its defaults and keep it.

    Raises:
        ApiError: 400 or 404, Google would refuse it.
    """
    if collection.labelled:
        check_labels(record.body.get("labels", {}), "resource.labels")
        record.body["labelFingerprint"] = fingerprint(record.body.get("labels", {}))
    collection.prepare(call, record)
    collection.check(record.body)
    call.store.put(record)


def serve(collection: Collection) -> None:
    """Put a collection's methods into the table."""
    prefix = f"compute.{collection.name}"

    @TABLE.serves(f"{prefix}.insert")
    def _insert(call: Call) -> Json:
        key = check_new(call, collection.parent(call))
        body = {"description": "", **call.body, **new_body(key, collection.kind)}
        record = Record(key, collection.record_kind, body)
        create(call, collection, record)
        return begin(call, "insert", record)

    @TABLE.serves(f"{prefix}.get")
    def _get(call: Call) -> Json:
        return collection.view(call.store, require(call.store, collection.key(call)))

    @TABLE.serves(f"{prefix}.list")
    def _list(call: Call) -> Json:
        path = collection.parent(call)
        return listed(call, collection.bodies(call.store, f"{path}/"), f"{collection.kind}List", path)

    @TABLE.serves(f"{prefix}.delete")
    def _delete(call: Call) -> Json:
        record = require(call.store, collection.key(call))
        for user in collection.users(call.store, record):
            raise in_use(record.key, user)
        collection.forget(call.store, record)
        call.store.delete(record.key)
        return begin(call, "delete", record)

    if collection.patchable:

        @TABLE.serves(f"{prefix}.patch")
        def _patch(call: Call) -> Json:
            record = require(call.store, collection.key(call))
            _change(call, collection, record)
            return begin(call, "patch", record)

    if collection.labelled:

        @TABLE.serves(f"{prefix}.setLabels")
        def _labels(call: Call) -> Json:
            return set_labels(call, require(call.store, collection.key(call)))

    if collection.regional:

        @TABLE.serves(f"{prefix}.aggregatedList")
        def _aggregated(call: Call) -> Json:
            items = collection.bodies(call.store, f"projects/{call.project}/regions/")
            kind = f"{collection.kind}AggregatedList"
            return aggregated(call, items, kind, collection.name, [f"regions/{name}" for name in ZONES])


def _is_same(call: Call, given: object, current: object) -> bool:
    """Whether a value is what there is; a link may be spelled as this server shows it."""
    if isinstance(given, str) and isinstance(current, str) and current.startswith(LINK):
        return resolve(call, given, "") == key_of(current)
    return given == current


def _change(call: Call, collection: Collection, record: Record) -> None:
    """Apply a patch, as long as it changes only what may change."""
    supplied = call.body.get("fingerprint")
    if supplied is not None and supplied != record.body.get("fingerprint"):
        raise ApiError(412, f"Supplied fingerprint does not match current {collection.singular} fingerprint.")
    before = dict(record.body)
    for field, value in call.body.items():
        if field in collection.patchable:
            record.body[field] = merged(record.body.get(field), value)
        elif field != "fingerprint" and not _is_same(call, value, record.body.get(field)):
            raise invalid_value(f"resource.{field}", value, "Field is immutable.")
    collection.check(record.body)
    collection.changed(call, record, before)
    if "fingerprint" in record.body:
        refingerprint(record.body)
    call.store.put(record)


def refingerprint(body: Json) -> None:
    """Give a resource the fingerprint of what it says now."""
    body["fingerprint"] = fingerprint({key: value for key, value in body.items() if key != "fingerprint"})
