"""What Compute Engine's resources share: links, names, fingerprints, lists and operations."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from localcloud.api.errors import ApiError, already_exists, invalid_value, not_found
from localcloud.api.listing import matching, ordered_page, page
from localcloud.api.service import TABLE, Call, Services, fingerprint, new_id, now
from localcloud.specs import PROJECT_NUMBER
from localcloud.store import Json, Record, Store

LINK = "https://www.googleapis.com/compute/v1/"
"""Links are Google's own wherever they are shown: clients compare them with what they wrote down before."""

NAME = r"(?:[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)"
_LABEL_KEY = re.compile(r"[a-z][-_a-z0-9]{0,62}")
_LABEL_VALUE = re.compile(r"[-_a-z0-9]{0,63}")
_USER_TEXT = {"metadata", "labels", "description"}

OPERATION = "compute.operations"


def link(key: str) -> str:
    return LINK + key


def key_of(url: str) -> str:
    """The key in a stored link."""
    return url.removeprefix(LINK)


def rendered(value: Any, version: str) -> Any:
    """A response with its links in the spelling of an API's version, but for what users wrote themselves."""
    if isinstance(value, str):
        return LINK.replace("/v1/", f"/{version}/") + key_of(value) if value.startswith(LINK) else value
    if isinstance(value, list):
        return [rendered(item, version) for item in value]
    if isinstance(value, dict):
        return {key: item if key in _USER_TEXT else rendered(item, version) for key, item in value.items()}
    return value


def resolve(call: Call, reference: str, within: str) -> str:
    """The key that a client's reference means: a URL, a path from `projects/` or its scope, or a bare name.

    `within` is the collection of a bare name (`projects/P/global/networks`).
    """
    _, found, rest = reference.rpartition("projects/")
    if found:
        key = f"projects/{rest}"
    elif reference.split("/", maxsplit=1)[0] in ("global", "zones", "regions") and "/" in reference:
        key = f"projects/{call.project}/{reference}"
    else:
        key = f"{within}/{reference}"
    return key.replace(f"projects/{PROJECT_NUMBER}/", f"projects/{call.services.config.project}/")


def require(store: Store, key: str) -> Record:
    """
    Raises:
        ApiError: 404, there is no such resource.
    """
    record = store.get(key)
    if record is None:
        raise not_found(key)
    return record


def check_new(call: Call, parent: str) -> str:
    """The key for the body's name below `parent`.

    Raises:
        ApiError: 400, not a name; 409, there is one.
    """
    name = call.body.get("name", "")
    if not re.fullmatch(NAME, name):
        raise invalid_value("resource.name", name, f"Must be a match of regex '{NAME}'")
    key = f"{parent}/{name}"
    if call.store.get(key) is not None:
        raise already_exists(key)
    return key


def check_labels(labels: Json, field: str) -> None:
    """
    Raises:
        ApiError: 400, more than 64, or a key or value that Google would refuse.
    """
    if len(labels) > 64:
        raise invalid_value(field, "", "The number of labels must not exceed 64.")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise invalid_value(
                field, key, "Label keys must match the following regular expression: '[a-z][-_a-z0-9]{0,62}'."
            )
        if not _LABEL_VALUE.fullmatch(value):
            raise invalid_value(
                field, value, "Label values must match the following regular expression: '[-_a-z0-9]{0,63}'."
            )


def set_labels(call: Call, record: Record) -> Json:
    """The common part of every `setLabels`."""
    if call.body.get("labelFingerprint") != record.body.get("labelFingerprint"):
        raise ApiError(412, "Labels fingerprint either invalid or resource labels have changed")
    labels = call.body.get("labels", {})
    check_labels(labels, "resource.labels")
    record.body["labels"] = labels
    record.body["labelFingerprint"] = fingerprint(labels)
    call.store.put(record)
    return begin(call, "setLabels", record)


def new_body(key: str, kind: str) -> Json:
    """The fields that every resource gets at birth."""
    body: Json = {"kind": kind, "id": new_id(), "creationTimestamp": now(), "name": key.rsplit("/", 1)[-1]}
    parts = key.split("/")
    if parts[2] in ("zones", "regions"):
        body[parts[2].removesuffix("s")] = link("/".join(parts[:4]))
    return body | {"selfLink": link(key)}


def listed(call: Call, items: list[Json], kind: str, path: str) -> Json:
    """A list's response: filtered, in pages."""
    order = call.query.get("orderBy")
    if order not in (None, "", "name", "creationTimestamp desc"):
        raise invalid_value("orderBy", order, "Only 'name' and 'creationTimestamp desc' are supported.")
    by_time = order == "creationTimestamp desc"
    chosen, following = ordered_page(
        matching(items, call.query.get("filter")),
        call.query.get("maxResults"),
        call.query.get("pageToken"),
        ["creationTimestamp", "insertTime", "name"] if by_time else ["name"],
        down=by_time,
    )
    body: Json = {"kind": kind, "id": path, "items": chosen, "selfLink": link(path)}
    if not chosen:
        del body["items"]
    return body | ({"nextPageToken": following} if following else {})


def aggregated(call: Call, items: list[Json], kind: str, collection: str, scopes: list[str]) -> Json:
    """A list of all scopes (`zones/Z`), each with its items or Google's warning that there are none."""
    groups: dict[str, list[Json]] = {}
    found = matching(items, call.query.get("filter"))
    chosen, following = page(found, call.query.get("maxResults"), call.query.get("pageToken"), "selfLink")
    for item in chosen:
        parts = key_of(item["selfLink"]).split("/")
        groups.setdefault("global" if parts[2] == "global" else "/".join(parts[2:4]), []).append(item)
    body: Json = {"kind": kind, "id": f"projects/{call.project}/aggregated/{collection}"}
    body["items"] = {
        scope: {collection: groups[scope]} if scope in groups else {"warning": _nothing_in(scope)}
        for scope in sorted({*scopes, *groups})
    }
    body["selfLink"] = link(body["id"])
    return body | ({"nextPageToken": following} if following else {})


def _nothing_in(scope: str) -> Json:
    return {
        "code": "NO_RESULTS_ON_PAGE",
        "message": f"There are no results for scope '{scope}' on this page.",
        "data": [{"key": "scope", "value": scope}],
    }


def begin(call: Call, kind: str, target: Record, task: str = "compute.nothing", **arguments: Any) -> Json:
    """Record an operation on `target` and answer with it. `task` gets the target's key and the arguments."""
    scope = "/".join(target.key.split("/")[: 3 if "/global/" in target.key else 4])
    name = f"operation-{time.time_ns() // 1_000_000}-{secrets.token_hex(8)}-{secrets.token_hex(4)}"
    key = f"{scope}/operations/{name}"
    body = new_body(key, "compute#operation") | {
        "operationType": kind,
        "targetLink": link(target.key),
        "targetId": target.body["id"],
        "status": "RUNNING",
        "user": call.principal.email,
        "progress": 0,
        "insertTime": now(),
        "startTime": now(),
    }
    del body["creationTimestamp"]
    record = Record(key, OPERATION, body, {"request": call.query.get("requestId", "")})
    return call.services.operations.submit(record, target.key, task, {"key": target.key, **arguments})


def repeated(call: Call) -> Json | None:
    """The operation of an earlier request with the same `requestId`, if there was one."""
    request = call.query.get("requestId")
    if not request:
        return None
    for record in call.store.list(OPERATION, f"projects/{call.project}/"):
        if record.private.get("request") == request:
            return record.body
    return None


def finish(body: Json, _response: Json | None, error: ApiError | None) -> None:
    """Write an operation's end into its body."""
    body |= {"status": "DONE", "progress": 100, "endTime": now()}
    if error is not None:
        body["error"] = {"errors": [{"code": error.reason.upper(), "message": error.message}]}
        body["httpErrorStatusCode"] = error.code
        body["httpErrorMessage"] = error.status.replace("_", " ")


@TABLE.task("compute.nothing")
def _nothing(_services: Services, _arguments: Json) -> None:
    """The change was a change of records only, and the request made it."""


@TABLE.task("compute.drop")
def _drop(services: Services, arguments: Json) -> None:
    services.store.delete(arguments["key"])
