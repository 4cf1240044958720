"""The node's HTTPS API: `kubectl logs` and its options, through the API server."""

from __future__ import annotations

import json
import re
import subprocess
from datetime import UTC, datetime

import pytest

from tests.integration.agent.harness import Cluster, Pod, Workspace
from tests.waiting import until

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d) ")
MIB = 1024 * 1024
# A log file is moved aside when it has reached this, and so many files are kept.
FILE_BYTES, FILES = 10 * MIB, 5


def _logs(cluster: Cluster, pod: Pod, *options: str, check: bool = True) -> str:
    answer = cluster.kubectl("logs", f"--namespace={pod.namespace}", pod.name, *options, check=check)
    return answer.stdout if check else answer.stderr


def _say(pod: Pod, text: str, stream: str = "stdout") -> None:
    assert pod.get("/log", text=text, stream=stream).ok


def test_tail_since_and_timestamps_choose_what_is_shown(cluster: Cluster, space: Workspace) -> None:
    pod = space.serve().wait_ready()
    for text in ("one", "two", "three"):
        _say(pod, text)
    _say(pod, "four", "stderr")
    assert _logs(cluster, pod) == "one\ntwo\nthree\nfour\n"
    assert _logs(cluster, pod, "--tail=2") == "three\nfour\n"
    assert _logs(cluster, pod, "--tail=0") == ""
    stamped = _logs(cluster, pod, "--timestamps").splitlines()
    assert [TIMESTAMP.sub("", line) for line in stamped] == ["one", "two", "three", "four"]
    times = [line.split(" ")[0] for line in stamped]
    assert times == sorted(times)
    assert abs((datetime.fromisoformat(times[-1]) - datetime.now(UTC)).total_seconds()) < 60
    until(lambda: _logs(cluster, pod, "--since=1s") == "", "the lines to be older", every=0.5)
    _say(pod, "five")
    assert _logs(cluster, pod, "--since=30m").splitlines() == ["one", "two", "three", "four", "five"]
    # --since-time has whole seconds.
    assert "five" in _logs(cluster, pod, f"--since-time={times[-1][:19]}Z")
    assert _logs(cluster, pod, "--limit-bytes=5") == "one\nt"


def test_follow_shows_lines_as_they_come_and_ends_with_the_container(
    cluster: Cluster, space: Workspace
) -> None:
    pod = space.run("print", "first", "then", "sleep", "3000", "then", "print", "last")
    pod.wait_phase("Running")
    kubeconfig = f"--kubeconfig={cluster.cloud.home / f'{cluster.name}.kubeconfig'}"
    cluster.kubectl("version")
    command = ["kubectl", kubeconfig, "logs", "-f", f"--namespace={pod.namespace}", pod.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        try:
            assert follower.stdout is not None
            assert follower.stdout.readline() == "first\n"
            assert pod.read().status.phase == "Running"
            assert follower.stdout.read() == "last\n"
            assert follower.wait(timeout=10) == 0
        finally:
            follower.kill()
    assert pod.wait_phase("Succeeded")


def test_a_follower_that_goes_away_is_let_go(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    path = f"/containerLogs/{pod.namespace}/{pod.name}/web?follow=true"
    followers = "krustlet_log_followers"
    with space.agent.api(path, stream=True) as answer:
        _say(pod, "seen")
        lines = answer.iter_lines()
        assert next(lines) == b"seen"
        assert space.agent.metrics()[followers] == 1
    until(lambda: space.agent.metrics()[followers] == 0, "the follower to be let go", timeout=10)


def test_previous_shows_the_run_before_and_says_when_there_was_none(
    cluster: Cluster, space: Workspace
) -> None:
    port = space.port()
    pod = space.serve(
        port=port,
        livenessProbe={
            "httpGet": {"path": "/healthz?file=/scratch/alive", "port": port},
            "periodSeconds": 1,
            "failureThreshold": 3,
        },
        volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}],
        pod={"volumes": [{"name": "scratch", "emptyDir": {}}]},
    ).wait_ready()
    assert pod.get("/write", path="/scratch/alive", text="yes").ok
    _say(pod, "the first run")
    assert "previous terminated container" in _logs(cluster, pod, "--previous", check=False)
    assert pod.get("/remove", path="/scratch/alive").ok
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count == 1, "a restart", 30)
    pod.wait_ready()
    assert pod.get("/write", path="/scratch/alive", text="yes").ok
    _say(pod, "the second run")
    assert _logs(cluster, pod, "--previous") == "the first run\n"
    assert "the second run\n" in _logs(cluster, pod)
    assert "the first run" not in _logs(cluster, pod)


def test_a_container_that_has_not_begun_or_is_not_there_has_no_logs_and_a_reason(
    cluster: Cluster, space: Workspace
) -> None:
    waiting = space.serve(envFrom=[{"configMapRef": {"name": "not-there"}}])
    waiting.wait_waiting("CreateContainerConfigError")
    error = _logs(cluster, waiting, check=False)
    assert "is waiting to start: CreateContainerConfigError" in error
    answer = space.agent.api(f"/containerLogs/{waiting.namespace}/{waiting.name}/other")
    assert (answer.status_code, "not found" in answer.text) == (404, True)
    answer = space.agent.api(f"/containerLogs/{waiting.namespace}/nobody/web")
    assert (answer.status_code, "does not exist" in answer.text) == (404, True)


@pytest.mark.parametrize(
    ("query", "status"),
    [("tailLines=many", 400), ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", 422), ("limitBytes=-1", 422)],
)
def test_options_that_mean_nothing_are_refused(space: Workspace, query: str, status: int) -> None:
    pod = space.serve().wait_ready()
    answer = space.agent.api(f"/containerLogs/{pod.namespace}/{pod.name}/web?{query}")
    assert answer.status_code == status
    assert "message" in json.loads(answer.text)


def test_paths_do_not_lead_out_of_the_logs(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    for container in ("..%2F..%2Fpki", "%2e%2e", "web%2F..%2F..%2F..%2Flock"):
        answer = space.agent.api(f"/containerLogs/{pod.namespace}/{pod.name}/{container}")
        assert answer.status_code == 404, container


def test_a_log_is_bounded_on_disk_and_its_newest_lines_stay(cluster: Cluster, space: Workspace) -> None:
    pod = space.serve().wait_ready()
    line = "x" * 60_000
    files = space.agent.data_dir / "logs" / f"{pod.namespace}_{pod.name}_{pod.uid}" / "web"
    for _ in range((FILES + 1) * FILE_BYTES // len(line) + 1):
        _say(pod, line)
    _say(pod, "the newest line")
    sizes = [path.stat().st_size for path in files.iterdir()]
    assert len(sizes) == FILES
    # A line is not torn over two files.
    assert max(sizes) < FILE_BYTES + MIB
    assert _logs(cluster, pod, "--tail=1") == "the newest line\n"
    # More than the newest file has; as with the kubelet, a part of a long line counts as a line.
    shown = _logs(cluster, pod, "--tail=800").splitlines()
    assert len(shown) * len(line) > FILE_BYTES
    assert set(shown[1:-1]) == {line}
