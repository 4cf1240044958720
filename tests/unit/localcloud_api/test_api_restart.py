"""What a new process finds: resources, unfinished operations, and backends that must be brought back."""

from __future__ import annotations

from pathlib import Path

import pytest

from localcloud.api.artifactregistry import repository_of
from localcloud.api.server import Api
from localcloud.home import Home
from localcloud.store import Record, Store
from tests.unit.localcloud_api.client import (
    CLUSTERS,
    COMPUTE,
    REPOSITORIES,
    ZONE,
    Client,
    FakeBackends,
    instance,
)


def _again(home: Home) -> Client:
    """The same home in a new process."""
    backends = FakeBackends()
    api = Api(home, backends)
    api.restore()
    return Client(api, backends)


def test_resources_survive_and_what_ran_is_started_again(client: Client, home: Home) -> None:
    client.create(f"{ZONE}/instances", instance())
    client.create(f"{ZONE}/instances", instance("off"))
    client.create(f"{ZONE}/instances/off/stop", None)
    client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "initialNodeCount": 1}}))
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    before = client.ok("GET", f"{ZONE}/instances/vm")
    again = _again(home)
    again.api.services.operations.settle(30)
    assert sorted(again.backends.calls) == [
        ("create_cluster", "c1"),
        ("ensure_registry", ""),
        ("start_instance", "vm"),
    ]
    assert again.ok("GET", f"{ZONE}/instances/vm") == before


def test_what_could_not_be_started_again_is_tried_at_the_next_start_unless_it_was_stopped(
    client: Client, home: Home
) -> None:
    for name in ("vm", "off"):
        client.create(f"{ZONE}/instances", instance(name))
    failing = FakeBackends(fail={"start_instance"})
    broken = Client(Api(home, failing), failing)
    broken.api.restore()
    broken.api.services.operations.settle(30)
    for name in ("vm", "off"):
        body = broken.ok("GET", f"{ZONE}/instances/{name}")
        assert (body["status"], "on purpose" in body["statusMessage"]) == ("TERMINATED", True)
    broken.create(f"{ZONE}/instances/off/stop", None)
    again = _again(home)
    again.api.services.operations.settle(30)
    body = again.ok("GET", f"{ZONE}/instances/vm")
    assert (body["status"], "statusMessage" in body) == ("RUNNING", False)
    assert again.ok("GET", f"{ZONE}/instances/off")["status"] == "TERMINATED"


@pytest.mark.parametrize("kind", ["create", "delete"])
def test_operation_that_was_cut_off_is_taken_up_again(client: Client, home: Home, kind: str) -> None:
    if kind == "delete":
        client.create(f"{ZONE}/instances", instance())
    client.backends.gate.clear()
    if kind == "delete":
        operation = client.ok("DELETE", f"{ZONE}/instances/vm")
    else:
        operation = client.ok("POST", f"{ZONE}/instances", instance())
    again = _again(home)
    assert again.done(operation)["status"] == "DONE"
    if kind == "delete":
        again.error(404, "GET", f"{ZONE}/instances/vm")
        assert again.backends.calls == [("delete_instance", "vm")]
    else:
        assert again.ok("GET", f"{ZONE}/instances/vm")["status"] == "RUNNING"
        again.api.services.operations.settle(30)
        assert ("start_instance", "vm") in again.backends.calls


def test_operation_is_running_until_its_work_is_done(client: Client) -> None:
    client.backends.gate.clear()
    operation = client.ok("POST", f"{ZONE}/instances", instance())
    path = f"{ZONE}/operations/{operation['name']}"
    assert client.ok("GET", path)["status"] == "RUNNING"
    assert client.ok("GET", f"{ZONE}/instances/vm")["status"] in ("PROVISIONING", "STAGING")
    assert "is not ready" in client.error(400, "DELETE", path)
    client.backends.gate.set()
    body = client.ok("POST", f"{path}/wait")
    assert (body["status"], body["progress"]) == ("DONE", 100)
    assert body["endTime"] >= body["startTime"]
    assert client.ok("DELETE", path) == {}
    client.error(404, "GET", path)


def test_operations_on_one_target_run_in_the_order_of_their_requests(client: Client) -> None:
    client.backends.gate.clear()
    created = client.ok("POST", f"{ZONE}/instances", instance())
    deleted = client.ok("DELETE", f"{ZONE}/instances/vm")
    client.backends.gate.set()
    client.done(created)
    client.done(deleted)
    client.error(404, "GET", f"{ZONE}/instances/vm")
    assert client.backends.calls[-1] == ("delete_instance", "vm")


@pytest.mark.parametrize("verb", ["start", "reset"])
def test_an_instance_that_cannot_be_started_is_shown_as_stopped_and_can_be_started_again(
    client: Client, verb: str
) -> None:
    client.create(f"{ZONE}/instances", instance())
    if verb == "start":
        client.create(f"{ZONE}/instances/vm/stop", None)
    client.backends.fail.add("start_instance")
    operation = client.done(client.ok("POST", f"{ZONE}/instances/vm/{verb}"))
    assert operation["httpErrorStatusCode"] == 503
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert (body["status"], body["statusMessage"]) == ("TERMINATED", "start_instance of vm failed on purpose")
    assert client.backends.calls[-1] == ("stop_instance", "vm")
    client.backends.fail.clear()
    client.create(f"{ZONE}/instances/vm/start", None)
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert body["status"] == "RUNNING"
    assert "statusMessage" not in body


def test_what_cannot_be_made_on_a_full_disk_is_shown_with_the_reason_and_can_be_deleted(
    client: Client,
) -> None:
    client.create(f"{ZONE}/instances", instance("old"))
    client.create(f"{ZONE}/instances/old/stop", None)
    client.backends.full = True
    operation = client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "initialNodeCount": 1}}))
    assert "No space left on device" in operation["error"]["message"]
    cluster = client.ok("GET", f"{CLUSTERS}/c1")
    assert cluster["status"] == "ERROR"
    assert "No space left on device" in cluster["statusMessage"]
    assert "No space" in str(client.done(client.ok("POST", f"{ZONE}/instances", instance()))["error"])
    client.error(404, "GET", f"{ZONE}/instances/vm")
    assert "error" in client.done(client.ok("POST", f"{ZONE}/instances/old/start"))
    body = client.ok("GET", f"{ZONE}/instances/old")
    assert body["status"] == "TERMINATED"
    assert "No space left on device" in body["statusMessage"]
    repository = client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app")
    assert "No space" in client.done_registry(repository)["error"]["message"]
    client.error(404, "GET", f"{REPOSITORIES}/app")
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1"))
    client.done(client.ok("DELETE", f"{ZONE}/instances/old"))
    client.error(404, "GET", f"{CLUSTERS}/c1")
    client.error(404, "GET", f"{ZONE}/instances/old")


def test_an_instance_whose_deletion_failed_can_be_deleted_again(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    client.backends.fail.add("delete_instance")
    assert "error" in client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))
    assert client.ok("GET", f"{ZONE}/instances/vm")["status"] == "TERMINATED"
    client.backends.fail.clear()
    assert "error" not in client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))
    client.error(404, "GET", f"{ZONE}/instances/vm")


def test_a_repository_whose_deletion_failed_goes_on_serving_and_can_be_deleted_again(client: Client) -> None:
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    client.backends.fail.add("delete_repository")
    assert "error" in client.done_registry(client.ok("DELETE", f"{REPOSITORIES}/app"))
    assert repository_of(client.api.services.store, "localcloud-dev/app/image") is not None
    client.backends.fail.clear()
    assert "error" not in client.done_registry(client.ok("DELETE", f"{REPOSITORIES}/app"))
    client.error(404, "GET", f"{REPOSITORIES}/app")


def test_refused_change_changes_nothing(client: Client) -> None:
    count = len(client.api.services.store.list("compute.operations"))
    client.create(f"{COMPUTE}/regions/europe-west1/addresses", {"name": "ip"})
    address = client.ok("GET", f"{COMPUTE}/regions/europe-west1/addresses/ip")["address"]
    interface = {"network": "global/networks/default", "accessConfigs": [{"natIP": address}]}
    # The disk is checked after the address was marked as used.
    client.error(400, "POST", f"{ZONE}/instances", instance(networkInterfaces=[interface], disks=[]))
    assert client.ok("GET", f"{COMPUTE}/regions/europe-west1/addresses/ip")["status"] == "RESERVED"
    assert len(client.api.services.store.list("compute.operations")) == count + 1


def test_store_keeps_a_transaction_whole_and_calls_back_only_when_it_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    called: list[str] = []

    def fail() -> None:
        with store.transaction():
            store.put(Record("a", "kind", {}))
            store.after_commit(lambda: called.append("lost"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.get("a") is None
    with store.transaction():
        store.put(Record("a", "kind", {"n": 1}))
        store.after_commit(lambda: called.append("kept"))
        assert called == []
    assert called == ["kept"]
    reader = Store(tmp_path / "store.db", read_only=True)
    store.put(Record("a", "kind", {"n": 2}))
    found = reader.get("a")
    assert found is not None
    assert found.body == {"n": 2}
    assert (tmp_path / "store.db").stat().st_mode & 0o077 == 0
