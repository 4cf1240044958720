"""A localcloud is kept, changed, and put back as it was."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localcloud.backends.processes import marked
from tests.integration.conftest import Localcloud, make_localcloud
from tests.waiting import until

ZONE = "europe-west1-b"
INSTANCES = f"/compute/v1/projects/localcloud-dev/zones/{ZONE}/instances"
SCRIPT = '#!/bin/sh\necho boot >> "$PREFIX/../../var/lib/boots"\n'
INSTANCE: dict[str, Any] = {
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
    "metadata": {"items": [{"key": "startup-script", "value": SCRIPT}]},
}


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Localcloud]:
    """A localcloud with one VM that has booted."""
    cloud = make_localcloud(tmp_path)
    try:
        cloud.command("start")
        cloud.trust(SCRIPT)
        cloud.done(cloud.request("POST", INSTANCES, INSTANCE).json())
        _wait_for_boots(cloud, 1)
        yield cloud
    finally:
        cloud.command("reset", check=False)
    assert marked(f"{cloud.home}#") == []


def _wait_for_boots(cloud: Localcloud, count: int) -> None:
    boots = cloud.home / "instances/vm/var/lib/boots"
    until(lambda: boots.read_text().split() == ["boot"] * count, f"boot {count} of the VM")


def test_a_snapshot_brings_back_resources_disks_and_keys(cloud: Localcloud) -> None:
    before = cloud.request("GET", f"{INSTANCES}/vm").json()
    assert "there is no snapshot" in cloud.command("snapshot").stdout
    cloud.command("snapshot", "first")
    _wait_for_boots(cloud, 2)  # it runs again
    archive = cloud.home.with_name("home-snapshots") / "first.tar"
    assert archive.stat().st_mode & 0o077 == 0
    assert "first" in cloud.command("snapshot").stdout

    cloud.done(cloud.request("DELETE", f"{INSTANCES}/vm").json())
    token = cloud.token
    cloud.command("restore", "first")
    _wait_for_boots(cloud, 2)
    after = cloud.request("GET", f"{INSTANCES}/vm").json()
    changing = {"lastStartTimestamp", "lastStopTimestamp"}
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert cloud.token == token

    cloud.command("reset")
    assert archive.exists()
    cloud.command("restore", "first")
    _wait_for_boots(cloud, 2)


def test_a_snapshot_can_be_restored_into_another_home(cloud: Localcloud, tmp_path: Path) -> None:
    cloud.command("snapshot", "first")
    cloud.command("reset")
    other = make_localcloud(tmp_path / "an other")
    (tmp_path / "an other" / "home-snapshots").mkdir(parents=True)
    (tmp_path / "home-snapshots" / "first.tar").rename(tmp_path / "an other" / "home-snapshots" / "first.tar")
    try:
        other.command("restore", "first")
        _wait_for_boots(other, 2)
        assert other.request("GET", f"{INSTANCES}/vm").json()["status"] == "RUNNING"
    finally:
        other.command("reset", check=False)
    assert marked(f"{other.home}#") == []


def test_a_snapshot_that_cannot_be_used_leaves_what_runs_as_it_is(cloud: Localcloud, tmp_path: Path) -> None:
    directory = cloud.home.with_name("home-snapshots")
    directory.mkdir()
    (directory / "bad.tar").write_bytes(b"no archive")
    (tmp_path / "foreign").mkdir()
    with tarfile.open(directory / "foreign.tar", "w") as archive:
        archive.add(tmp_path / "foreign", ".")
    for name, said in (
        ("none", "there are: bad, foreign"),
        ("bad", "tar"),
        ("foreign", "is no snapshot of localcloud"),
        ("../first", "is no name for a snapshot"),
    ):
        answer = cloud.command("restore", name, check=False)
        assert answer.returncode == 1, name
        assert said in answer.stderr, name
        assert "Traceback" not in answer.stderr, name
        assert cloud.request("GET", f"{INSTANCES}/vm").json()["status"] == "RUNNING", name
        assert {path.name for path in cloud.home.parent.iterdir()} == {"foreign", "home", "home-snapshots"}
