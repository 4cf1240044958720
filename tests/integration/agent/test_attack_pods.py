"""Attacks on a pod's life, and what a user of the kubelet expects: hooks, ports, limits, restarts, ends."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
import wasmtime

from tests.integration.agent.harness import Agent, Manifest, Workspace, command, layout, served, status_of
from tests.integration.agent.link import Link
from tests.waiting import until

FAILING_HOOK = {"postStart": {"httpGet": {"port": 1, "path": "/"}}}
UNFINISHED = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\10\\00\\00\\00\\0a\\00\\00\\00")
  (data (i32.const 16) "first\\nrest")
  (func (export "_start")
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
"""

# Hooks


def test_under_never_a_command_whose_post_start_hook_fails_runs_once_and_the_pod_fails(
    space: Workspace,
) -> None:
    pod = space.run("sleep", "60000", lifecycle=FAILING_HOOK)
    end = pod.wait_phase("Failed").container_statuses[0].state.terminated
    assert end.exit_code == 137
    assert "postStart hook failed" in end.message
    pod.wait_event("FailedPostStartHook", "postStart hook failed")
    assert pod.status().restart_count == 0
    assert [item.count for item in pod.events("Started")] == [1]


@pytest.mark.parametrize("policy", ["OnFailure", "Always"])
def test_a_failed_post_start_hook_is_counted_and_waited_for_as_any_failure(
    space: Workspace, policy: str
) -> None:
    pod = space.run("sleep", "60000", lifecycle=FAILING_HOOK, pod={"restart": policy})
    pod.wait_waiting("CrashLoopBackOff")
    assert pod.status().restart_count == 1
    assert pod.status().last_state.terminated.exit_code == 137


def test_under_never_a_server_whose_post_start_hook_fails_ends(space: Workspace) -> None:
    pod = space.serve(lifecycle=FAILING_HOOK, pod={"restart": "Never"})
    pod.wait_phase("Failed")
    assert [item.count for item in pod.events("Started")] == [1]


def test_a_command_that_ends_before_its_hook_fails_keeps_its_exit_code(space: Workspace) -> None:
    listener = space.serve().wait_ready()
    slow = {"host": space.agent.address, "port": listener.port, "path": "/sleep?ms=1500"}
    pod = space.run("exit", "7", lifecycle={"postStart": {"httpGet": slow}})
    assert pod.wait_phase("Failed").container_statuses[0].state.terminated.exit_code == 7


def test_hooks_go_where_the_node_has_the_port_and_take_https(space: Workspace) -> None:
    host_port = space.port()
    hooks = {
        "postStart": {"httpGet": {"port": 80, "path": "/log?text=by-number"}},
        "preStop": {"httpGet": {"port": "http", "path": "/sleep?ms=10", "scheme": "HTTPS"}},
    }
    ports = [{"name": "http", "containerPort": 80, "hostPort": host_port}]
    pod = space.pod(
        {"name": "web", "image": space.http_image, "ports": ports, "lifecycle": hooks}
    ).wait_ready()
    assert "by-number" in pod.logs()
    pod.delete(grace=20)
    pod.wait_gone(timeout=15)
    assert pod.events("FailedPreStopHook") == []


# Ports


def test_each_tcp_port_is_served_and_of_the_others_it_is_said_that_they_are_not(space: Workspace) -> None:
    first, second, third = space.port(), space.port(), space.port()
    ports = [
        {"name": "dns", "containerPort": first, "protocol": "UDP"},
        {"name": "http", "containerPort": first},
        {"name": "metrics", "containerPort": second},
        {"containerPort": 81, "hostPort": third, "protocol": "TCP"},
        {"containerPort": 82, "hostPort": space.port(), "protocol": "SCTP"},
    ]
    probe = {"httpGet": {"port": "metrics", "path": "/healthz"}, "periodSeconds": 1}
    pod = space.pod({"name": "web", "image": space.http_image, "ports": ports, "readinessProbe": probe})
    pod.wait_ready()
    for number in (first, second, third):
        pod.port = number
        assert pod.get("/version").text == "1", number
    assert "UDP" in pod.wait_event("PortNotServed", "UDP")
    assert "SCTP" in pod.wait_event("PortNotServed", "SCTP")


def test_a_pod_with_a_udp_port_alone_is_not_served_on_its_number(space: Workspace) -> None:
    port = space.port()
    ports = [{"containerPort": port, "protocol": "UDP"}]
    pod = space.pod({"name": "web", "image": space.http_image, "ports": ports})
    assert "TCP" in pod.wait_waiting("CreateContainerError")


def test_a_container_with_thousands_of_ports_listens_on_none_of_them(space: Workspace, agent: Agent) -> None:
    ports = [{"containerPort": number} for number in range(10_000, 15_000)]
    pod = space.pod({"name": "web", "image": space.http_image, "ports": ports})
    assert "a pod may have 1024 ports" in pod.wait_waiting("CreateContainerConfigError")
    with socket.socket() as client:
        assert client.connect_ex((agent.address, 12_000)) != 0


def test_two_pods_that_want_the_same_two_ports_do_not_wait_for_each_other(space: Workspace) -> None:
    one, two = space.port(), space.port()

    def web(*numbers: int) -> dict[str, object]:
        return {"name": "web", "image": space.http_image, "ports": [{"containerPort": n} for n in numbers]}

    pods = [space.pod(web(one, two)), space.pod(web(two, one))]

    def ready() -> int | None:
        found = [
            status_of(pod.read()).ready if pod.read().status.container_statuses else False for pod in pods
        ]
        return found.index(True) if any(found) else None

    winner = until(lambda: None if ready() is None else f"{ready()}", "one of them to be served")
    loser = pods[1 - int(winner)]
    loser.wait_waiting("PortInUse")
    pods[int(winner)].delete(grace=0)
    loser.wait_ready()


# Limits and annotations


def test_a_limit_of_zero_is_none(space: Workspace) -> None:
    assert space.serve(resources={"limits": {"cpu": "0", "memory": "0"}}).wait_ready().get("/version").ok


def test_a_container_has_no_more_memory_than_its_pod(space: Workspace) -> None:
    limited = {"resources": {"limits": {"memory": "32Mi"}}}
    pod = space.run("alloc", "64", pod=limited)
    assert pod.wait_phase("Failed").container_statuses[0].state.terminated.reason == "OOMKilled"
    fits = space.run("alloc", "8", pod=limited)
    fits.wait_phase("Succeeded")


def test_a_duration_may_have_several_units(space: Workspace) -> None:
    annotations = {"krustlet.dev/request-timeout": "0m1.5s"}
    pod = space.serve(pod={"annotations": annotations}).wait_ready()
    assert pod.get("/sleep", ms=200).ok
    assert pod.get("/sleep", ms=5000).status_code == 504


# Restarts by rules


def test_a_rule_restarts_a_container_that_its_policy_would_not(space: Workspace) -> None:
    rules = [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]
    fields: Manifest = {"restartPolicy": "Never", "restartPolicyRules": rules}
    again = space.run("exit", "42", **fields)
    again.wait_waiting("CrashLoopBackOff")
    assert again.status().restart_count == 1
    other = space.run("exit", "41", **fields)
    assert other.wait_phase("Failed").container_statuses[0].restart_count == 0


def test_a_rule_restarts_all_containers_init_containers_first(space: Workspace) -> None:
    rules = [{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]
    trigger = command(
        space.cli_image, "exit", "42", name="main", restartPolicy="Never", restartPolicyRules=rules
    )
    init = command(space.cli_image, "print", "init", name="init")
    pod = space.pod(trigger, served(space.http_image, space.port()), init=[init], restart="Never")
    pod.wait(lambda seen: status_of(seen, "web").restart_count >= 1 or None, "the server to be restarted")
    pod.wait(lambda seen: status_of(seen, "init").restart_count >= 1 or None, "the init container to be")


# Logs


def test_a_log_without_a_last_line_break_is_given_none(space: Workspace) -> None:
    image = space.registry.push("unfinished", layout(bytes(wasmtime.wat2wasm(UNFINISHED))))
    pod = space.run(image=image)
    pod.wait_phase("Succeeded")
    assert pod.logs() == "first\nrest"


# Events


def test_what_happens_while_the_api_server_is_away_is_told_later_with_its_time(
    make_agent: Callable[..., Agent], make_workspace: Callable[[Agent], Workspace], link: Link
) -> None:
    agent = make_agent("events-outage")
    link.carry(agent)
    agent.start()
    space = make_workspace(agent)
    pod = space.run("sleep", "1500", "then", "exit", "3", pod={"restart": "Always"})
    pod.wait_phase("Running")
    pod.wait_event("Started")
    with link.refused():
        log = agent.data_dir / "logs" / f"{space.namespace}_{pod.name}_{pod.uid}" / "main" / "1.log"
        until(log.exists, "the second run to begin")
        restored = datetime.now(UTC)
    again = until(
        lambda: next((item for item in pod.events("Started") if item.count == 2), None),
        "the second start to be told",
    )
    assert again.last_timestamp <= restored


def test_a_grace_period_beyond_every_clock_is_a_long_one(space: Workspace, agent: Agent) -> None:
    before = len(agent.log)
    pod = space.serve(pod={"terminationGracePeriodSeconds": 2**63 - 1}).wait_ready()
    pod.delete()

    def heard() -> bool:
        return any(pod.uid in line and "pod is deleted" in line for line in agent.log.splitlines())

    until(heard, "the agent to hear of it")
    # No request is left that it had to wait for.
    pod.wait_gone()
    assert "panicked" not in agent.log[before:]
