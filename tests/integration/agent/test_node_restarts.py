"""The agent's own ends and beginnings: pods are let go and taken up again, and nothing runs twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import TOLERATIONS, Agent, Cluster, Pod, Workspace, command, condition
from tests.waiting import until

MakeWorkspace = Callable[[Agent], Workspace]


@pytest.fixture
def own(make_agent: AgentFactory) -> Agent:
    """An agent of the test's own, which runs."""
    agent = make_agent("own")
    agent.start()
    return agent


@pytest.fixture
def place(own: Agent, make_workspace: MakeWorkspace) -> Workspace:
    """A place on the test's own agent."""
    return make_workspace(own)


def _in_flight(agent: Agent) -> bool:
    return agent.metrics()["krustlet_wasm_instances"] >= 1


def _stop(agent: Agent, *, kill: bool) -> None:
    if kill:
        agent.kill()
    else:
        assert agent.stop() == 0


def _restarted(pod: Pod, count: int) -> None:
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count == count, f"restart {count}", 30)
    pod.wait_ready()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has one loopback address")
def test_a_machine_with_another_address_says_so_of_the_pods_that_it_takes_up_again(
    own: Agent, place: Workspace
) -> None:
    pod = place.serve().wait_ready()
    own.stop()
    own.move()
    own.start()
    _restarted(pod, 1)
    status = pod.read().status
    assert (status.host_ip, [each.ip for each in status.host_ips]) == (own.address, [own.address])
    assert (status.pod_ip, [each.ip for each in status.pod_ips]) == (own.address, [own.address])
    assert pod.get("/version").ok


def test_ready_goes_false_before_the_pods_are_taken_up_and_restart_count_rises(
    own: Agent, place: Workspace, cluster: Cluster
) -> None:
    pod = place.serve().wait_ready()
    own.kill()
    moment = cluster.moment()
    own.start()
    _restarted(pod, 1)
    nodes = cluster.changes(moment, cluster.core.list_node, field_selector=f"metadata.name={own.name}")
    readiness = [
        (condition(event["object"], "Ready"), int(event["object"].metadata.resource_version))
        for event in nodes
    ]
    unready = next(version for status, version in readiness if status == "False")
    pods = cluster.changes(
        moment,
        cluster.core.list_namespaced_pod,
        place.namespace,
        field_selector=f"metadata.name={pod.name}",
    )
    first = min(int(event["object"].metadata.resource_version) for event in pods)
    assert unready < first
    assert readiness[-1][0] == "True"
    last = pod.status().last_state.terminated
    assert last.exit_code == 137
    own.kill()
    own.start()
    _restarted(pod, 2)
    assert pod.get("/version").ok


def test_sigterm_finishes_requests_in_flight_and_keeps_the_pods(
    own: Agent, place: Workspace, cluster: Cluster
) -> None:
    pod = place.serve(
        volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}],
        pod={"volumes": [{"name": "scratch", "emptyDir": {}}]},
    ).wait_ready()
    assert pod.get("/write", path="/scratch/mark", text="kept").ok
    answers: list[str] = []
    request = threading.Thread(target=lambda: answers.append(pod.get("/sleep", ms=2000).text))
    request.start()
    until(lambda: _in_flight(own), "the request to be in flight", every=0.05)
    moment = cluster.moment()
    assert own.stop() == 0
    request.join()
    assert answers == ["slept\n"]
    assert own.condition("Ready") == "False"
    kept = pod.read()
    assert (kept.metadata.deletion_timestamp, kept.status.phase) == (None, "Running")
    assert condition(kept, "Ready") == "False"
    events = cluster.changes(moment, cluster.core.list_namespaced_event, place.namespace)
    reasons = {item["object"].reason for item in events if item["object"].involved_object.uid == pod.uid}
    assert "Killing" not in reasons
    own.start()
    _restarted(pod, 1)
    assert pod.get("/read", path="/scratch/mark").text == "kept"
    assert "panicked" not in own.log


def test_a_pod_that_is_deleted_while_the_agent_drains_ends_as_deleted(own: Agent, place: Workspace) -> None:
    slow, other = place.serve().wait_ready(), place.serve().wait_ready()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            slow.get("/sleep", ms=4000)
        except requests.RequestException as error:
            errors.append(error)

    request = threading.Thread(target=ask)
    request.start()
    until(lambda: _in_flight(own), "the request to be in flight", every=0.05)
    assert own.process is not None
    own.process.terminate()
    until(lambda: '"stopping: ' in own.log, "the drain to begin", every=0.05)
    slow.wait(lambda seen: condition(seen, "Ready") == "False", "the drain to reach the pod", 10)
    slow.delete(grace=20)
    slow.wait_gone(timeout=15)
    assert own.stop() == 0
    request.join()
    assert errors == []
    assert other.exists()
    assert other.read().metadata.deletion_timestamp is None


def test_an_ended_pod_that_a_finalizer_keeps_does_not_keep_the_agent(own: Agent, place: Workspace) -> None:
    pod = place.serve().wait_ready()
    pod.patch({"metadata": {"finalizers": ["example.com/hold"]}})
    try:
        pod.delete(grace=5)
        pod.wait(lambda seen: seen.status.container_statuses[0].state.terminated, "the pod to end")
        assert own.stop() == 0
        own.start()
        assert pod.status().restart_count == 0
    finally:
        pod.patch({"metadata": {"finalizers": None}})
    pod.wait_gone(timeout=10)


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_what_has_ended_is_never_run_again_by_the_next_agent(
    own: Agent, place: Workspace, cluster: Cluster, kill: bool
) -> None:
    name = place.unique("job")
    template = {
        "restartPolicy": "OnFailure",
        "nodeName": own.name,
        "tolerations": TOLERATIONS,
        "containers": [command(place.cli_image, "print", "once")],
    }
    body = {"metadata": {"name": name}, "spec": {"template": {"spec": template}}}
    cluster.batch.create_namespaced_job(place.namespace, body)
    pod = place.run("exit", "4")
    pod.wait_phase("Failed")

    def succeeded() -> Any:
        return cluster.batch.read_namespaced_job(name, place.namespace).status.succeeded == 1

    until(succeeded, "the job to complete")
    runs = place.core.list_namespaced_pod(place.namespace, label_selector=f"job-name={name}").items
    assert len(runs) == 1
    moment = cluster.moment()
    _stop(own, kill=kill)
    own.start()
    # Whatever the agent does with the pods that it finds, it has done when a new one is served.
    place.serve().wait_ready()
    touched = cluster.changes(moment, cluster.core.list_namespaced_pod, place.namespace)
    names = {event["object"].metadata.name for event in touched}
    assert not names & {pod.name, runs[0].metadata.name}
    assert own.metrics()["krustlet_container_restarts_total"] == 0
    log = place.core.read_namespaced_pod_log(runs[0].metadata.name, place.namespace)
    assert log == "once\n"
    cluster.batch.delete_namespaced_job(name, place.namespace, propagation_policy="Foreground")


def test_a_command_that_may_run_only_once_is_not_begun_again_after_a_crash(
    own: Agent, place: Workspace
) -> None:
    pod = place.run("print", "begun", "then", "sleep", "60000")
    pod.wait_phase("Running")
    until(lambda: pod.logs() == "begun\n", "the command to print")
    own.kill()
    own.start()
    status = pod.wait_phase("Failed").container_statuses[0]
    assert (status.restart_count, status.state.terminated.exit_code) == (0, 137)
    assert pod.logs() == "begun\n"


def test_a_command_that_may_be_restarted_is_after_a_crash(own: Agent, place: Workspace) -> None:
    pod = place.run("print", "begun", "then", "sleep", "60000", pod={"restart": "OnFailure"})
    pod.wait_phase("Running")
    until(lambda: pod.logs() == "begun\n", "the command to print")
    own.kill()
    own.start()
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count == 1, "a restart", 30)
    assert pod.status().last_state.terminated.exit_code == 137
    until(lambda: pod.logs() == "begun\n", "the second run to print")
    assert pod.logs(previous=True) == "begun\n"


def test_restart_count_and_last_state_outlive_the_agent_in_a_crash_loop(
    own: Agent, place: Workspace, cluster: Cluster
) -> None:
    moment = cluster.moment()
    pod = place.run("exit", "9", pod={"restart": "Always"})
    pod.wait_waiting("CrashLoopBackOff")
    before = pod.status().restart_count
    own.kill()
    own.start()
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count > before, "one more restart", 30)
    assert pod.status().last_state.terminated.exit_code == 9
    seen = cluster.changes(
        moment,
        cluster.core.list_namespaced_pod,
        place.namespace,
        field_selector=f"metadata.name={pod.name}",
    )
    statuses = [event["object"].status.container_statuses for event in seen]
    counts = [status[0].restart_count for status in statuses if status]
    assert counts == sorted(counts)


def test_a_pod_has_its_port_again_after_a_restart_though_an_older_one_waits_for_it(
    own: Agent, place: Workspace
) -> None:
    port = place.port()
    older = place.serve(port=port, image=f"{place.registry.uri}/not-there:latest")
    older.wait_waiting("ErrImagePull")
    pod = place.serve(port=port).wait_ready()
    older.set_image(place.http_image)
    assert pod.name in older.wait_waiting("PortInUse")
    own.restart()
    _restarted(pod, 1)
    assert pod.name in older.wait_waiting("PortInUse")
    pod.delete(grace=0)
    older.wait_ready()


def test_pods_that_went_while_no_agent_ran_leave_nothing_behind(own: Agent, place: Workspace) -> None:
    volume = {"name": "scratch", "emptyDir": {}}
    mount = [{"name": "scratch", "mountPath": "/scratch"}]
    forced, graceful = (
        place.serve(volumeMounts=mount, pod={"volumes": [volume]}).wait_ready() for _ in range(2)
    )
    places = [
        directory
        for pod in (forced, graceful)
        for directory in (
            own.data_dir / "pods" / pod.uid,
            own.data_dir / "logs" / f"{pod.namespace}_{pod.name}_{pod.uid}",
        )
    ]
    assert all(directory.exists() for directory in places)
    own.kill()
    forced.delete(grace=0)
    graceful.delete(grace=5)
    assert graceful.exists()
    own.start()
    graceful.wait_gone(timeout=15)
    until(lambda: not any(item.exists() for item in places), "the pods' files to be gone", timeout=10)


def test_a_pod_that_was_made_anew_under_its_name_while_no_agent_ran_is_a_new_pod(
    own: Agent, place: Workspace
) -> None:
    name, port = place.unique("same"), place.port()
    mount = [{"name": "scratch", "mountPath": "/scratch"}]
    fields: dict[str, Any] = {"name": name, "volumes": [{"name": "scratch", "emptyDir": {}}]}
    old = place.serve(port=port, volumeMounts=mount, pod=fields).wait_ready()
    assert old.get("/write", path="/scratch/mark", text="old").ok
    own.kill()
    old.delete(grace=0)
    new = place.serve(port=port, volumeMounts=mount, pod=fields)
    own.start()
    new.wait_ready()
    assert new.status().restart_count == 0
    assert new.get("/read", path="/scratch/mark").status_code == 404


def test_the_second_agent_in_a_data_directory_refuses_to_start_and_says_why(own: Agent) -> None:
    second = subprocess.run(own.command(), capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode not in (0, None)
    assert "another krustlet uses the data directory" in second.stderr
    assert own.answers()


@pytest.mark.parametrize("garbage", [b"\x00\xff garbage {", b""], ids=["garbage", "empty"])
def test_garbage_in_the_data_directory_does_not_stop_the_agent(
    own: Agent, place: Workspace, garbage: bytes
) -> None:
    pod = place.serve().wait_ready()
    ended = place.run("print", "done")
    ended.wait_phase("Succeeded")
    own.kill()
    spoilt = 0
    for path in sorted(own.data_dir.rglob("*")):
        if path.is_file() and path.name != "lock" and "volumes" not in path.parts:
            path.write_bytes(garbage)
            spoilt += 1
    assert spoilt > 5
    for directory in ("pods/unknown", "logs/unknown", "images", "pki", "precompiled"):
        (own.data_dir / directory).mkdir(parents=True, exist_ok=True)
        (own.data_dir / directory / "garbage").write_bytes(garbage)
    own.start()
    _restarted(pod, 1)
    assert pod.get("/version").ok
    assert (ended.read().status.phase, ended.logs()) == ("Succeeded", "")
    assert "panicked" not in own.log


def _loads(agent: Agent) -> dict[str, float]:
    return {name: value for name, value in agent.metrics().items() if "module_loads" in name}


def test_compiled_code_is_the_agents_alone_and_what_another_hand_changed_is_compiled_anew(
    own: Agent, place: Workspace
) -> None:
    pod = place.serve().wait_ready()
    assert own.data_dir.stat().st_mode & 0o777 == 0o700
    (code,) = own.data_dir.rglob("*.cwasm")
    assert code.parent.stat().st_mode & 0o777 == 0o700
    assert code.stat().st_mode & 0o777 == 0o600
    assert all(item.stat().st_mode & 0o077 == 0 for item in code.parent.iterdir())
    own.restart()
    _restarted(pod, 1)
    assert _loads(own).get('krustlet_module_loads_total{source="disk"}') == 1
    own.stop()
    content = bytearray(code.read_bytes())
    content[len(content) // 2] ^= 1
    code.write_bytes(content)
    own.start()
    _restarted(pod, 2)
    assert pod.get("/version").ok
    assert _loads(own).get('krustlet_module_loads_total{source="compiled"}') == 1
    assert "did not write" in own.log
    assert code.read_bytes() != bytes(content)


def test_images_that_no_pod_uses_make_room_where_the_disk_is_full(
    make_agent: AgentFactory, make_workspace: MakeWorkspace
) -> None:
    agent = make_agent("full-disk")
    agent.start()
    place = make_workspace(agent)
    stays = place.serve().wait_ready()
    goes = place.run("print", "done")
    goes.wait_phase("Succeeded")
    images = agent.data_dir / "images" / "blobs"
    both = {path.name for path in images.iterdir()}
    wanted = place.http_image.rpartition(":")[2]
    unused = place.cli_image.rpartition(":")[2]
    assert {wanted, unused} <= both
    agent.stop()
    # What was used a moment ago is not removed: it was yesterday.
    for blob in images.iterdir():
        os.utime(blob, (0, 0))
    agent.flags = ["--image-gc-high-threshold=1", "--image-gc-low-threshold=0"]
    agent.start()
    until(lambda: unused not in {path.name for path in images.iterdir()}, "the unused image to go")
    stays.wait_ready()
    assert stays.get("/healthz").ok
    assert wanted in {path.name for path in images.iterdir()}
    assert len(list((agent.data_dir / "precompiled").glob("*.cwasm"))) == 1
    assert agent.metrics()["krustlet_images_removed_total"] == 1
    again = place.run("print", "pulled again")
    again.wait_phase("Succeeded")
    assert again.logs() == "pulled again\n"
