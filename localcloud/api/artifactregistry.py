"""Artifact Registry v1 and v1beta2: repositories of container images, their policies and images."""

from __future__ import annotations

import re
import secrets
import uuid
from datetime import UTC, datetime
from functools import partial

from localcloud.api.compute.catalog import ZONES
from localcloud.api.errors import ApiError
from localcloud.api.iam import find_account
from localcloud.api.listing import listing
from localcloud.api.masks import update
from localcloud.api.policy import REPOSITORY_ROLES, get_policy, set_policy, test_permissions
from localcloud.api.service import TABLE, Call, Services
from localcloud.specs import BackendError
from localcloud.store import Json, Record, Store

REPOSITORY = "artifactregistry.repositories"
OPERATION = "artifactregistry.operations"
LOCATIONS = (*ZONES, "europe", "us", "asia")
_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?|(?:(?:us|eu|asia)\.)?gcr\.io")
_CHANGEABLE = {"description", "labels", "cleanupPolicies", "cleanupPolicyDryRun", "dockerConfig"}
_TYPE = "type.googleapis.com/google.devtools.artifactregistry."


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _parent(call: Call) -> str:
    location = call.path["location"]
    if location not in LOCATIONS:
        raise ApiError(400, f'Location "{location}" is not supported by Artifact Registry.')
    return f"projects/{call.project}/locations/{location}"


def find_repository(call: Call) -> Record:
    """
    Raises:
        ApiError: 404, no such repository.
    """
    key = f"{_parent(call)}/repositories/{call.path['repository']}"
    record = call.store.get(key)
    if record is None:
        raise ApiError(404, f'Repository "{key}" not found')
    return record


def repository_of(store: Store, image: str) -> Record | None:
    """The repository that an image's name (`PROJECT/REPOSITORY/…`) belongs to."""
    project, _, rest = image.partition("/")
    prefix = f"{project}/{rest.partition('/')[0]}"
    for record in store.list(REPOSITORY, f"projects/{project}/"):
        if prefix_of(record) == prefix and not record.private.get("deleting"):
            return record
    return None


@TABLE.serves("artifactregistry.projects.locations.repositories.create")
def _create(call: Call) -> Json:
    name = call.query.get("repositoryId", "")
    if not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f'Invalid repository ID "{name}": it must start with a letter and may have lower-case letters, '
            f"digits and hyphens, 63 characters at most.",
        )
    form = call.body.get("format", "FORMAT_UNSPECIFIED")
    if form == "FORMAT_UNSPECIFIED":
        raise ApiError(400, "Repository format must be specified.")
    mode = call.body.get("mode", "STANDARD_REPOSITORY")
    if form != "DOCKER" or mode not in ("STANDARD_REPOSITORY", "MODE_UNSPECIFIED"):
        raise ApiError(501, f"localcloud serves standard DOCKER repositories only, not {form} ({mode})")
    key = f"{_parent(call)}/repositories/{name}"
    if call.store.get(key) is not None:
        raise ApiError(409, "the repository already exists")
    body = call.body | {
        "name": key,
        "mode": "STANDARD_REPOSITORY",
        "createTime": _time(),
        "updateTime": _time(),
        "registryUri": "",
        "vulnerabilityScanningConfig": {
            "enablementState": "SCANNING_DISABLED",
            "enablementStateReason": "API containerscanning.googleapis.com is not enabled.",
        },
    }
    # Google's registry has a host for each location, and this one has one for all.
    prefix = f"{call.project}/{name}"
    taken = {prefix_of(other) for other in call.store.list(REPOSITORY, f"projects/{call.project}/")}
    if prefix in taken:
        prefix += f"__{call.path['location']}"
    record = call.store.put(Record(key, REPOSITORY, body, {"prefix": prefix}))
    return _begin(call, record, "artifactregistry.repositories.create")


@TABLE.task("artifactregistry.repositories.create")
def _do_create(services: Services, arguments: Json) -> Json | None:
    try:
        address = services.backends.ensure_registry()
    except BaseException:
        services.store.delete(arguments["key"])
        raise
    with services.store.transaction():
        record = services.store.get(arguments["key"])
        if record is None:
            return None
        record.body["registryUri"] = f"{address}/{prefix_of(record)}"
        services.store.put(record)
    return record.body | {"@type": f"{_TYPE}{arguments['version']}.Repository"}


def prefix_of(record: Record) -> str:
    """What the names of a repository's images begin with, after the registry's host."""
    prefix: str = record.private.get("prefix") or f"{record.key.split('/')[1]}/{record.name}"
    return prefix


@TABLE.serves("artifactregistry.projects.locations.repositories.get")
def _get(call: Call) -> Json:
    return _sized(call.services, find_repository(call))


def _sized(services: Services, record: Record) -> Json:
    """A repository with the bytes that it takes at the moment; what images share counts once."""
    blobs = {
        blob["digest"]: blob["size"]
        for manifest in services.backends.list_manifests(prefix_of(record))
        for blob in manifest["blobs"]
    }
    return record.body | ({"sizeBytes": str(sum(blobs.values()))} if blobs else {})


@TABLE.serves("artifactregistry.projects.locations.repositories.list")
def _list(call: Call) -> Json:
    items = [_sized(call.services, record) for record in call.store.list(REPOSITORY, f"{_parent(call)}/")]
    return listing(call, "repositories", items)


@TABLE.serves("artifactregistry.projects.locations.repositories.patch")
def _patch(call: Call) -> Json:
    record = find_repository(call)
    update(record.body, call.body, call.query.get("updateMask", ""), _CHANGEABLE)
    record.body["updateTime"] = _time()
    return call.store.put(record).body


@TABLE.serves("artifactregistry.projects.locations.repositories.delete")
def _delete(call: Call) -> Json:
    record = find_repository(call)
    record.private["deleting"] = True
    call.store.put(record)
    return _begin(call, record, "artifactregistry.repositories.delete")


@TABLE.task("artifactregistry.repositories.delete")
def _do_delete(services: Services, arguments: Json) -> Json | None:
    record = services.store.get(arguments["key"])
    if record is not None:
        try:
            services.backends.delete_repository(prefix_of(record))
        except BackendError:
            # It is there, then, and can be used or deleted again.
            record.private.pop("deleting", None)
            services.store.put(record)
            raise
        services.store.delete(record.key)
    return {"@type": "type.googleapis.com/google.protobuf.Empty"}


@TABLE.serves("artifactregistry.projects.locations.repositories.getIamPolicy")
def _get_policy(call: Call) -> Json:
    return get_policy(find_repository(call))


@TABLE.serves("artifactregistry.projects.locations.repositories.setIamPolicy")
def _set_policy(call: Call) -> Json:
    record = find_repository(call)
    return set_policy(
        call, record, REPOSITORY_ROLES, lambda email: find_account(call.store, "-", email) is not None
    )


@TABLE.serves("artifactregistry.projects.locations.repositories.testIamPermissions")
def _test_permissions(call: Call) -> Json:
    return test_permissions(call, find_repository(call))


@TABLE.serves("artifactregistry.projects.locations.get")
def _get_location(call: Call) -> Json:
    return {"name": _parent(call), "locationId": call.path["location"]}


@TABLE.serves("artifactregistry.projects.locations.list")
def _list_locations(call: Call) -> Json:
    items: list[Json] = [
        {"name": f"projects/{call.project}/locations/{name}", "locationId": name} for name in LOCATIONS
    ]
    return listing(call, "locations", items)


def _begin(call: Call, target: Record, task: str) -> Json:
    name = f"{_parent(call)}/operations/{uuid.UUID(bytes=secrets.token_bytes(16), version=4)}"
    version = call.method.document.version
    body: Json = {"name": name, "metadata": {"@type": f"{_TYPE}{version}.OperationMetadata"}}
    record = Record(name, OPERATION, body)
    return call.services.operations.submit(record, target.key, task, {"key": target.key, "version": version})


def finish(body: Json, response: Json | None, error: ApiError | None) -> None:
    """Write an operation's end into its body."""
    body["done"] = True
    if error is not None:
        body["error"] = {"code": 13, "message": error.message}
    else:
        body["response"] = response or {"@type": "type.googleapis.com/google.protobuf.Empty"}


@TABLE.serves("artifactregistry.projects.locations.operations.get")
def _get_operation(call: Call) -> Json:
    record = call.store.get(f"{_parent(call)}/operations/{call.path['operation']}")
    if record is None or record.kind != OPERATION:
        raise ApiError(404, f"Operation {call.path['operation']} not found")
    return record.body


def reconcile(services: Services) -> None:
    """Keep the registry running while there are repositories, and their addresses true."""
    if services.store.list(REPOSITORY):
        services.operations.schedule(REPOSITORY, partial(_restore, services))


def _restore(services: Services) -> None:
    address = services.backends.ensure_registry()
    with services.store.transaction():
        for record in services.store.list(REPOSITORY):
            record.body["registryUri"] = f"{address}/{prefix_of(record)}"
            services.store.put(record)
