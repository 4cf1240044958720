"""The work behind instances: what the operations do with the processes that stand for machines."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial

from localcloud.api.compute import ranges
from localcloud.api.compute.common import key_of
from localcloud.api.errors import ApiError, reason
from localcloud.api.service import TABLE, Services, now
from localcloud.specs import BackendError, InstanceSpec
from localcloud.store import Json, Record

INSTANCE = "compute.instances"
# Of a record: what it stands for ran when localcloud was stopped, could not be started with it, and is to be
# tried at its next start.
_NOT_RESTORED = "notRestored"

logger = logging.getLogger("localcloud.machines")


def instance_spec(record: Record) -> InstanceSpec:
    """What the backend is told about an instance."""
    _, project, _, zone, _, name = record.key.split("/")
    account: Json = next(iter(record.body.get("serviceAccounts", [])), {})
    aliases = ranges.aliases(record.body["networkInterfaces"][0])
    return InstanceSpec(
        name=name,
        project=project,
        zone=zone,
        id=record.body["id"],
        ip=record.private["ip"],
        hostname=record.body.get("hostname") or f"{name}.c.{project}.internal",
        service_account_email=account.get("email", ""),
        scopes=tuple(account.get("scopes", [])),
        metadata={item["key"]: item.get("value", "") for item in record.body["metadata"].get("items", [])},
        machine_type=record.body["machineType"].rpartition("/")[2],
        alias_ranges=tuple(alias["ipCidrRange"] for alias in aliases),
    )


def _boot(services: Services, record: Record) -> None:
    """Start a machine. Of one that cannot be started nothing goes on running, and it is shown as stopped."""
    try:
        services.backends.start_instance(instance_spec(record))
    except Exception as error:
        with suppress(BackendError):
            services.backends.stop_instance(instance_spec(record))
        _change(services, record.key, status="TERMINATED", statusMessage=reason(error))
        raise


def _change(services: Services, key: str, **fields: str) -> Record | None:
    """Set fields of an instance's body, if it is still there."""
    with services.store.transaction():
        record = services.store.get(key)
        if record is not None:
            record.body.pop("statusMessage", None)
            record.private.pop(_NOT_RESTORED, None)
            record.body |= fields
            services.store.put(record)
    return record


@TABLE.task("compute.instances.create")
def _create(services: Services, arguments: Json) -> None:
    """Start a new machine; one that cannot be started leaves nothing behind, as on Google."""
    key = arguments["key"]
    try:
        _start(services, arguments)
    except Exception as error:
        _delete(services, arguments)
        raise ApiError(
            503, f"The instance '{key}' could not be started: {reason(error)}", reason="internalError"
        ) from error


@TABLE.task("compute.instances.start")
def _start(services: Services, arguments: Json) -> None:
    record = services.store.get(arguments["key"])
    if record is None or record.body["status"] == "RUNNING":
        return
    record = _change(services, record.key, status="STAGING") or record
    _boot(services, record)
    _change(services, record.key, status="RUNNING", lastStartTimestamp=now())


@TABLE.task("compute.instances.stop")
def _stop(services: Services, arguments: Json) -> None:
    record = services.store.get(arguments["key"])
    if record is None or record.body["status"] == "TERMINATED":
        if record is not None and record.private.get(_NOT_RESTORED):
            _change(services, record.key)
        return
    services.backends.stop_instance(instance_spec(record))
    _change(services, record.key, status="TERMINATED", lastStopTimestamp=now())


@TABLE.task("compute.instances.reset")
def _reset(services: Services, arguments: Json) -> None:
    record = services.store.get(arguments["key"])
    if record is not None:
        services.backends.stop_instance(instance_spec(record))
        _boot(services, record)
        _change(services, record.key, lastStartTimestamp=now())


@TABLE.task("compute.instances.delete")
def _delete(services: Services, arguments: Json) -> None:
    """End the machine first and forget it afterwards: after a crash in between the work is still known."""
    record = services.store.get(arguments["key"])
    if record is None:
        return
    try:
        services.backends.delete_instance(instance_spec(record))
    except Exception as error:
        # It is there, then, and can be deleted again.
        record.private["deleting"] = False
        services.store.put(record)
        _change(services, record.key, status="TERMINATED", statusMessage=reason(error))
        raise
    with services.store.transaction():
        for disk in record.body["disks"]:
            _release_disk(services, disk)
        for address in services.store.list("compute.addresses", f"projects/{record.key.split('/')[1]}/"):
            if record.body["selfLink"] in address.body.get("users", []):
                del address.body["users"]
                address.body["status"] = "RESERVED"
                services.store.put(address)
        services.store.delete(record.key)


@TABLE.task("compute.instances.changeAliasRanges")
def _change_alias_ranges(services: Services, arguments: Json) -> None:
    """The machine has the new ranges before its record does, and so before its metadata server shows them."""
    record = services.store.get(arguments["key"])
    if record is None or ranges.CHANGING not in record.private:
        return
    wanted: list[Json] = record.private[ranges.CHANGING]
    changed = False
    try:
        if record.body["status"] == "RUNNING":
            services.backends.change_alias_ranges(
                instance_spec(record), tuple(alias["ipCidrRange"] for alias in wanted)
            )
        changed = True
    finally:
        with services.store.transaction():
            record = services.store.get(record.key) or record
            del record.private[ranges.CHANGING]
            if changed:
                ranges.give(record.body["networkInterfaces"][0], wanted)
            services.store.put(record)


def _release_disk(services: Services, attached: Json) -> None:
    if attached["autoDelete"]:
        services.store.delete(key_of(attached["source"]))
        return
    disk = services.store.get(key_of(attached["source"]))
    if disk is not None:
        disk.body.pop("users", None)
        disk.body["lastDetachTimestamp"] = now()
        services.store.put(disk)


def reconcile(services: Services) -> None:
    """Make every machine that should run do so; one that cannot is shown as stopped."""
    for record in services.store.list(INSTANCE):
        services.operations.schedule(record.key, partial(_restore, services, record.key))


def _restore(services: Services, key: str) -> None:
    record = services.store.get(key)
    if record is None or (record.body["status"] != "RUNNING" and _NOT_RESTORED not in record.private):
        return
    try:
        _boot(services, record)
    except Exception:  # the record says why: see _boot
        logger.exception("instance %s could not be started again", record.name)
        with services.store.transaction():
            record = services.store.get(key)
            if record is not None:
                record.private[_NOT_RESTORED] = True
                services.store.put(record)
    else:
        _change(services, key, status="RUNNING")
