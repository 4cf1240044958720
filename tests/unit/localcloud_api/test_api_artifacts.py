"""What is in a repository, as Artifact Registry names it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.localcloud_api.client import LOCATION, REPOSITORIES, Client

APP = f"{REPOSITORIES}/app"
NAME = f"{LOCATION}/repositories/app"
LAYER = {"digest": "sha256:" + "a" * 64, "size": 100}


def _manifest(path: str, digit: str, tags: list[str], day: int) -> dict[str, Any]:
    digest = "sha256:" + digit * 64
    return {
        "name": f"localcloud-dev/app/{path}",
        "digest": digest,
        "tags": tags,
        "size": 100,
        "blobs": [{"digest": digest, "size": 7}, LAYER],
        "media_type": "application/vnd.oci.image.manifest.v1+json",
        "uploaded": f"2026-01-0{day}T00:00:00+00:00",
    }


@pytest.fixture(autouse=True)
def images(client: Client) -> None:
    """Two versions of `a/b`, one of `c`, which share a layer."""
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    client.backends.manifests = [
        _manifest("a/b", "1", ["v1"], 1),
        _manifest("a/b", "2", ["v2", "latest"], 2),
        _manifest("c", "3", [], 3),
    ]


def test_a_repository_may_have_the_name_of_one_in_another_location(client: Client) -> None:
    """On Google each location has a host of its own; here the images' names tell them apart."""
    there = REPOSITORIES.replace("europe-west1", "us-east1")
    client.done_registry(client.ok("POST", there, {"format": "DOCKER"}, query="repositoryId=app"))
    uris = [client.ok("GET", path)["registryUri"] for path in (APP, f"{there}/app")]
    assert uris[0].endswith("/localcloud-dev/app")
    assert uris[1].endswith("/localcloud-dev/app__us-east1")
    client.done_registry(client.ok("DELETE", APP))
    assert ("delete_repository", "localcloud-dev/app") in client.backends.calls
    assert client.ok("GET", f"{there}/app")["registryUri"] == uris[1]
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    assert client.ok("GET", APP)["registryUri"] == uris[0]


def test_packages_versions_and_tags_are_those_of_the_registry(client: Client) -> None:
    packages = client.ok("GET", f"{APP}/packages")["packages"]
    assert [item["name"] for item in packages] == [f"{NAME}/packages/a%2Fb", f"{NAME}/packages/c"]
    assert packages[0]["createTime"] < packages[0]["updateTime"]
    assert client.ok("GET", f"{APP}/packages/a%2Fb") == packages[0]
    versions = client.ok("GET", f"{APP}/packages/a%2Fb/versions")["versions"]
    assert [item["name"].rpartition(":")[2][0] for item in versions] == ["1", "2"]
    assert versions[0]["metadata"]["imageSizeBytes"] == "100"
    assert client.ok("GET", f"/artifactregistry/v1/{versions[0]['name']}") == versions[0]
    full = client.ok("GET", f"{APP}/packages/a%2Fb/versions", query="view=FULL")["versions"]
    assert [tag["name"].rpartition("/")[2] for tag in full[1]["relatedTags"]] == ["v2", "latest"]
    tags = client.ok("GET", f"{APP}/packages/a%2Fb/tags")["tags"]
    assert {tag["name"].rpartition("/")[2]: tag["version"].rpartition(":")[2][0] for tag in tags} == {
        "v1": "1",
        "v2": "2",
        "latest": "2",
    }
    assert client.ok("GET", f"{APP}/packages/a%2Fb/tags/v1") in tags
    assert client.ok("GET", f"{APP}/packages/c/tags") == {}


def test_files_are_blobs_and_a_shared_one_counts_once(client: Client) -> None:
    files = client.ok("GET", f"{APP}/files")["files"]
    assert len(files) == 4
    assert {item["sizeBytes"] for item in files} == {"7", "100"}
    assert client.ok("GET", f"/artifactregistry/v1/{files[0]['name']}") == files[0]
    assert client.ok("GET", APP)["sizeBytes"] == str(3 * 7 + 100)
    assert client.ok("GET", REPOSITORIES)["repositories"][0]["sizeBytes"] == "121"


def test_pages_and_filters_hold_for_what_is_in_a_repository(client: Client) -> None:
    first = client.ok("GET", f"{APP}/dockerImages", query="pageSize=2")
    rest = client.ok("GET", f"{APP}/dockerImages", query=f"pageSize=2&pageToken={first['nextPageToken']}")
    assert len(first["dockerImages"]) == 2
    assert len(rest["dockerImages"]) == 1
    owner = client.ok("GET", f"{APP}/packages/c/versions")["versions"][0]["name"]
    mine = client.ok("GET", f"{APP}/files", query=f'filter=owner="{owner}"')["files"]
    assert [item["sizeBytes"] for item in mine] == ["7"]


@pytest.mark.parametrize(
    "path",
    ["packages/none", "packages/none/versions", "packages/a%2Fb/tags/none", "files/none", "packages/a/tags"],
)
def test_what_is_not_there_is_404(client: Client, path: str) -> None:
    client.error(404, "GET", f"{APP}/{path}")
