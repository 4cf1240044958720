"""The kubernetes stand-in when the API server fails it: at every request of a creation, in every way.

The server is a real one, on a socket, that keeps objects in memory and does what a fault says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from localcloud.plugins import patience
from localcloud.plugins.kubernetes.provider import KubernetesProvider
from localcloud.plugins.protocol import InitFailedError, ProviderError, Resource
from localcloud.plugins.values import Properties

URN = "urn:pulumi:dev::p::kubernetes:core/v1:Pod::web"
POD: Properties = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web", "namespace": "demo"},
    "spec": {"containers": [{"name": "c", "image": "a"}]},
}
RESOURCES = {"resources": [{"name": "pods", "kind": "Pod", "namespaced": True}]}


class ApiServer(ThreadingHTTPServer):
    """A store of pods that are ready when they are created. `faults`: what happens to the next request of a
    kind; the last one of a list stays.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()

    def reset(self) -> None:
        self.objects: dict[str, Any] = {}
        self.faults: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self.becomes_ready = True

    @property
    def kubeconfig(self) -> str:
        server = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        return json.dumps({"clusters": [server], "contexts": [context], "current-context": "x", "users": []})

    def fault(self, kind: str) -> str:
        self.seen.append(kind)
        waiting = self.faults.get(kind) or [""]
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]


class Handler(BaseHTTPRequestHandler):
    """One request: its kind, the fault for it, the work, the answer."""

    server: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _kind(self, query: dict[str, list[str]]) -> str:
        path = urlsplit(self.path).path
        if self.command == "GET":
            names = {"/version": "version", "/api/v1": "discover", "/api/v1/namespaces/demo/pods": "list"}
            return "watch" if "watch" in query else names.get(path, "events" if "event" in path else "get")
        return {"PATCH": "apply", "DELETE": "delete"}[self.command]

    def _handle(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        kind = self._kind(query)
        fault = self.server.fault(kind)
        if fault == "lost":  # before the work
            self._drop()
        elif fault.isdigit():
            self._answer(int(fault), {"reason": "Overloaded", "message": "not now"})
        else:
            status, answer = self._work(kind, query, body)
            if fault == "answer lost":
                self._drop()
            elif fault == "answer cut":
                self._answer(status, answer, cut=True)
            elif fault == "503 after the work":
                self._answer(503, {"message": "not now"})
            else:
                self._answer(status, answer)

    do_GET = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _work(self, kind: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        objects, name = self.server.objects, urlsplit(self.path).path.rsplit("/", 1)[-1]
        missing = (404, {"reason": "NotFound", "message": "not found"})
        if kind in ("version", "discover", "events"):
            return 200, RESOURCES if kind == "discover" else {"items": []}
        if kind == "get":
            return (200, objects[name]) if name in objects else missing
        if kind == "delete":
            return (200, objects.pop(name)) if name in objects else missing
        if kind == "apply":
            assert "dryRun" not in query
            uid = objects.get(name, {}).get("metadata", {}).get("uid") or f"uid-{len(self.server.seen)}"
            managed = [{"manager": query["fieldManager"][0]}]
            metadata = {**body["metadata"], "uid": uid, "managedFields": managed}
            objects[name] = {**body, "metadata": metadata, "status": {"phase": "Pending"}}
            return 201, objects[name]
        if self.server.becomes_ready:
            types = ("PodScheduled", "Initialized", "Ready")
            for live in objects.values():
                live["status"] = {"conditions": [{"type": t, "status": "True"} for t in types]}
        if kind == "watch":
            return 200, [{"type": "MODIFIED", "object": live} for live in objects.values()]
        pending = [{**live, "status": {"phase": "Pending"}} for live in objects.values()]
        return 200, {"metadata": {"resourceVersion": "1"}, "items": pending}

    def _answer(self, status: int, answer: Any, *, cut: bool = False) -> None:
        lines = answer if isinstance(answer, list) else [answer]
        data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
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
def api_server() -> Iterator[ApiServer]:
    made = ApiServer()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def server(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.01)
    api_server.reset()
    return api_server


def provider(server: ApiServer, seconds: float = 20) -> KubernetesProvider:
    made = KubernetesProvider()
    made.configure({"kubeconfig": server.kubeconfig})
    made._cluster._patience.seconds = seconds
    made._cluster.check()  # it answered before: the first request of all is not what is tested
    return made


FAULTS = ("lost", "answer lost", "answer cut", "503", "429", "500", "503 after the work")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_kind", ["discover", "get", "apply", "list", "watch"])
def test_a_fault_that_passes_at_any_request_does_not_fail_a_creation(
    server: ApiServer, request_kind: str, fault: str
) -> None:
    server.faults = {request_kind: [fault, fault, ""]}
    resource_id, state = provider(server).create(Resource(URN, timeout=20), POD, preview=False)
    assert (resource_id, state["metadata"]["uid"]) == ("demo/web", server.objects["web"]["metadata"]["uid"])
    assert server.seen.count(request_kind) >= 2
    assert list(server.objects) == ["web"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_kind", ["list", "watch"])
def test_what_was_created_is_in_the_state_however_long_the_server_is_away(
    server: ApiServer, request_kind: str, fault: str
) -> None:
    server.faults, server.becomes_ready = {request_kind: [fault]}, False
    made = provider(server, seconds=0.1)
    with pytest.raises(InitFailedError) as caught:
        made.create(Resource(URN, timeout=0.2), POD, preview=False)
    assert caught.value.resource_id == "demo/web"
    assert caught.value.properties["metadata"]["uid"] == server.objects["web"]["metadata"]["uid"]

    server.faults, server.becomes_ready = {}, True  # and the next up goes on
    resource = Resource(URN, "demo/web", timeout=20)
    state = made.update(resource, caught.value.properties, POD, POD, preview=False)
    assert state["metadata"]["uid"] == caught.value.properties["metadata"]["uid"]


def test_a_server_that_is_away_for_longer_than_it_is_asked_again_is_waited_for_until_the_timeout(
    server: ApiServer,
) -> None:
    server.faults = {"list": [*["lost"] * 12, ""]}
    made = provider(server, seconds=0.02)
    made.create(Resource(URN, timeout=60), POD, preview=False)
    assert server.seen.count("list") > 12


@pytest.mark.parametrize("fault", ["answer lost", "answer cut", "503 after the work"])
def test_a_creation_whose_answer_never_comes_is_kept_and_taken_up(server: ApiServer, fault: str) -> None:
    server.faults = {"apply": [fault], "get": ["", fault]}
    made = provider(server, seconds=0.1)
    with pytest.raises(InitFailedError, match="may have been created; the answer did not come") as caught:
        made.create(Resource(URN), POD, preview=False)
    server.faults = {}
    state = made.update(Resource(URN, "demo/web"), caught.value.properties, POD, POD, preview=False)
    assert state["metadata"]["uid"] == server.objects["web"]["metadata"]["uid"]


@pytest.mark.parametrize("fault", ["lost", "503", "500"])
def test_a_creation_that_did_not_happen_is_not_in_the_state(server: ApiServer, fault: str) -> None:
    server.faults = {"apply": [fault]}
    with pytest.raises(ProviderError, match="was not created by the API server"):
        provider(server, seconds=0.1).create(Resource(URN), POD, preview=False)
    assert server.objects == {}


def test_an_object_of_somebody_else_is_not_taken_for_a_creation_of_ours(server: ApiServer) -> None:
    server.faults = {"apply": ["503"], "get": ["404", ""]}
    made = provider(server, seconds=0.1)
    metadata = {**POD["metadata"], "managedFields": [{"manager": "kubectl"}]}
    server.objects["web"] = {**POD, "metadata": metadata}
    with pytest.raises(ProviderError, match="was not created"):
        made.create(Resource(URN), POD, preview=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deletion_is_asked_for_until_it_is_done(server: ApiServer, fault: str) -> None:
    made = provider(server)
    server.objects["web"] = POD
    server.faults = {"delete": [fault, ""]}
    made.delete(Resource(URN, "demo/web", timeout=20), POD, POD)
    assert server.objects == {}


def test_a_server_that_never_answered_is_not_waited_for(server: ApiServer) -> None:
    server.faults = {"discover": ["lost"]}
    made = KubernetesProvider()
    made.configure({"kubeconfig": server.kubeconfig})
    with pytest.raises(ProviderError, match="is unreachable"):
        made.create(Resource(URN), POD, preview=False)
    assert server.seen == ["discover"]


def test_a_cluster_that_is_away_is_no_move_to_another_namespace(server: ApiServer) -> None:
    server.faults = {"discover": ["lost"]}
    made = KubernetesProvider()
    made.configure({"kubeconfig": server.kubeconfig})
    new = {**POD, "metadata": {"name": "web"}}
    assert made.check(Resource(URN), POD, new, b"1").inputs == POD


def test_an_unreachable_cluster_is_what_the_settings_say(server: ApiServer) -> None:
    """As the official plugin: an error, or out of the state, or left as it was."""
    server.faults = {kind: ["lost"] for kind in ("version", "discover", "get", "delete")}
    resource = Resource(URN, "demo/web")

    def configured(**settings: bool) -> KubernetesProvider:
        made = KubernetesProvider()
        made.configure({"kubeconfig": server.kubeconfig, **settings})
        made._cluster._patience.seconds = 0
        return made

    with pytest.raises(ProviderError, match="PULUMI_K8S_DELETE_UNREACHABLE=true"):
        configured().delete(resource, POD, POD)
    with pytest.raises(ProviderError, match="PULUMI_K8S_DELETE_UNREACHABLE=true"):
        configured().read(resource, POD, POD)
    configured(deleteUnreachable=True).delete(resource, POD, POD)
    assert configured(deleteUnreachable=True).read(resource, POD, POD).resource_id == ""
    left = configured(skipUpdateUnreachable=True)
    assert left.read(resource, POD, POD).inputs == POD
    assert left.check(resource, POD, {**POD, "spec": {}}, b"1").inputs == POD
