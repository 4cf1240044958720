"""The gcp stand-in when Google fails it: at every request of a creation, a change and a deletion, in every
way. The server is a real one, on a socket, that keeps resources in memory and does what a fault says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from localcloud.plugins import patience
from localcloud.plugins.gcp import tables
from localcloud.plugins.gcp.provider import GcpProvider
from localcloud.plugins.gcp.tables import ResourceType
from localcloud.plugins.protocol import InitFailedError, ProviderError, Resource
from localcloud.plugins.values import Properties


@dataclass(frozen=True)
class Case:
    """A type, its inputs, its path, the inputs of a change in place."""

    spec: ResourceType
    inputs: Properties
    item: str
    changed: Properties

    def resource(self, item: str = "") -> Resource:
        return Resource(f"urn:pulumi:dev::p::{self.spec.token}::it", item, timeout=20)

    @property
    def key(self) -> str:
        return f"/{self.spec.service}/v1/{self.item}"


def case(spec: ResourceType, item: str, change: Properties, **inputs: Any) -> Case:
    return Case(spec, inputs, item, {**inputs, **change})


ZONE = "projects/p/zones/z"
CLUSTER = "projects/p/locations/z/clusters/c"
POOL = {"cluster": "c", "location": "z", "name": "n", "nodeCount": 1}
CASES = [
    case(tables.NETWORK, "projects/p/global/networks/n", {"mtu": 1500}, name="n", mtu=1460),
    case(tables.DISK, f"{ZONE}/disks/d", {"size": 20}, name="d", size=10),
    case(tables.CLUSTER, CLUSTER, {"loggingService": "none"}, name="c", location="z", initialNodeCount=1),
    case(tables.NODE_POOL, f"{CLUSTER}/nodePools/n", {"nodeCount": 2}, **POOL),
    case(
        tables.REPOSITORY,
        "projects/p/locations/r/repositories/r",
        {"description": "d"},
        repositoryId="r",
        format="DOCKER",
    ),
    case(
        tables.ACCOUNT,
        "projects/p/serviceAccounts/a@p.iam.gserviceaccount.com",
        {"displayName": "d"},
        accountId="a",
    ),
]
FAULTS = ("lost", "answer lost", "answer cut", "429", "503", "500", "503 after the work")
AFTER_THE_WORK = ("answer lost", "answer cut", "503 after the work")
KINDS = ("get", "post", "poll")


class Server(ThreadingHTTPServer):
    """Resources by path. Operations run for one poll, unless `endless`; where one `fails`, it ends with an
    error.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()

    def reset(self) -> None:
        self.resources: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.requests: dict[str, Any] = {}
        self.faults: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self.posts = 0
        self.endless = self.fails = False

    def fault(self, kind: str) -> str:
        self.seen.append(kind)
        waiting = self.faults.get(kind) or [""]
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]


class Handler(BaseHTTPRequestHandler):
    """One request: its kind, the fault for it, the work, the answer."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        kind = self.command.lower()
        if "/operations" in parts.path:
            kind = "poll" if parts.path.rsplit("/", 1)[-1].startswith("operation-") else "operations"
        fault = self.server.fault(kind)
        if fault == "lost":
            self._drop()
        elif fault.isdigit():
            self._answer(int(fault), {"error": {"message": "not now"}})
        else:
            status, answer = self._once(kind, parts.path, query, body)
            if fault == "answer lost":
                self._drop()
            elif fault == "503 after the work":
                self._answer(503, {"error": {"message": "not now"}})
            else:
                self._answer(status, answer, cut=fault == "answer cut")

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _handle  # noqa: N815

    def _once(self, kind: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """As Google, which does the work of a request with an id once."""
        requested = query.get("requestId", "")
        if requested in self.server.requests:
            return 200, self.server.requests[requested]
        status, answer = self._work(kind, path, query, body)
        if requested and status == 200:
            self.server.requests[requested] = answer
        return status, answer

    def _work(self, kind: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        resources = self.server.resources
        if kind == "operations":
            running = [o for o in self.server.operations.values() if o["status"] != "DONE"]
            return 200, {"items": running, "operations": running}
        if kind == "poll":
            return 200, self._polled(path.rsplit("/", 1)[-1])
        last = path.rsplit("/", 1)[-1]
        target = path.removesuffix(f":{last.rpartition(':')[2]}") if ":" in last else path
        target = target.removesuffix("/resize")
        if kind == "post" and target == path:
            return self._create(path, query, body)
        if target not in resources:
            return 404, {"error": {"message": "not found"}}
        if kind == "get":
            return 200, resources[target]
        if kind == "delete":
            del resources[target]
        else:
            resources[target]["changes"] = resources[target].get("changes", 0) + 1
            resources[target] |= {k: v for k, v in (body or {}).items() if k not in ("update", "nodeCount")}
        return 200, {} if "/iam/" in path else self._operation(target, kind)

    def _create(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        body = body.get("cluster") or body.get("nodePool") or body
        name = body.get("name") or query.get("repositoryId")
        if "accountId" in body:
            name = f"{body['accountId']}@p.iam.gserviceaccount.com"
            body = {**body.get("serviceAccount", {}), "email": name, "projectId": "p"}
        key = f"{path}/{name}"
        self.server.posts += 1
        if key in self.server.resources:
            return 409, {"error": {"message": "Already exists"}}
        self.server.resources[key] = {**body, "name": name, "uid": self.server.posts}
        return 200, self.server.resources[key] if "/iam/" in path else self._operation(key, "insert")

    def _operation(self, key: str, kind: str) -> Any:
        name = f"operation-{len(self.server.operations)}"
        made = {"name": name, "status": "RUNNING", "operationType": kind, "targetLink": key}
        if "/artifactregistry/" in key:
            made["name"] = f"projects/p/locations/r/operations/{name}"
        self.server.operations[name] = made
        return dict(made)

    def _polled(self, name: str) -> Any:
        found = self.server.operations[name]
        if not self.server.endless:
            found |= {"status": "DONE", "done": True}
        if self.server.fails:
            found["error"] = {"code": 13, "message": "no room"}
        return dict(found)

    def _answer(self, status: int, answer: Any, *, cut: bool = False) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()


@pytest.fixture(scope="module")
def google() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def server(google: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.01)
    google.reset()
    return google


def provider(server: Server, seconds: float = 20) -> GcpProvider:
    made = GcpProvider()
    url = f"http://127.0.0.1:{server.server_port}"
    services = {"compute": "compute", "container": "container", "iam": "iam"}
    endpoints = {f"{k}CustomEndpoint": f"{url}/{v}/v1/" for k, v in services.items()}
    endpoints["artifactRegistryCustomEndpoint"] = f"{url}/artifactregistry/v1/"
    made.configure({"project": "p", "region": "r", "zone": "z", "accessToken": "t", **endpoints})
    made._google.patience.seconds, made._google.patience.reached = seconds, True
    return made


WALK = [(fault, CASES[i % len(CASES)]) for i, fault in enumerate(FAULTS)]
"""Every fault and every type once, where their product would show no more."""

CREATIONS = [
    (kind, fault, CASES[(i + j) % len(CASES)])
    for i, (kind, fault) in enumerate((kind, fault) for kind in KINDS for fault in FAULTS)
    for j in (0, 3)
]
"""Every fault at every request, of two types each."""

by_type = pytest.mark.parametrize("case", CASES, ids=lambda c: c.spec.token.rsplit(":", 1)[-1])


@pytest.mark.parametrize(("kind", "fault", "case"), CREATIONS)
def test_a_fault_that_passes_does_not_fail_a_creation_or_make_two(
    server: Server, kind: str, fault: str, case: Case
) -> None:
    server.faults = {kind: ["", fault, ""] if kind == "get" else [fault, ""]}
    item, _ = provider(server).create(case.resource(), case.inputs, preview=False)
    assert item == case.item
    assert list(server.resources) == [case.key]


@by_type
@pytest.mark.parametrize("fault", AFTER_THE_WORK)
def test_a_creation_whose_answer_never_comes_is_kept_and_taken_up(
    server: Server, fault: str, case: Case
) -> None:
    server.faults = {"post": [fault], "get": ["", fault], "poll": [fault]}
    made = provider(server, seconds=0.1)
    with pytest.raises(InitFailedError) as caught:
        made.create(case.resource(), case.inputs, preview=False)
    assert caught.value.resource_id == case.item
    server.faults = {}
    made.update(case.resource(case.item), caught.value.properties, case.inputs, case.inputs, preview=False)
    assert server.resources[case.key]["uid"] == 1
    assert list(server.resources) == [case.key]


@by_type
def test_one_that_was_kept_and_never_came_to_be_is_made_by_the_next_update(
    server: Server, case: Case
) -> None:
    server.faults = {"post": ["lost"], "get": ["", "lost"]}
    made = provider(server, seconds=0.1)
    with pytest.raises(InitFailedError) as caught:
        made.create(case.resource(), case.inputs, preview=False)
    assert server.resources == {}
    server.faults = {}
    state = made.update(
        case.resource(case.item), caught.value.properties, case.inputs, case.inputs, preview=False
    )
    assert list(server.resources) == [case.key]
    assert not [name for name in state if name.startswith("__")]


@by_type
@pytest.mark.parametrize("fault", ["lost", "503", "429", "403"])
def test_a_creation_that_did_not_happen_is_not_in_the_state(server: Server, fault: str, case: Case) -> None:
    server.faults = {"post": [fault]}
    with pytest.raises(ProviderError, match="creating "):
        provider(server, seconds=0.1).create(case.resource(), case.inputs, preview=False)
    assert server.resources == {}


@pytest.mark.parametrize("case", [c for c in CASES if c.spec.service != "iam"], ids=lambda c: c.item)
def test_an_operation_that_fails_leaves_nothing_behind_or_what_it_left_in_the_state(
    server: Server, case: Case
) -> None:
    server.fails = True
    with pytest.raises(ProviderError, match="no room"):
        provider(server).create(case.resource(), case.inputs, preview=False)
    assert server.resources == {}
    server.faults = {"delete": ["403"]}
    with pytest.raises(InitFailedError, match="no room"):
        provider(server).create(case.resource(), case.inputs, preview=False)
    assert list(server.resources) == [case.key]


@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.item)
def test_an_operation_that_was_not_waited_for_is_waited_for_by_the_next_update(
    server: Server, case: Case
) -> None:
    server.endless = True
    made = provider(server)
    impatient = Resource(case.resource().urn, timeout=0.1)
    with pytest.raises(InitFailedError, match="did not end in the time") as caught:
        made.create(impatient, case.inputs, preview=False)
    resource, state = Resource(impatient.urn, case.item, timeout=0.3), caught.value.properties
    with pytest.raises(ProviderError, match="did not end in the time"):
        made.update(resource, state, case.inputs, case.inputs, preview=False)
    server.endless = False
    made.update(resource, state, case.inputs, case.inputs, preview=False)
    assert server.resources[case.key]["uid"] == 1


@pytest.mark.parametrize("state", [{}, {"name": "c", "__unfinished": True}], ids=["killed", "kept"])
def test_a_refresh_of_what_was_begun_leaves_the_rest_to_the_next_up(
    server: Server, state: Properties
) -> None:
    case = CASES[2]
    inputs = {**case.inputs, "removeDefaultNodePool": True}
    made = provider(server)
    made._google.call("container", "POST", "projects/p/locations/z/clusters", {"cluster": {"name": "c"}})
    server.resources[f"{case.key}/nodePools/default-pool"] = {}
    resource = case.resource(case.item)
    with pytest.raises(InitFailedError, match="is not finished; `pulumi up` goes on") as caught:
        made.read(resource, state, inputs)
    outputs = made.update(resource, caught.value.properties, inputs, inputs, preview=False)
    assert list(server.resources) == [case.key]  # and its default pool is gone
    assert made.read(resource, outputs, inputs).resource_id == case.item


@by_type
def test_one_that_somebody_else_made_meanwhile_is_not_taken(server: Server, case: Case) -> None:
    other = {"name": "x", "sizeGb": "99", "mtu": 1300, "format": "NPM", "email": "b@p.iam", "projectId": "p"}
    other |= {"initialNodeCount": 7}
    server.faults = {"get": ["404", ""], "post": ["503", "409"]}
    server.resources[case.key] = other
    with pytest.raises(ProviderError, match="creating "):
        provider(server, seconds=0.3).create(case.resource(), case.inputs, preview=False)
    assert server.resources[case.key] == other


@pytest.mark.parametrize(("fault", "case"), WALK)
def test_a_change_is_made_again_until_it_is_made(server: Server, fault: str, case: Case) -> None:
    made = provider(server)
    _, state = made.create(case.resource(), case.inputs, preview=False)
    server.faults = {kind: [fault, ""] for kind in ("post", "put", "patch", "poll")}
    resource = case.resource(case.item)
    made.update(resource, state, case.inputs, case.changed, preview=False)
    assert [r for r in server.resources.values() if r.get("changes")]


@pytest.mark.parametrize(("fault", "case"), WALK)
def test_a_deletion_is_made_again_until_it_is_made(server: Server, fault: str, case: Case) -> None:
    made = provider(server)
    _, state = made.create(case.resource(), case.inputs, preview=False)
    server.faults = {"delete": [fault, ""]}
    made.delete(case.resource(case.item), {**state, "deletionProtection": False}, case.inputs)
    assert server.resources == {}


def test_the_pause_that_a_server_asks_for_is_in_seconds() -> None:
    assert patience.retry_after("2.5") == 2.5
    assert patience.retry_after("Wed, 21 Oct 2026 07:28:00 GMT") == 0
    assert patience.retry_after(None) == 0
