"""Attacks over the network: what clients and guests do to a pod costs that pod, not its neighbours."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.integration.agent.harness import Agent, Pod, Workspace, http_probe
from tests.waiting import until

ASK = b"GET /version HTTP/1.1\r\nhost: guest\r\n\r\n"


@contextlib.contextmanager
def connections(pod: Pod, count: int, begin: bytes) -> Iterator[list[socket.socket]]:
    """So many connections to a pod, each of which sends this and no more."""
    address = (pod.space.agent.address, pod.port)
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(address)
            opened.append(client)
        with selectors.DefaultSelector() as selector:
            for client in opened:
                selector.register(client, selectors.EVENT_WRITE, client)
            waiting = count
            # Those beyond the listener's backlog do not get through; a flood has some of these.
            while waiting and (ready := selector.select(timeout=2)):
                for key, _ in ready:
                    selector.unregister(key.fileobj)
                    waiting -= 1
                    with contextlib.suppress(OSError):
                        key.data.send(begin)
        yield opened


def _neighbour(space: Workspace) -> Pod:
    """A pod that its liveness probe restarts when it does not answer within a second."""
    port = space.port()
    probe = http_probe(port, timeoutSeconds=1)
    return space.serve(port=port, livenessProbe=probe, readinessProbe=probe).wait_ready()


def _is_served(pod: Pod, times: int = 20) -> None:
    for _ in range(times):
        assert requests.get(f"{pod.url}/version", timeout=5).status_code == 200


def _never_restarted(pod: Pod) -> None:
    status = pod.status()
    assert (status.restart_count, status.ready) == (0, True), pod.describe()


def test_slow_requests_of_one_pod_leave_the_others_their_instances(space: Workspace, agent: Agent) -> None:
    annotations = {"krustlet.dev/max-concurrent-requests": "100000"}
    greedy = space.serve(pod={"annotations": annotations}).wait_ready()
    neighbour = _neighbour(space)
    slow = b"GET /sleep?ms=15000 HTTP/1.1\r\nhost: guest\r\n\r\n"
    with connections(greedy, 2300, slow):
        until(lambda: agent.metrics()["krustlet_wasm_instances"] > 400, "the pod to have its share")
        _is_served(neighbour)
        late = space.serve().wait_ready()
        _is_served(late)
        assert agent.metrics()["krustlet_wasm_instances"] < 1000, "half of what the node can hold"
        _never_restarted(neighbour)
    until(lambda: agent.metrics()["krustlet_wasm_instances"] < 10, "what nobody waits for to be gone")
    _is_served(greedy, times=3)


@pytest.mark.parametrize(
    "begin",
    [b"", b"GET /version HTTP/1.1\r\nhost: gu", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ASK],
    ids=["silent", "half-sent", "http2-preface", "kept"],
)
def test_connections_that_do_nothing_take_no_others_room(space: Workspace, begin: bytes) -> None:
    flooded = space.serve().wait_ready()
    neighbour = _neighbour(space)
    with connections(flooded, 5000, begin):
        _is_served(neighbour)
        # Nor that of clients of the same pod: the one that is idle for longest gives way.
        _is_served(flooded, times=5)
        late = space.serve().wait_ready()
        _is_served(late, times=3)
        _never_restarted(neighbour)


def test_clients_that_do_not_read_take_no_others_room(space: Workspace) -> None:
    flooded = space.serve().wait_ready()
    neighbour = _neighbour(space)
    with connections(flooded, 600, b"GET /stream?chunks=1000000&ms=0 HTTP/1.1\r\nhost: guest\r\n\r\n"):
        _is_served(neighbour)
        _never_restarted(neighbour)


def test_endless_loops_in_many_containers_of_a_pod_delay_others_no_more_than_in_one(space: Workspace) -> None:
    neighbour = _neighbour(space)
    spinners = [
        {"name": f"spin-{number}", "image": space.cli_image, "args": ["spin"]} for number in range(20)
    ]
    pod = space.pod(*spinners, restart="Never")
    pod.wait_phase("Running")
    _is_served(neighbour, times=50)
    _never_restarted(neighbour)


def test_a_guest_that_floods_its_log_delays_nobody(space: Workspace) -> None:
    neighbour = _neighbour(space)
    talker = space.serve().wait_ready()
    with ThreadPoolExecutor(8) as pool:
        flood = [pool.submit(talker.get, "/log", text="x" * 10_000) for _ in range(400)]
        _is_served(neighbour, times=50)
        assert all(answer.result().ok for answer in flood)
    _never_restarted(neighbour)


def test_a_thousand_connections_wait_for_their_turn_and_none_is_refused(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    with connections(pod, 1000, ASK) as clients:
        for client in clients:
            client.settimeout(20)
            assert client.recv(12) == b"HTTP/1.1 200"


def test_a_stream_lasts_longer_than_a_request_may_take(space: Workspace) -> None:
    pod = space.serve(pod={"annotations": {"krustlet.dev/request-timeout": "1s"}}).wait_ready()
    assert pod.get("/stream", chunks=8, ms=300).text.count("\n") == 8
    short = space.serve(pod={"annotations": {"krustlet.dev/stream-idle-timeout": "200ms"}}).wait_ready()
    with pytest.raises(requests.RequestException):
        short.get("/stream", chunks=3, ms=5000)
    assert "stream idle timeout" in short.logs()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /version HTTP/1.0\r\n", b"200"),
        (b"GET /version HTTP/1.1\r\n", b"400"),
        (b"GET /version HTTP/1.1\r\nhost: a\r\nhost: a\r\n", b"400"),
        (b"GET /version HTTP/1.1\r\nhost: a b\r\n", b"400"),
        (b"GET /version HTTP/1.1\r\nhost: u@h\r\n", b"400"),
        (b"GET /version HTTP/1.1\r\nhost: h:99999\r\n", b"400"),
        (b"HEAD /version HTTP/1.1\r\nhost: h\r\n", b"200"),
        (b"GET /status?code=304 HTTP/1.1\r\nhost: h\r\n", b"304"),
    ],
)
def test_requests_get_the_status_that_http_says(space: Workspace, head: bytes, status: bytes) -> None:
    pod = space.serve().wait_ready()
    with socket.create_connection((space.agent.address, pod.port), timeout=10) as client:
        client.sendall(head + b"connection: close\r\n\r\n")
        assert client.recv(12)[9:] == status
