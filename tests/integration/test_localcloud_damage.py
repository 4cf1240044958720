"""A full disk and damaged files: what fails says why, can be deleted, and leaves the rest alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from localcloud.backends.processes import marked
from tests.integration.conftest import Localcloud, make_localcloud
from tests.waiting import until

PROJECT, ZONE = "localcloud-dev", "europe-west1-b"
INSTANCES = f"/compute/v1/projects/{PROJECT}/zones/{ZONE}/instances"
CLUSTERS = f"/container/v1/projects/{PROJECT}/locations/{ZONE}/clusters"
CLUSTER = {"cluster": {"name": "c1", "initialNodeCount": 1}}
INSTANCE = {
    "name": "vm",
    "machineType": f"zones/{ZONE}/machineTypes/e2-small",
    "disks": [
        {
            "boot": True,
            "autoDelete": True,
            "initializeParams": {"sourceImage": "projects/debian-cloud/global/images/family/debian-12"},
        }
    ],
    "networkInterfaces": [{"network": "global/networks/default"}],
}
MIB = 2**20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Localcloud]:
    """A localcloud that runs on a disk of 96 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small disk that this test fills")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=700", "tmpfs", disk], check=True)
    cloud = make_localcloud(disk)
    try:
        cloud.command("start")
        yield cloud
        cloud.command("stop")
        assert marked(f"{cloud.home}#") == []
    finally:
        cloud.command("stop", check=False)
        subprocess.run(["umount", disk], check=True)


def _fill(cloud: Localcloud, left: int = 0) -> Path:
    """Leave so many bytes of the disk."""
    filler = cloud.home.parent / "filler"
    space = os.statvfs(cloud.home)
    size = space.f_bavail * space.f_frsize - left
    with filler.open("wb", buffering=0) as file:
        if left:
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # to the last byte, whoever else writes meanwhile
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
    return filler


def _ended(cloud: Localcloud, operation: dict[str, Any]) -> dict[str, Any]:
    """A cluster operation when it is done."""
    path = f"/container/v1/projects/{PROJECT}/locations/{ZONE}/operations/{operation['name']}"

    def done() -> dict[str, Any] | None:
        body: dict[str, Any] = cloud.request("GET", path).json()
        return body if body["status"] == "DONE" else None

    return until(done, "the operation to end", timeout=200)


@pytest.mark.parametrize("left", [0, 16 * MIB], ids=["for anything", "for etcd"])
def test_a_cluster_for_which_there_is_no_space_is_in_error_and_can_be_deleted(
    small: Localcloud, left: int
) -> None:
    filler = _fill(small, left)
    ended = _ended(small, small.request("POST", CLUSTERS, CLUSTER).json())
    assert "no space left" in str(ended["error"]).lower()
    body = small.request("GET", f"{CLUSTERS}/c1").json()
    assert body["status"] == "ERROR"
    assert "no space left" in body["statusMessage"].lower()
    assert marked(f"{small.home}#clusters/c1#") == []
    assert "error" not in _ended(small, small.request("DELETE", f"{CLUSTERS}/c1").json())
    assert small.request("GET", f"{CLUSTERS}/c1").status_code == 404
    assert not (small.home / "clusters/c1").exists()
    filler.unlink()


def test_a_vm_for_which_there_is_no_space_leaves_nothing_and_one_that_runs_can_be_deleted(
    small: Localcloud,
) -> None:
    small.done(small.request("POST", INSTANCES, INSTANCE).json())
    filler = _fill(small)
    operation = small.request("POST", INSTANCES, INSTANCE | {"name": "other"}).json()
    ended = small.request("POST", f"{urlsplit(operation['selfLink']).path}/wait").json()
    assert "No space left" in str(ended["error"])
    assert small.request("GET", f"{INSTANCES}/other").status_code == 404
    assert small.request("GET", f"{INSTANCES}/vm").json()["status"] == "RUNNING"
    small.done(small.request("DELETE", f"{INSTANCES}/vm").json())
    assert marked(f"{small.home}#instances/") == []
    filler.unlink()
    small.done(small.request("POST", INSTANCES, INSTANCE).json())


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Localcloud]:
    """A localcloud of the test's own."""
    cloud = make_localcloud(tmp_path)
    try:
        cloud.command("start")
        yield cloud
    finally:
        cloud.command("reset")
    assert marked(f"{cloud.home}#") == []


def test_a_vm_whose_files_are_damaged_is_stopped_with_the_reason_and_can_be_deleted(
    fresh: Localcloud,
) -> None:
    names = {
        "ports.json": b"{",
        "instance.json": b"\xff\xfe",
        "bin/systemctl": b"",
    }
    for index, (name, content) in enumerate(names.items()):
        fresh.done(fresh.request("POST", INSTANCES, INSTANCE | {"name": f"vm-{index}"}).json())
        (fresh.home / "instances" / f"vm-{index}" / name).write_bytes(content)
    fresh.command("stop")
    fresh.command("start")
    found = [fresh.request("GET", f"{INSTANCES}/vm-{index}").json() for index in range(len(names))]
    assert found[0]["status"] == "TERMINATED"
    assert "ports.json is damaged" in found[0]["statusMessage"]
    # What can be made anew is.
    assert [body["status"] for body in found[1:]] == ["RUNNING", "RUNNING"]
    for index in range(len(names)):
        fresh.done(fresh.request("DELETE", f"{INSTANCES}/vm-{index}").json())


def test_a_cluster_whose_files_are_damaged_is_in_error_with_the_reason_and_can_be_deleted(
    fresh: Localcloud,
) -> None:
    _ended(fresh, fresh.request("POST", CLUSTERS, CLUSTER).json())
    assert fresh.request("GET", f"{CLUSTERS}/c1").json()["status"] == "RUNNING"
    data = fresh.home / "clusters/c1/etcd/member/snap/db"
    good = data.read_bytes()
    fresh.command("stop")
    data.write_text("damaged")
    fresh.command("start")
    body = fresh.request("GET", f"{CLUSTERS}/c1").json()
    assert body["status"] == "ERROR"
    assert "etcd ends again and again" in body["statusMessage"]
    assert marked(f"{fresh.home}#clusters/c1#") == []
    fresh.command("stop")
    data.write_bytes(good)
    fresh.command("start")
    body = fresh.request("GET", f"{CLUSTERS}/c1").json()
    assert body["status"] == "RUNNING"
    assert "statusMessage" not in body
    fresh.command("stop")
    (fresh.home / "clusters/c1/pki/ca.key").write_text("damaged")
    fresh.command("start")
    assert "error" not in _ended(fresh, fresh.request("DELETE", f"{CLUSTERS}/c1").json())
    assert not (fresh.home / "clusters/c1").exists()
