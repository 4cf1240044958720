"""Pod contract, probes: readiness drives the condition, liveness restarts, startup gates."""

from __future__ import annotations

import time

import pytest

from tests.integration.agent.harness import Manifest, Workspace, condition, http_probe, status_of

SCRATCH: Manifest = {"volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}]}
VOLUMES: Manifest = {"volumes": [{"name": "scratch", "emptyDir": {}}]}
MARK = "/healthz?file=/scratch/ok"


def test_readiness_drives_the_ready_condition_both_ways_and_never_restarts(space: Workspace) -> None:
    port = space.port()
    probe = http_probe(port, MARK)
    pod = space.serve(port=port, readinessProbe=probe, pod=VOLUMES, **SCRATCH)
    pod.wait_event("Unhealthy", "Readiness probe failed")
    seen = pod.wait_unready()
    assert condition(seen, "ContainersReady") == "False"
    assert status_of(seen).started is True
    assert pod.get("/write", path="/scratch/ok", text="x").ok
    pod.wait_ready(timeout=10)
    assert pod.get("/remove", path="/scratch/ok").ok
    pod.wait_unready(timeout=10)
    assert pod.status().restart_count == 0


def test_a_pod_is_not_ready_before_its_initial_delay(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(port=port, readinessProbe=http_probe(port, initialDelaySeconds=3))
    pod.wait_ready()
    status = pod.read().status
    ready = next(item for item in status.conditions if item.type == "Ready")
    started = status.container_statuses[0].state.running.started_at
    # Both are cut to the second.
    assert (ready.last_transition_time - started).total_seconds() >= 2
    assert status.container_statuses[0].restart_count == 0


def test_a_failed_liveness_probe_restarts_the_container_and_says_why(space: Workspace) -> None:
    port = space.port()
    probe = http_probe(port, "/healthz?file=/scratch/none", failureThreshold=2)
    pod = space.serve(
        port=port,
        livenessProbe=probe,
        pod={**VOLUMES, "terminationGracePeriodSeconds": 1},
        **SCRATCH,
    )
    pod.wait(lambda seen: status_of(seen).restart_count >= 1, "a restart")
    last = pod.status().last_state.terminated
    assert (last.exit_code, last.reason) == (137, "Error")
    assert "liveness" in last.message
    assert "503" in pod.wait_event("Unhealthy", "Liveness probe failed")
    assert "liveness" in pod.wait_event("Killing")


def test_a_healthy_container_is_left_alone_by_its_liveness_probes(space: Workspace) -> None:
    port = space.port()
    by_http = space.serve(port=port, livenessProbe=http_probe(port))
    other = space.port()
    by_tcp = space.serve(
        port=other, livenessProbe={"tcpSocket": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 1}
    )
    by_http.wait_ready()
    by_tcp.wait_ready()
    began = time.monotonic()
    by_http.wait(lambda _: time.monotonic() > began + 3, "three probes")
    for pod in (by_http, by_tcp):
        assert pod.status().restart_count == 0
        assert pod.events("Unhealthy") == []


def test_a_tcp_probe_to_a_port_where_nobody_listens_fails(space: Workspace) -> None:
    probe = {"tcpSocket": {"port": space.port()}, "periodSeconds": 1, "failureThreshold": 1}
    pod = space.serve(readinessProbe=probe)
    pod.wait_event("Unhealthy", "Readiness probe failed")
    pod.wait_unready()


def test_a_startup_probe_holds_the_others_back_until_it_succeeds(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(
        port=port,
        startupProbe=http_probe(port, MARK, failureThreshold=30),
        livenessProbe=http_probe(port, "/healthz?file=/scratch/alive"),
        readinessProbe=http_probe(port),
        pod=VOLUMES,
        **SCRATCH,
    )
    pod.wait_event("Unhealthy", "Startup probe failed")
    status = status_of(pod.wait_unready())
    assert (status.started, status.ready, status.restart_count) == (False, False, 0)
    assert pod.get("/write", path="/scratch/alive", text="x").ok
    assert pod.get("/write", path="/scratch/ok", text="x").ok
    pod.wait_ready(timeout=10)
    assert pod.status().started is True
    assert {item.message.split()[0] for item in pod.events("Unhealthy")} == {"Startup"}


def test_a_startup_probe_that_never_succeeds_restarts_the_container(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(
        port=port,
        startupProbe=http_probe(port, "/status?code=500", failureThreshold=2),
        pod={"terminationGracePeriodSeconds": 1},
    )
    pod.wait(lambda seen: status_of(seen).restart_count >= 1, "a restart")
    assert "startup" in pod.wait_event("Killing")
    assert pod.status().started is False


def test_a_probe_that_takes_longer_than_its_timeout_fails(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(port=port, readinessProbe=http_probe(port, "/sleep?ms=2500", timeoutSeconds=1))
    pod.wait_event("Unhealthy", "Readiness probe failed")
    pod.wait_unready()


def test_as_many_successes_as_the_threshold_says_make_a_pod_ready(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(port=port, readinessProbe=http_probe(port, successThreshold=3))
    pod.wait_ready()
    status = pod.read().status
    ready = next(item for item in status.conditions if item.type == "Ready")
    started = status.container_statuses[0].state.running.started_at
    assert (ready.last_transition_time - started).total_seconds() >= 1


def test_probe_headers_arrive_and_redirect_codes_are_success(space: Workspace) -> None:
    port = space.port()
    probe = http_probe(port, "/status?code=302")
    probe["httpGet"]["httpHeaders"] = [{"name": "X-Who", "value": "probe"}]
    space.serve(port=port, readinessProbe=probe).wait_ready()


@pytest.mark.parametrize(
    ("kind", "probe", "why"),
    [
        ("livenessProbe", {"exec": {"command": ["true"]}}, "exec is not supported"),
        ("readinessProbe", {"grpc": {"port": 1}}, "grpc is not supported"),
        ("startupProbe", {"exec": {"command": ["true"]}}, "exec is not supported"),
    ],
)
def test_a_probe_that_wasm_cannot_answer_is_refused_with_the_reason(
    space: Workspace, kind: str, probe: Manifest, why: str
) -> None:
    fields: Manifest = {kind: probe}
    pod = space.serve(**fields)
    message = pod.wait_waiting("CreateContainerConfigError")
    assert kind in message
    assert why in message
    pod.wait_event("Failed", why)
