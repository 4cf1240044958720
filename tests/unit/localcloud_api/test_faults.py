"""Faults on demand: each kind, its bounds, and that the same faults are the same run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.testclient import TestClient

from localcloud import faults as command
from localcloud.__main__ import main
from localcloud.api import faults
from localcloud.api.errors import ApiError
from localcloud.api.server import Api, application
from localcloud.store import Store
from tests.unit.localcloud_api.client import (
    CLUSTERS,
    COMPUTE,
    REPOSITORIES,
    TOKEN,
    ZONE,
    Client,
    instance,
)

ADDRESS = {"Authorization": f"Bearer {TOKEN}"}


def _add(client: Client, kind: str, **settings: Any) -> None:
    faults.add(client.api.services.store, {"kind": kind, **settings})


def test_latency_is_for_the_requests_of_its_method(client: Client) -> None:
    _add(client, "latency", method="compute.networks.list", seconds=0.3)
    for path, least in ((f"{COMPUTE}/zones", 0.0), (f"{COMPUTE}/global/networks", 0.3)):
        started = time.monotonic()
        client.ok("GET", path)
        assert time.monotonic() - started >= least
    (fault,) = faults.faults(client.api.services.store)
    assert (fault["hit"], fault["hits"]) == (1, [[1, "compute.networks.list"]])


@pytest.mark.parametrize(("status", "reason"), [(429, "rateLimitExceeded"), (503, "backendError")])
def test_error_comes_with_a_time_to_retry_after_and_does_no_work(
    client: Client, status: int, reason: str
) -> None:
    _add(client, "error", method="compute.instances.*", status=status, retryAfter=7)
    http = TestClient(application(client.api))
    answer = http.post(f"{ZONE}/instances", json=instance(), headers=ADDRESS)
    assert (answer.status_code, answer.headers["Retry-After"]) == (status, "7")
    assert answer.json()["error"]["errors"][0]["reason"] == reason
    assert "items" not in client.ok("GET", f"{ZONE}/instances")
    client.create(f"{ZONE}/instances", instance())


def test_lost_answer_is_of_work_that_was_done(server: str) -> None:
    fault = {"kind": "lost-answer", "method": "compute.networks.insert"}
    requests.post(f"{server}/localcloud/faults", json=fault, headers=ADDRESS, timeout=30)
    network = {"name": "n", "autoCreateSubnetworks": False}
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{server}{COMPUTE}/global/networks", json=network, headers=ADDRESS, timeout=30)
    answer = requests.post(f"{server}{COMPUTE}/global/networks", json=network, headers=ADDRESS, timeout=30)
    assert answer.status_code == 409, answer.text


def test_operation_fails_after_its_work_was_begun(client: Client) -> None:
    _add(client, "failed-operation", method="container.projects.locations.clusters.create")
    operation = client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "initialNodeCount": 1}}))
    assert "to fail" in operation["error"]["message"]
    assert client.ok("GET", f"{CLUSTERS}/c1")["status"] == "ERROR"
    assert client.backends.calls == [("create_cluster", "c1")]
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1"))
    client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "initialNodeCount": 1}}))
    assert client.ok("GET", f"{CLUSTERS}/c1")["status"] == "RUNNING"


def test_operation_of_records_alone_fails_too(client: Client) -> None:
    _add(client, "failed-operation", method="compute.networks.insert")
    operation = client.done(client.ok("POST", f"{COMPUTE}/global/networks", {"name": "n"}))
    assert "to fail" in operation["error"]["errors"][0]["message"]
    assert client.ok("GET", f"{COMPUTE}/global/networks/n")["name"] == "n"


def test_instance_whose_start_fails_leaves_nothing(client: Client) -> None:
    _add(client, "failed-operation", method="compute.instances.insert")
    operation = client.done(client.ok("POST", f"{ZONE}/instances", instance()))
    assert operation["httpErrorStatusCode"] == 503
    client.error(404, "GET", f"{ZONE}/instances/vm")
    assert client.backends.calls[-1] == ("delete_instance", "vm")


def test_instance_that_never_boots_is_said_to_run(client: Client) -> None:
    _add(client, "no-boot", target="vm")
    client.create(f"{ZONE}/instances", instance())
    client.create(f"{ZONE}/instances", instance("other"))
    assert client.ok("GET", f"{ZONE}/instances/vm")["status"] == "RUNNING"
    assert client.backends.calls == [("start_instance", "other")]
    client.create(f"{ZONE}/instances/vm/reset", None)
    assert client.backends.calls[-1] == ("start_instance", "vm")


def test_registry_refuses_to_be_written_and_can_be_read(client: Client) -> None:
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    _add(client, "read-only-registry", target="app", times=0)
    http = TestClient(application(client.api))

    def token(actions: str) -> int:
        scope = f"repository:localcloud-dev/app/image:{actions}"
        answer = http.get("/v2/token", params={"scope": scope}, auth=("oauth2accesstoken", TOKEN))
        return int(answer.status_code)

    assert (token("pull"), token("push"), token("delete"), token("pull,push")) == (200, 403, 403, 200)
    faults.clear(client.api.services.store)
    assert token("push") == 200


def test_control_plane_goes_away_and_comes_back(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, {"cluster": {"name": "c1", "initialNodeCount": 1}}))
    http = TestClient(application(client.api))
    answer = http.post(
        "/localcloud/faults", json={"kind": "no-control-plane", "target": "c1"}, headers=ADDRESS
    )
    assert answer.status_code == 200, answer.text
    assert client.backends.calls[-1] == ("suspend_cluster", "c1")
    assert http.delete("/localcloud/faults", headers=ADDRESS).json() == {"cleared": ["f1"]}
    client.api.services.operations.settle(30)
    assert client.backends.calls[-1] == ("create_cluster", "c1")
    http.post("/localcloud/faults", json={"kind": "no-control-plane", "seconds": 0.05}, headers=ADDRESS)
    deadline = time.monotonic() + 30
    while client.backends.calls[-1] != ("create_cluster", "c1") and time.monotonic() < deadline:
        client.api.services.operations.settle(0.05)
    assert client.backends.calls[-2:] == [("suspend_cluster", "c1"), ("create_cluster", "c1")]


def _run(path: Path, seed: int) -> list[bool]:
    store = Store(path)
    faults.add(
        store,
        {"kind": "error", "name": "x", "times": 5, "after": 3, "probability": 0.5, "seed": seed},
    )
    return [bool(faults.due(store, ("error",), f"compute.zones.list{n}")) for n in range(40)]


def test_the_same_faults_are_the_same_run(tmp_path: Path) -> None:
    first = _run(tmp_path / "a.db", 7)
    assert _run(tmp_path / "b.db", 7) == first
    assert _run(tmp_path / "c.db", 8) != first
    assert (first[:3], sum(first)) == ([False] * 3, 5)


def test_faults_outlive_the_server(client: Client) -> None:
    _add(client, "error", name="mine")
    again = Store(client.api.services.home.store_path)
    assert [fault["name"] for fault in faults.faults(again)] == ["mine"]


def test_a_new_server_brings_control_planes_back_and_ends_their_faults(client: Client) -> None:
    _add(client, "no-control-plane")
    _add(client, "error", method="container.*")
    again = Api(client.api.services.home, client.backends)
    again.restore()
    assert [fault["kind"] for fault in faults.faults(again.services.store)] == ["error"]


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "nonsense"},
        {"kind": "error", "status": 200},
        {"kind": "error", "times": -1},
        {"kind": "error", "times": "many"},
        {"kind": "error", "probability": 2},
        {"kind": "latency", "seconds": 1e9},
        {"kind": "error", "colour": "red"},
        {"kind": "error", "name": "a/b"},
    ],
)
def test_what_is_no_fault_is_refused(client: Client, given: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        faults.add(client.api.services.store, given)
    assert caught.value.code == 400
    assert faults.faults(client.api.services.store) == []


def test_only_the_developer_makes_faults(client: Client) -> None:
    http = TestClient(application(client.api))
    assert http.get("/localcloud/faults").status_code == 401
    made = http.post("/localcloud/faults", json={"kind": "error"}, headers=ADDRESS).json()
    assert made["name"] == "f1"
    assert http.post("/localcloud/faults", content=b"x", headers=ADDRESS).status_code == 400
    listed = http.get("/localcloud/faults", headers=ADDRESS).json()["faults"]
    assert [fault["kind"] for fault in listed] == ["error"]
    assert http.delete("/localcloud/faults/none", headers=ADDRESS).status_code == 404
    assert http.delete("/localcloud/faults/f1", headers=ADDRESS).json() == {"cleared": ["f1"]}


def test_the_commands_kinds_are_the_servers() -> None:
    assert (*faults.OF_REQUESTS, *faults.OF_PARTS) == command.KINDS


def test_the_command_asks_the_server(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    http = TestClient(application(client.api))

    def request(_home: object, method: str, path: str, body: Any = None) -> Any:
        return http.request(method, f"/localcloud/faults{path}", json=body, headers=ADDRESS).json()

    monkeypatch.setenv("LOCALCLOUD_HOME", str(client.api.services.home.root))
    monkeypatch.setattr(command, "_request", request)
    assert (
        main(["faults", "add", "error", "--method", "compute.*", "--retry-after", "3", "--times", "2"]) == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert (made["method"], made["retryAfter"], made["times"]) == ("compute.*", 3, 2)
    client.error(503, "GET", f"{COMPUTE}/zones")
    assert main(["faults", "list"]) == 0
    assert capsys.readouterr().out == "f1  error  compute.*  hit 1 of 1\n    1  compute.zones.list\n"
    assert main(["faults", "clear"]) == 0
    assert capsys.readouterr().out == "cleared: f1\n"
