"""Disks: records; those that instances boot from, and come with."""

from __future__ import annotations

import re

from localcloud.api.compute.catalog import check_zone, disk_type, find_image, zones
from localcloud.api.compute.common import (
    NAME,
    aggregated,
    begin,
    check_labels,
    check_new,
    key_of,
    link,
    listed,
    new_body,
    require,
    resolve,
    set_labels,
)
from localcloud.api.errors import ApiError, already_exists, in_use, invalid_value, not_found
from localcloud.api.service import TABLE, Call, fingerprint, now
from localcloud.store import Json, Record

DISK = "compute.disks"
_BLANK_GB = 500
"""Google's size of a pd-standard that says none."""
_LARGEST_GB = 65536


def attach_boot_disk(call: Call, instance: Record) -> None:
    """Check the instance's disks, make or take its boot disk, and say of it what Google shows.

    Raises:
        ApiError: 400 or 404, Google would refuse them; 409, a disk of that name is there.
    """
    disks: list[Json] = instance.body.get("disks", [])
    if not disks:
        raise invalid_value("resource.disks", "", "No disks are specified.")
    boot = disks[0]
    if not boot.get("boot") or len(disks) > 1 or ("initializeParams" in boot) == ("source" in boot):
        raise invalid_value(
            "resource.disks",
            "",
            "localcloud serves exactly one disk: a boot disk that is there (source), or a new one "
            "(initializeParams).",
        )
    disk = _existing(call, boot["source"]) if "source" in boot else _new_boot_disk(call, instance, boot)
    disk.body |= {"users": [link(instance.key)], "lastAttachTimestamp": now()}
    call.store.put(disk)
    instance.body["disks"] = [
        {
            "kind": "compute#attachedDisk",
            "type": "PERSISTENT",
            "mode": boot.get("mode", "READ_WRITE"),
            "source": link(disk.key),
            "deviceName": boot.get("deviceName", "persistent-disk-0"),
            "index": 0,
            "boot": True,
            "autoDelete": boot.get("autoDelete", False),
            "interface": boot.get("interface", "SCSI"),
            "diskSizeGb": disk.body["sizeGb"],
            "architecture": "X86_64",
        }
    ]


def _existing(call: Call, reference: str) -> Record:
    disk = require(call.store, resolve(call, reference, _parent(call)))
    if not disk.key.startswith(f"{_parent(call)}/"):
        raise invalid_value("resource.disks[0].source", reference, "The disk must be in the instance's zone.")
    for user in disk.body.get("users", []):
        raise in_use(disk.key, key_of(user))
    return disk


def _new_boot_disk(call: Call, instance: Record, boot: Json) -> Record:
    params, field = boot["initializeParams"], "resource.disks[0].initializeParams"
    name = params.get("diskName", instance.name)
    if not re.fullmatch(NAME, name):
        raise invalid_value(f"{field}.diskName", name, f"Must be a match of regex '{NAME}'")
    key = f"{_parent(call)}/{name}"
    if call.store.get(key) is not None:
        raise already_exists(key)
    source = params.get("sourceImage", "")
    return _new_disk(
        call, key, source, params.get("diskSizeGb"), params | {"type": params.get("diskType")}, field
    )


def _new_disk(  # noqa: PLR0917
    call: Call, key: str, source: str | None, size: str | None, given: Json, field: str
) -> Record:
    """A disk's record: of an image, or a blank one (`source` is None).

    Raises:
        ApiError: 400 or 404, Google would refuse it.
    """
    image = find_image(source) if source is not None else None
    if source is not None and image is None:
        raise invalid_value(f"{field}.sourceImage", source, "The referenced image resource cannot be found.")
    zone = f"projects/{call.project}/zones/{check_zone(call)}"
    kind = resolve(call, given.get("type") or "pd-standard", f"{zone}/diskTypes")
    if disk_type(call.project, check_zone(call), kind.rpartition("/")[2]) is None:
        raise not_found(kind)
    least = int(image["diskSizeGb"]) if image else 1
    gigabytes = int(size) if size is not None else (least if image else _BLANK_GB)
    if gigabytes < least:
        raise invalid_value(
            f"{field}.diskSizeGb",
            gigabytes,
            f"Requested disk size cannot be smaller than the image size ({least} GB)",
        )
    _check_largest(gigabytes, f"{field}.diskSizeGb")
    check_labels(given.get("labels", {}), f"{field}.labels")
    body = new_body(key, "compute#disk") | {
        "sizeGb": str(gigabytes),
        "status": "READY",
        "type": link(kind),
        "licenses": [],
        "labels": given.get("labels", {}),
        "labelFingerprint": fingerprint(given.get("labels", {})),
        "physicalBlockSizeBytes": given.get("physicalBlockSizeBytes", "4096"),
        "architecture": "X86_64",
        "enableConfidentialCompute": False,
    }
    if image is not None:
        body |= {"sourceImage": image["selfLink"], "sourceImageId": image["id"]}
    return Record(key, DISK, body)


def _check_largest(gigabytes: int, field: str) -> None:
    if gigabytes > _LARGEST_GB:
        raise invalid_value(field, gigabytes, f"Disk size cannot be larger than {_LARGEST_GB} GB.")


def _parent(call: Call) -> str:
    return f"projects/{call.project}/zones/{check_zone(call)}/disks"


def _find(call: Call) -> Record:
    # Google's documents call it `resource` in one place.
    return require(call.store, f"{_parent(call)}/{call.path.get('disk') or call.path['resource']}")


@TABLE.serves("compute.disks.insert")
def _insert(call: Call) -> Json:
    key = check_new(call, _parent(call))
    if "sourceSnapshot" in call.body or "sourceDisk" in call.body:
        raise ApiError(501, "localcloud makes disks of images, and blank ones")
    source = call.query.get("sourceImage") or call.body.get("sourceImage")
    record = _new_disk(call, key, source, call.body.get("sizeGb"), call.body, "resource")
    record.body = {"description": "", **call.body, **record.body}
    call.store.put(record)
    return begin(call, "insert", record)


@TABLE.serves("compute.disks.resize")
def _resize(call: Call) -> Json:
    record = _find(call)
    size, existing = call.body.get("sizeGb", "0"), record.body["sizeGb"]
    if int(size) <= int(existing):
        raise invalid_value(
            "sizeGb", size, f"New disk size '{size}' must be larger than existing size '{existing}'."
        )
    _check_largest(int(size), "sizeGb")
    record.body["sizeGb"] = size
    call.store.put(record)
    for user in record.body.get("users", []):
        instance = call.store.get(key_of(user))
        if instance is not None:
            for attached in instance.body["disks"]:
                if attached["source"] == record.body["selfLink"]:
                    attached["diskSizeGb"] = size
            call.store.put(instance)
    return begin(call, "resizeDisk", record)


@TABLE.serves("compute.disks.setLabels")
def _set_labels(call: Call) -> Json:
    return set_labels(call, _find(call))


@TABLE.serves("compute.disks.get")
def _get(call: Call) -> Json:
    return _find(call).body


@TABLE.serves("compute.disks.list")
def _list(call: Call) -> Json:
    path = f"projects/{call.project}/zones/{check_zone(call)}/disks"
    return listed(
        call, [record.body for record in call.store.list(DISK, f"{path}/")], "compute#diskList", path
    )


@TABLE.serves("compute.disks.aggregatedList")
def _aggregated(call: Call) -> Json:
    items = [record.body for record in call.store.list(DISK, f"projects/{call.project}/")]
    return aggregated(
        call, items, "compute#diskAggregatedList", "disks", [f"zones/{zone}" for zone in zones()]
    )


@TABLE.serves("compute.disks.delete")
def _delete(call: Call) -> Json:
    record = _find(call)
    for user in record.body.get("users", []):
        raise in_use(record.key, key_of(user))
    call.store.delete(record.key)
    return begin(call, "delete", record)
