"""Pod contract, the end: grace, preStop, requests in flight, deadlines; and who a pod is."""

from __future__ import annotations

import threading
import time

import pytest
import requests

from tests.integration.agent.harness import Pod, Workspace, condition
from tests.waiting import until


class Request(threading.Thread):
    """A request in the background, and how it ended."""

    def __init__(self, pod: Pod, path: str) -> None:
        super().__init__()
        self.url = f"{pod.url}{path}"
        self.text = ""
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            self.text = requests.get(self.url, timeout=30).text
        except requests.RequestException as error:
            self.error = str(error)


def _in_flight(space: Workspace, pod: Pod) -> bool:
    """Whether the pod holds an instance now."""
    return bool(space.agent.metrics()["krustlet_wasm_instances"] >= 1) and pod.exists()


def test_a_deleted_pod_finishes_its_requests_in_flight_and_takes_no_more(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    request = Request(pod, "/sleep?ms=2500")
    until(lambda: _in_flight(space, pod), "the request to be in flight", every=0.05)
    pod.delete(grace=20)
    pod.wait(lambda seen: condition(seen, "Ready") == "False", "the pod to be unready", 5)
    with pytest.raises(requests.ConnectionError):
        pod.get("/version")
    assert pod.exists()
    request.join()
    assert (request.text, request.error) == ("slept\n", "")
    pod.wait_gone(timeout=5)


def test_requests_that_outlive_the_grace_period_are_cut(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    request = Request(pod, "/sleep?ms=25000")
    until(lambda: _in_flight(space, pod), "the request to be in flight", every=0.05)
    began = time.monotonic()
    pod.delete(grace=2)
    pod.wait_gone(timeout=10)
    assert time.monotonic() - began < 6
    request.join()
    assert request.error != ""


def test_an_idle_pod_is_gone_at_once_however_long_its_grace(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    pod.delete(grace=60)
    pod.wait_gone(timeout=5)


def test_connections_that_are_kept_alive_do_not_hold_up_the_end(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    with requests.Session() as session:
        assert session.get(f"{pod.url}/version", timeout=5).ok
        pod.delete(grace=60)
        pod.wait_gone(timeout=5)


def test_a_pre_stop_hook_is_called_and_finished_before_the_container_ends(space: Workspace) -> None:
    listener = space.serve().wait_ready()
    hook = {
        "httpGet": {
            "host": space.agent.address,
            "port": listener.port,
            "path": "/log?text=called-before-the-end",
            "httpHeaders": [{"name": "X-Why", "value": "stop"}],
        }
    }
    pod = space.serve(lifecycle={"preStop": hook}).wait_ready()
    pod.delete(grace=20)
    pod.wait_gone(timeout=10)
    assert "called-before-the-end" in listener.logs()


def test_the_container_serves_until_its_pre_stop_hook_is_through(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(
        port=port, lifecycle={"preStop": {"httpGet": {"port": "http", "path": "/sleep?ms=2000"}}}
    ).wait_ready()
    pod.delete(grace=20)
    pod.wait(lambda seen: condition(seen, "Ready") == "False", "the pod to be unready", 5)
    assert pod.get("/version").text == "1"
    pod.wait_gone(timeout=10)


def test_a_pre_stop_hook_that_fails_is_told_and_holds_nothing_up(space: Workspace) -> None:
    hook = {"httpGet": {"port": space.port(), "path": "/"}}
    pod = space.serve(lifecycle={"preStop": hook}).wait_ready()
    pod.delete(grace=20)
    pod.wait_event("FailedPreStopHook", "preStop hook failed")
    pod.wait_gone(timeout=10)


def test_a_hook_that_is_answered_with_an_error_was_run(space: Workspace) -> None:
    port = space.port()
    hook = {"httpGet": {"port": port, "path": "/status?code=500"}}
    space.serve(port=port, lifecycle={"postStart": hook}).wait_ready()


def test_a_post_start_hook_is_called_before_the_pod_is_ready(space: Workspace) -> None:
    port = space.port()
    hook = {"httpGet": {"port": port, "path": "/log?text=called-after-the-start"}}
    pod = space.serve(port=port, lifecycle={"postStart": hook}).wait_ready()
    assert "called-after-the-start" in pod.logs()


@pytest.mark.parametrize("hook", ["preStop", "postStart"])
def test_a_hook_that_runs_a_command_is_refused_with_a_reason(space: Workspace, hook: str) -> None:
    pod = space.serve(lifecycle={hook: {"exec": {"command": ["true"]}}})
    message = pod.wait_waiting("CreateContainerConfigError")
    assert hook in message
    assert "exec is not supported" in message


def test_an_evicted_pod_ends_as_a_deleted_one_does(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    request = Request(pod, "/sleep?ms=1500")
    until(lambda: _in_flight(space, pod), "the request to be in flight", every=0.05)
    eviction = {"metadata": {"name": pod.name, "namespace": space.namespace}}
    space.core.create_namespaced_pod_eviction(pod.name, space.namespace, eviction)
    pod.wait_gone(timeout=10)
    request.join()
    assert (request.text, request.error) == ("slept\n", "")


def test_a_deleted_command_ends_within_its_grace_period(space: Workspace) -> None:
    pod = space.run("print", "begun", "then", "sleep", "60000")
    pod.wait_phase("Running")
    pod.delete(grace=3)
    pod.wait_gone(timeout=10)


def test_a_pod_that_is_active_longer_than_its_deadline_fails_with_that_reason(space: Workspace) -> None:
    command = space.run(
        "sleep", "60000", pod={"activeDeadlineSeconds": 2, "terminationGracePeriodSeconds": 1}
    )
    server = space.serve(pod={"activeDeadlineSeconds": 2, "terminationGracePeriodSeconds": 1})
    for pod in (command, server):
        status = pod.wait_phase("Failed", timeout=15)
        assert status.reason == "DeadlineExceeded"
        assert "deadline" in status.message
        end = status.container_statuses[0].state.terminated
        assert (end.exit_code, end.reason) == (137, "DeadlineExceeded")
        assert condition(pod.read(), "Ready") == "False"
    with pytest.raises(requests.ConnectionError):
        server.get("/version")


def test_a_deadline_may_be_set_while_the_pod_runs(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    pod.patch({"spec": {"activeDeadlineSeconds": 1}})
    assert pod.wait_phase("Failed", timeout=15).reason == "DeadlineExceeded"


def test_labels_may_be_changed_while_the_pod_runs(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    pod.patch({"metadata": {"labels": {"time": "now"}}})
    pod.wait(lambda seen: seen.metadata.labels.get("time") == "now", "the label")
    status = pod.status()
    assert (status.ready, status.restart_count) == (True, 0)


def test_a_pod_that_was_force_deleted_and_made_anew_is_never_touched_by_the_old_ones_end(
    space: Workspace,
) -> None:
    name, port = space.unique("same"), space.port()
    old = space.serve(
        port=port,
        lifecycle={"preStop": {"sleep": {"seconds": 3}}},
        env=[{"name": "WHO", "value": "old"}],
        pod={"name": name},
    ).wait_ready()
    old.delete(grace=20)
    old.delete(grace=0)
    new = space.serve(port=port, env=[{"name": "WHO", "value": "new"}], pod={"name": name})
    new.wait_ready(timeout=40)
    assert new.uid != old.uid
    assert new.get("/env").json()["WHO"] == "new"
    kept = space.agent.data_dir / "pods"
    until(lambda: not (kept / old.uid).exists(), "the old pod's files to be gone", timeout=30)
    assert new.get("/env").json()["WHO"] == "new"
    assert condition(new.read(), "Ready") == "True"
    assert new.status().restart_count == 0


def test_a_slow_end_of_one_pod_does_not_hold_up_the_start_of_another(space: Workspace) -> None:
    slow = space.serve(lifecycle={"preStop": {"sleep": {"seconds": 8}}}).wait_ready()
    slow.delete(grace=20)
    slow.wait(lambda seen: condition(seen, "Ready") == "False", "the slow end to begin", 5)
    space.serve().wait_ready(timeout=5)
    assert slow.exists()


def test_a_pod_is_ready_after_at_most_four_writes_of_its_status(space: Workspace) -> None:
    pod = space.serve(
        volumeMounts=[{"name": "a", "mountPath": "/a"}], pod={"volumes": [{"name": "a", "emptyDir": {}}]}
    )
    pod.wait_ready()
    name = "krustlet_status_patches_total"
    before = space.agent.metrics()[name]
    space.serve().wait_ready()
    assert space.agent.metrics()[name] - before <= 4


def test_a_pod_that_ended_stays_ended_and_keeps_its_logs_until_it_is_deleted(space: Workspace) -> None:
    pod = space.run("print", "the end")
    pod.wait_phase("Succeeded")
    pod.patch({"metadata": {"labels": {"touched": "yes"}}})
    space.serve().wait_ready()
    assert pod.logs() == "the end\n"
    assert pod.read().status.phase == "Succeeded"
    assert pod.status().restart_count == 0
    logs = space.agent.data_dir / "logs" / f"{space.namespace}_{pod.name}_{pod.uid}"
    assert (logs / "main" / "0.log").exists()
    pod.delete()
    pod.wait_gone(timeout=5)
    until(lambda: not logs.exists(), "the logs to be removed", timeout=10)


def test_a_job_runs_once_and_completes(space: Workspace) -> None:
    name = space.unique("job")
    spec = {
        "backoffLimit": 0,
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "nodeName": space.agent.name,
                "tolerations": [{"key": "kubernetes.io/arch", "operator": "Exists"}],
                "containers": [{"name": "main", "image": space.cli_image, "args": ["print", "done"]}],
            }
        },
    }
    space.cluster.batch.create_namespaced_job(space.namespace, {"metadata": {"name": name}, "spec": spec})

    def completed() -> bool:
        job = space.cluster.batch.read_namespaced_job(name, space.namespace)
        return any(item.type == "Complete" and item.status == "True" for item in job.status.conditions or [])

    try:
        assert until(completed, "the job to complete")
        pods = space.core.list_namespaced_pod(space.namespace, label_selector=f"job-name={name}").items
        assert [pod.status.phase for pod in pods] == ["Succeeded"]
    finally:
        space.cluster.batch.delete_namespaced_job(name, space.namespace, propagation_policy="Background")


def test_the_scheduler_places_what_tolerates_the_taint_and_asks_for_the_architecture(
    space: Workspace,
) -> None:
    pod = space.serve(
        pod={
            "nodeName": None,
            "nodeSelector": {
                "kubernetes.io/hostname": space.agent.node().metadata.labels["kubernetes.io/hostname"]
            },
        }
    )
    pod.wait_ready()
    assert pod.read().spec.node_name == space.agent.name
    foreign = space.serve(pod={"nodeName": None, "tolerations": []})
    foreign.wait(
        lambda seen: any(
            item.type == "PodScheduled" and item.status == "False" and "taint" in item.message
            for item in seen.status.conditions or []
        ),
        "the taint to keep a foreign pod away",
    )
