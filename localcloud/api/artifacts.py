"""What is in a repository, as Artifact Registry names it: packages, versions, tags, files and images.

A package is an image's name, a version one of its manifests, a file a blob. All of it is what the registry
has at the moment.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from urllib.parse import quote

from localcloud.api.artifactregistry import find_repository, prefix_of
from localcloud.api.errors import ApiError
from localcloud.api.listing import listing
from localcloud.api.service import TABLE, Call
from localcloud.store import Json, Record

_REPOSITORIES = "artifactregistry.projects.locations.repositories"
_FULL = "FULL"


def _manifests(call: Call, record: Record) -> list[Json]:
    """The repository's manifests, each with `path`, its name within the repository."""
    prefix = prefix_of(record)
    return [
        manifest | {"path": manifest["name"].removeprefix(f"{prefix}/")}
        for manifest in call.services.backends.list_manifests(prefix)
    ]


def _package(record: Record, manifest: Json) -> str:
    return f"{record.key}/packages/{quote(manifest['path'], safe='')}"


def _version(record: Record, manifest: Json) -> str:
    return f"{_package(record, manifest)}/versions/{manifest['digest']}"


def _images(call: Call, record: Record) -> list[Json]:
    images = []
    for manifest in _manifests(call, record):
        reference = f"{manifest['path']}@{manifest['digest']}"
        images.append(
            {
                "name": f"{record.key}/dockerImages/{quote(reference, safe='@:')}",
                "uri": f"{record.body['registryUri']}/{reference}",
                "tags": manifest["tags"],
                "imageSizeBytes": str(manifest["size"]),
                "mediaType": manifest["media_type"],
                "uploadTime": manifest["uploaded"],
                "updateTime": manifest["uploaded"],
            }
        )
    return images


def _packages(call: Call, record: Record) -> list[Json]:
    found: dict[str, Json] = {}
    for manifest in _manifests(call, record):
        name, time = _package(record, manifest), manifest["uploaded"]
        package = found.setdefault(
            name, {"name": name, "displayName": manifest["path"], "createTime": time, "updateTime": time}
        )
        package["createTime"] = min(package["createTime"], time)
        package["updateTime"] = max(package["updateTime"], time)
    return list(found.values())


def _versions(call: Call, record: Record) -> list[Json]:
    versions = []
    for manifest in _manifests(call, record):
        name, time = _version(record, manifest), manifest["uploaded"]
        body: Json = {
            "name": name,
            "createTime": time,
            "updateTime": time,
            "metadata": {
                "name": f"{record.key}/dockerImages/{quote(manifest['path'], safe='')}@{manifest['digest']}",
                "imageSizeBytes": str(manifest["size"]),
                "mediaType": manifest["media_type"],
            },
        }
        if call.query.get("view") == _FULL and manifest["tags"]:
            tags = [f"{_package(record, manifest)}/tags/{tag}" for tag in manifest["tags"]]
            body["relatedTags"] = [{"name": tag, "version": name} for tag in tags]
        versions.append(body)
    return versions


def _tags(call: Call, record: Record) -> list[Json]:
    return [
        {"name": f"{_package(record, manifest)}/tags/{tag}", "version": _version(record, manifest)}
        for manifest in _manifests(call, record)
        for tag in manifest["tags"]
    ]


def _hashes(digest: str) -> list[Json]:
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256":
        return []
    return [{"type": "SHA256", "value": base64.b64encode(bytes.fromhex(value)).decode()}]


def _files(call: Call, record: Record) -> list[Json]:
    files: dict[str, Json] = {}
    for manifest in _manifests(call, record):
        for blob in manifest["blobs"]:
            name = f"{record.key}/files/{quote(blob['digest'], safe='')}"
            files.setdefault(
                name,
                {
                    "name": name,
                    "sizeBytes": str(blob["size"]),
                    "hashes": _hashes(blob["digest"]),
                    "owner": _version(record, manifest),
                    "createTime": manifest["uploaded"],
                    "updateTime": manifest["uploaded"],
                },
            )
    return list(files.values())


def _serve(collection: str, items: Callable[[Call, Record], list[Json]], within: str = "") -> None:
    """Serve get and list of a collection; of one that is below packages, those of the call's package."""
    prefix = f"{_REPOSITORIES}.{within}{collection}"
    field = collection.removesuffix("s")

    def parent(call: Call, record: Record) -> str:
        if not within:
            return record.key
        package = f"{record.key}/packages/{quote(call.path['package'], safe='')}"
        if not any(item["name"] == package for item in _packages(call, record)):
            raise ApiError(404, f"Package {package} not found")
        return package

    @TABLE.serves(f"{prefix}.list")
    def _list(call: Call) -> Json:
        record = find_repository(call)
        above = parent(call, record)
        found = [item for item in items(call, record) if item["name"].startswith(f"{above}/{collection}/")]
        return listing(call, collection, found)

    @TABLE.serves(f"{prefix}.get")
    def _get(call: Call) -> Json:
        record = find_repository(call)
        safe = "@:" if collection == "dockerImages" else ":" if collection == "versions" else ""
        name = f"{parent(call, record)}/{collection}/{quote(call.path[field], safe=safe)}"
        for item in items(call, record):
            if item["name"] == name:
                return item
        raise ApiError(404, f"{field[:1].upper()}{field[1:]} {name} not found")


_serve("dockerImages", _images)
_serve("packages", _packages)
_serve("versions", _versions, "packages.")
_serve("tags", _tags, "packages.")
_serve("files", _files)
