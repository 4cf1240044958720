"""Compute Engine's disks, and what of an instance changes only while it is stopped."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.localcloud_api.client import ACCOUNTS, ZONE, Client, instance

DISKS = f"{ZONE}/disks"
IMAGE = "projects/debian-cloud/global/images/family/debian-12"


@pytest.fixture
def vm(client: Client) -> str:
    """An instance with a boot disk of 20 GB; gives its path."""
    disk = {"boot": True, "autoDelete": True, "initializeParams": {"sourceImage": IMAGE, "diskSizeGb": "20"}}
    client.create(f"{ZONE}/instances", instance(disks=[disk]))
    return f"{ZONE}/instances/vm"


def test_disk_grows_in_place_under_its_instance(client: Client, vm: str) -> None:
    before = client.ok("GET", f"{DISKS}/vm")
    operation = client.create(f"{DISKS}/vm/resize", {"sizeGb": "30"})
    assert operation["targetLink"].endswith("/zones/europe-west1-b/disks/vm")
    assert client.ok("GET", f"{DISKS}/vm") == before | {"sizeGb": "30"}
    assert client.ok("GET", vm)["disks"][0]["diskSizeGb"] == "30"
    assert client.backends.calls == [("start_instance", "vm")]


@pytest.mark.usefixtures("vm")
@pytest.mark.parametrize("size", ["20", "19", "0", "-5"])
def test_disk_does_not_shrink(client: Client, size: str) -> None:
    message = client.error(400, "POST", f"{DISKS}/vm/resize", {"sizeGb": size})
    assert message == (
        f"Invalid value for field 'sizeGb': '{size}'. New disk size '{size}' must be larger than existing "
        "size '20'."
    )
    assert client.ok("GET", f"{DISKS}/vm")["sizeGb"] == "20"


@pytest.mark.usefixtures("vm")
def test_disk_has_a_largest_size(client: Client) -> None:
    assert "65536" in client.error(400, "POST", f"{DISKS}/vm/resize", {"sizeGb": "65537"})
    client.error(404, "POST", f"{DISKS}/none/resize", {"sizeGb": "30"})


def test_disk_of_its_own_is_made_and_booted_from(client: Client) -> None:
    client.create(DISKS, {"name": "d", "sizeGb": "12", "sourceImage": IMAGE, "labels": {"a": "b"}})
    disk = client.ok("GET", f"{DISKS}/d")
    assert (disk["sizeGb"], disk["status"], disk["labels"]) == ("12", "READY", {"a": "b"})
    assert "users" not in disk
    boot = {"boot": True, "source": disk["selfLink"]}
    client.create(f"{ZONE}/instances", instance(disks=[boot]))
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert body["disks"][0]["source"] == disk["selfLink"]
    assert client.ok("GET", f"{DISKS}/d")["users"] == [body["selfLink"]]
    assert "already being used by" in client.error(400, "DELETE", f"{DISKS}/d")
    assert "already being used by" in client.error(
        400, "POST", f"{ZONE}/instances", instance("two", disks=[boot])
    )
    client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))
    # It was not the instance's own, so it outlives it.
    assert "users" not in client.ok("GET", f"{DISKS}/d")
    client.done(client.ok("DELETE", f"{DISKS}/d"))
    client.error(404, "GET", f"{DISKS}/d")


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (400, {"name": "Bad"}),
        (400, {"sizeGb": "5", "sourceImage": IMAGE}),
        (400, {"sourceImage": "x"}),
        (404, {"type": "zones/europe-west1-b/diskTypes/none"}),
        (400, {"sizeGb": "0"}),
        (400, {"labels": {"Bad": "x"}}),
    ],
)
def test_disk_that_google_refuses_is_refused(client: Client, code: int, fields: dict[str, Any]) -> None:
    client.error(code, "POST", DISKS, {"name": "d", **fields})
    assert "items" not in client.ok("GET", DISKS)


def test_blank_disk_has_googles_defaults(client: Client) -> None:
    client.create(DISKS, {"name": "d"})
    disk = client.ok("GET", f"{DISKS}/d")
    assert (disk["sizeGb"], disk["type"].rpartition("/")[2]) == ("500", "pd-standard")
    fingerprint = disk["labelFingerprint"]
    client.create(f"{DISKS}/d/setLabels", {"labels": {"a": "b"}, "labelFingerprint": fingerprint})
    assert client.ok("GET", f"{DISKS}/d")["labels"] == {"a": "b"}


def test_service_account_is_changed_while_the_instance_is_stopped_and_at_no_other_time(
    client: Client, vm: str
) -> None:
    client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    email = "robot1@localcloud-dev.iam.gserviceaccount.com"
    scopes = ["https://www.googleapis.com/auth/cloud-platform"]
    body = {"email": email, "scopes": scopes}
    assert "stopped" in client.error(400, "POST", f"{vm}/setServiceAccount", body)
    client.create(f"{vm}/stop", None)
    client.error(404, "POST", f"{vm}/setServiceAccount", {"email": "none@x.iam.gserviceaccount.com"})
    client.create(f"{vm}/setServiceAccount", body)
    assert client.ok("GET", vm)["serviceAccounts"] == [body]
    client.create(f"{vm}/setServiceAccount", {})
    assert "serviceAccounts" not in client.ok("GET", vm)
    client.create(f"{vm}/start", None)


def test_settings_that_need_no_stop_are_changed_while_it_runs(client: Client, vm: str) -> None:
    client.create(f"{vm}/setScheduling", {"automaticRestart": False})
    client.create(f"{vm}/setDiskAutoDelete", None, query="autoDelete=false&deviceName=persistent-disk-0")
    body = client.ok("GET", vm)
    assert (body["scheduling"]["automaticRestart"], body["status"]) == (False, "RUNNING")
    client.error(400, "POST", f"{vm}/setDiskAutoDelete", query="autoDelete=false&deviceName=none")
    client.done(client.ok("DELETE", vm))
    assert client.ok("GET", f"{DISKS}/vm")["status"] == "READY"
