"""Boot disks: the records that instances bring with them."""

from __future__ import annotations

import re

from localcloud.api.compute.catalog import check_zone, disk_type, find_image, zones
from localcloud.api.compute.common import (
    NAME,
    aggregated,
    begin,
    key_of,
    link,
    listed,
    new_body,
    require,
    resolve,
)
from localcloud.api.errors import already_exists, in_use, invalid_value, not_found
from localcloud.api.service import TABLE, Call, fingerprint, now
from localcloud.store import Json, Record

DISK = "compute.disks"


def attach_boot_disk(call: Call, instance: Record) -> None:
    """Check the instance's disks, make the boot disk's record and replace the request's by what Google shows.

    Raises:
        ApiError: 400 or 404, Google would refuse them; 409, a disk of that name is there.
    """
    zone = check_zone(call)
    disks: list[Json] = instance.body.get("disks", [])
    if not disks:
        raise invalid_value("resource.disks", "", "No disks are specified.")
    boot = disks[0]
    if not boot.get("boot") or len(disks) > 1 or "initializeParams" not in boot:
        raise invalid_value(
            "resource.disks", "", "localcloud serves exactly one disk: a new boot disk with initializeParams."
        )
    params = boot["initializeParams"]
    image = find_image(params.get("sourceImage", ""))
    if image is None:
        raise invalid_value(
            "resource.disks[0].initializeParams.sourceImage",
            params.get("sourceImage", ""),
            "The referenced image resource cannot be found.",
        )
    kind = resolve(
        call, params.get("diskType", "pd-standard"), f"projects/{call.project}/zones/{zone}/diskTypes"
    ).rpartition("/")[2]
    if disk_type(call.project, zone, kind) is None:
        raise not_found(f"projects/{call.project}/zones/{zone}/diskTypes/{kind}")
    size = int(params.get("diskSizeGb", image["diskSizeGb"]))
    if size < int(image["diskSizeGb"]):
        raise invalid_value(
            "resource.disks[0].initializeParams.diskSizeGb",
            size,
            f"Requested disk size cannot be smaller than the image size ({image['diskSizeGb']} GB)",
        )
    name = params.get("diskName", instance.name)
    if not re.fullmatch(NAME, name):
        raise invalid_value(
            "resource.disks[0].initializeParams.diskName", name, f"Must be a match of regex '{NAME}'"
        )
    key = f"projects/{call.project}/zones/{zone}/disks/{name}"
    if call.store.get(key) is not None:
        raise already_exists(key)
    body = new_body(key, "compute#disk") | {
        "sizeGb": str(size),
        "status": "READY",
        "sourceImage": image["selfLink"],
        "sourceImageId": image["id"],
        "type": link(f"projects/{call.project}/zones/{zone}/diskTypes/{kind}"),
        "licenses": [],
        "lastAttachTimestamp": now(),
        "labels": params.get("labels", {}),
        "labelFingerprint": fingerprint(params.get("labels", {})),
        "users": [link(instance.key)],
        "physicalBlockSizeBytes": "4096",
        "architecture": "X86_64",
        "enableConfidentialCompute": False,
    }
    call.store.put(Record(key, DISK, body))
    instance.body["disks"] = [
        {
            "kind": "compute#attachedDisk",
            "type": "PERSISTENT",
            "mode": boot.get("mode", "READ_WRITE"),
            "source": link(key),
            "deviceName": boot.get("deviceName", "persistent-disk-0"),
            "index": 0,
            "boot": True,
            "autoDelete": boot.get("autoDelete", False),
            "interface": boot.get("interface", "SCSI"),
            "diskSizeGb": str(size),
            "architecture": "X86_64",
        }
    ]


@TABLE.serves("compute.disks.get")
def _get(call: Call) -> Json:
    return require(
        call.store, f"projects/{call.project}/zones/{check_zone(call)}/disks/{call.path['disk']}"
    ).body


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
    record = require(
        call.store, f"projects/{call.project}/zones/{check_zone(call)}/disks/{call.path['disk']}"
    )
    for user in record.body["users"]:
        raise in_use(record.key, key_of(user))
    call.store.delete(record.key)
    return begin(call, "delete", record)
