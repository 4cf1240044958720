"""What Google offers rather than what users make: projects, regions, zones, machine types, images."""

from __future__ import annotations

import re
from collections.abc import Callable

from localcloud.api.compute.common import aggregated, link, listed
from localcloud.api.errors import invalid_value, not_found
from localcloud.api.iam import default_service_account
from localcloud.api.service import TABLE, Call, stable_id
from localcloud.store import Json

ZONES = {
    "europe-west1": ("b", "c", "d"),
    "europe-west4": ("a", "b", "c"),
    "us-central1": ("a", "b", "c", "f"),
    "us-east1": ("b", "c", "d"),
}
_MACHINES = {
    "e2-micro": (2, 1024),
    "e2-small": (2, 2048),
    "e2-medium": (2, 4096),
    "e2-standard-2": (2, 8192),
    "e2-standard-4": (4, 16384),
    "e2-standard-8": (8, 32768),
    "e2-highcpu-2": (2, 2048),
    "e2-highcpu-4": (4, 4096),
    "n1-standard-1": (1, 3840),
    "n1-standard-2": (2, 7680),
    "n2-standard-2": (2, 8192),
    "n2-standard-4": (4, 16384),
    "n2d-standard-2": (2, 8192),
    "t2d-standard-1": (1, 4096),
    "c3-standard-4": (4, 16384),
}
_CUSTOM = re.compile(
    r"(?:e2|n2|n2d|n1)-custom-(?:micro|small|medium|(\d+))-(\d+)(?:-ext)?|custom-(\d+)-(\d+)"
)
_DISKS = {"pd-standard": "Standard", "pd-balanced": "Balanced", "pd-ssd": "SSD"}
_IMAGES = {
    "debian-cloud": {
        "debian-12": ("debian-12-bookworm-v20260916", "Debian, Debian GNU/Linux, 12 (bookworm), amd64"),
        "debian-13": ("debian-13-trixie-v20260916", "Debian, Debian GNU/Linux, 13 (trixie), amd64"),
    }
}
_IMAGE = re.compile(r"([^/]+)/global/images/([^/]+)$")
_FAMILY = re.compile(r"([^/]+)/(?:global/images/family|zones/[^/]+/imageFamilyViews)/([^/]+)$")
_SHORT_IMAGE = re.compile(r"([^/]+-cloud)/([^/]+)")
_BORN = "2026-09-16T00:00:00.000-07:00"


def region_of(zone: str) -> str:
    return zone.rpartition("-")[0]


def zones() -> list[str]:
    return [f"{region}-{letter}" for region, letters in ZONES.items() for letter in letters]


def check_zone(call: Call) -> str:
    """The call's zone.

    Raises:
        ApiError: 400, Google has no such zone.
    """
    zone = call.path["zone"]
    if zone not in zones():
        raise invalid_value("zone", zone, "Unknown zone.")
    return zone


def check_region(call: Call) -> str:
    region = call.path["region"]
    if region not in ZONES:
        raise invalid_value("region", region, "Unknown region.")
    return region


def _offer(key: str, kind: str, **fields: object) -> Json:
    return {
        "kind": kind,
        "id": stable_id(key),
        "creationTimestamp": _BORN,
        "name": key.rsplit("/", 1)[-1],
        **fields,
        "selfLink": link(key),
    }


def _region(project: str, name: str) -> Json:
    key = f"projects/{project}/regions/{name}"
    places = [link(f"projects/{project}/zones/{name}-{letter}") for letter in ZONES[name]]
    return _offer(key, "compute#region", description=name, status="UP", zones=places, quotas=[])


def _zone(project: str, name: str) -> Json:
    region = link(f"projects/{project}/regions/{region_of(name)}")
    key = f"projects/{project}/zones/{name}"
    return _offer(key, "compute#zone", description=name, status="UP", region=region)


def machine_type(project: str, zone: str, name: str) -> Json | None:
    """Google's description of a machine type, custom ones too; None if there is no such type."""
    size = _MACHINES.get(name)
    custom = _CUSTOM.fullmatch(name)
    if size is None and custom is not None:
        size = int(custom[1] or custom[3] or 2), int(custom[2] or custom[4])
    if size is None:
        return None
    return _offer(
        f"projects/{project}/zones/{zone}/machineTypes/{name}",
        "compute#machineType",
        description=f"{size[0]} vCPUs, {size[1]} MB RAM",
        guestCpus=size[0],
        memoryMb=size[1],
        maximumPersistentDisks=128,
        maximumPersistentDisksSizeGb="263168",
        isSharedCpu=name.startswith("e2-") and size[1] <= 4096,
        architecture="X86_64",
        zone=zone,
    )


def disk_type(project: str, zone: str, name: str) -> Json | None:
    if name not in _DISKS:
        return None
    return _offer(
        f"projects/{project}/zones/{zone}/diskTypes/{name}",
        "compute#diskType",
        description=f"{_DISKS[name]} Persistent Disk",
        validDiskSize="10GB-65536GB",
        defaultDiskSizeGb="100",
        zone=link(f"projects/{project}/zones/{zone}"),
    )


def image(project: str, name: str) -> Json | None:
    for family, (image_name, description) in _IMAGES.get(project, {}).items():
        if image_name == name:
            return _offer(
                f"projects/{project}/global/images/{name}",
                "compute#image",
                description=description,
                sourceType="RAW",
                status="READY",
                archiveSizeBytes="1073741824",
                diskSizeGb="10",
                family=family,
                architecture="X86_64",
                labelFingerprint="42WmSpB8rSM=",
            )
    return None


def family(project: str, name: str) -> Json | None:
    """The newest image of a family."""
    found = _IMAGES.get(project, {}).get(name)
    return image(project, found[0]) if found else None


def find_image(reference: str) -> Json | None:
    """The image that a reference means: `[projects/]P/global/images/[family/]NAME`, gcloud's family view of a
    zone, or Terraform's short `P/NAME`."""
    match = _IMAGE.search(reference) or _FAMILY.search(reference) or _SHORT_IMAGE.fullmatch(reference)
    if match is None:
        return None
    named = None if match.re is _FAMILY else image(match[1], match[2])
    return named or (None if match.re is _IMAGE else family(match[1], match[2]))


def _found(item: Json | None, key: str) -> Json:
    if item is None:
        raise not_found(key)
    return item


@TABLE.serves("compute.projects.get")
def _project_get(call: Call) -> Json:
    key = f"projects/{call.project}"
    return _offer(
        key,
        "compute#project",
        commonInstanceMetadata={"kind": "compute#metadata", "fingerprint": "42WmSpB8rSM="},
        quotas=[],
        defaultServiceAccount=default_service_account(),
        defaultNetworkTier="PREMIUM",
        xpnProjectStatus="UNSPECIFIED_XPN_PROJECT_STATUS",
    )


@TABLE.serves("compute.regions.get")
def _region_get(call: Call) -> Json:
    name = call.path["region"]
    return _found(
        _region(call.project, name) if name in ZONES else None, f"projects/{call.project}/regions/{name}"
    )


@TABLE.serves("compute.regions.list")
def _region_list(call: Call) -> Json:
    items = [_region(call.project, name) for name in ZONES]
    return listed(call, items, "compute#regionList", f"projects/{call.project}/regions")


@TABLE.serves("compute.zones.get")
def _zone_get(call: Call) -> Json:
    name = call.path["zone"]
    return _found(
        _zone(call.project, name) if name in zones() else None, f"projects/{call.project}/zones/{name}"
    )


@TABLE.serves("compute.zones.list")
def _zone_list(call: Call) -> Json:
    items = [_zone(call.project, name) for name in zones()]
    return listed(call, items, "compute#zoneList", f"projects/{call.project}/zones")


def _serve_types(collection: str, names: list[str], describe: Callable[[str, str, str], Json | None]) -> None:
    """Serve get, list and aggregatedList of something that every zone has."""
    kind = f"compute#{collection.removesuffix('s')}"

    @TABLE.serves(f"compute.{collection}.get")
    def _get(call: Call) -> Json:
        name = call.path[collection.removesuffix("s")]
        zone = check_zone(call)
        key = f"projects/{call.project}/zones/{zone}/{collection}/{name}"
        return _found(describe(call.project, zone, name), key)

    @TABLE.serves(f"compute.{collection}.list")
    def _list(call: Call) -> Json:
        zone = check_zone(call)
        items = [item for name in names if (item := describe(call.project, zone, name))]
        return listed(call, items, f"{kind}List", f"projects/{call.project}/zones/{zone}/{collection}")

    @TABLE.serves(f"compute.{collection}.aggregatedList")
    def _aggregated(call: Call) -> Json:
        items = [item for zone in zones() for name in names if (item := describe(call.project, zone, name))]
        scopes = [f"zones/{zone}" for zone in zones()]
        return aggregated(call, items, f"{kind}AggregatedList", collection, scopes)


_serve_types("machineTypes", list(_MACHINES), machine_type)
_serve_types("diskTypes", list(_DISKS), disk_type)


@TABLE.serves("compute.images.get")
def _image_get(call: Call) -> Json:
    key = f"projects/{call.project}/global/images/{call.path['image']}"
    return _found(image(call.project, call.path["image"]), key)


@TABLE.serves("compute.images.getFromFamily")
def _image_family(call: Call) -> Json:
    key = f"projects/{call.project}/global/images/family/{call.path['family']}"
    return _found(family(call.project, call.path["family"]), key)


@TABLE.serves("compute.imageFamilyViews.get")
def _image_family_view(call: Call) -> Json:
    return {"image": _image_family(call)}


@TABLE.serves("compute.images.list")
def _image_list(call: Call) -> Json:
    items = [item for name in _IMAGES.get(call.project, {}) if (item := family(call.project, name))]
    return listed(call, items, "compute#imageList", f"projects/{call.project}/global/images")


PUBLIC_PROJECTS = frozenset(_IMAGES)
"""Projects of Google's own whose images everyone may read."""
