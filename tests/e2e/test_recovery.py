"""Every part is killed without warning, and comes back without help."""

import json
import os
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import requests

from components.providers.registration import LEASE_RENEWAL
from tests.e2e.cloud import Cloud
from tests.e2e.conftest import Stack
from tests.e2e.test_changes import preview, up
from tests.waiting import until


def _pids(stack: Stack, program: str) -> set[int]:
    """The processes of this stack that run a program, by its name."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
    )
    home, found = f"{stack.directory}/.localcloud", set()
    for line in listed.stdout.splitlines():
        pid, _, arguments = line.strip().partition(" ")
        if Path(arguments.split()[0]).name == program and home in arguments:
            found.add(int(pid))
    return found


def _restart_count(stack: Stack) -> int:
    outputs = stack.outputs()
    pod = stack.kubectl_json("get", "pod", outputs["pod"], "-n", outputs["namespace"])
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


def _all_well(stack: Stack) -> bool:
    outputs = stack.outputs()
    wait = ("--timeout=1s", "--for=condition=Ready")
    stack.kubectl("wait", *wait, f"node/{outputs['node']}")
    stack.kubectl("wait", *wait, f"pod/{outputs['pod']}", "-n", outputs["namespace"])
    return stack.get("/healthz").status_code == 200


@pytest.mark.parametrize("program", ["krustlet", "kube-apiserver", "etcd"])
def test_a_part_that_is_killed_comes_back_without_help(stack: Stack, program: str) -> None:
    assert _all_well(stack)
    before = _pids(stack, program)
    assert before, f"{program} runs"
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: _pids(stack, program) - before, f"a new {program}")
    until(lambda: _all_well(stack), "node and pod to be well again", timeout=90)
    report = json.loads(stack.run("./scripts/verify", "--json").stdout)
    assert report["passed"] is True


def test_the_pod_answers_while_the_api_server_is_away(stack: Stack) -> None:
    for pid in _pids(stack, "kube-apiserver"):
        os.kill(pid, signal.SIGSTOP)
    try:
        assert stack.get("/healthz").status_code == 200
    finally:
        for pid in _pids(stack, "kube-apiserver"):
            os.kill(pid, signal.SIGCONT)


def test_a_restarted_agent_takes_its_pod_back_and_does_not_evict_it(stack: Stack) -> None:
    outputs = stack.outputs()
    place = (outputs["pod"], "-n", outputs["namespace"])
    uid, count = stack.kubectl_json("get", "pod", *place)["metadata"]["uid"], _restart_count(stack)
    (agent,) = _pids(stack, "krustlet")
    os.kill(agent, signal.SIGTERM)
    until(lambda: _pids(stack, "krustlet") - {agent}, "a new agent")
    until(lambda: _all_well(stack), "node and pod to be well again", timeout=90)
    after = stack.kubectl_json("get", "pod", *place)
    assert after["metadata"]["uid"] == uid
    assert after["status"]["containerStatuses"][0]["restartCount"] > count


def test_a_vm_that_somebody_deleted_is_there_again_after_one_up_and_takes_its_pods_back(stack: Stack) -> None:
    outputs = stack.outputs()
    place = (outputs["pod"], "-n", outputs["namespace"])
    before = stack.kubectl_json("get", "pod", *place)["metadata"]["uid"]
    Cloud(stack.env).delete_instance(outputs["node"])
    lease = ("get", "lease", outputs["node"], "-n", "kube-node-lease")
    last = stack.kubectl_json(*lease)["spec"]["renewTime"]
    until(lambda: datetime.now(UTC) - datetime.fromisoformat(last) > LEASE_RENEWAL, "the lease to run out")
    stack.run("pulumi", "refresh", "--yes", "--skip-preview")
    plan = preview(stack)
    assert (plan["node-vm"], plan["node-registration"]) == ("create", "update")
    assert up(stack) == plan
    answer = requests.get(f"{outputs['url']}/primorial/30", timeout=10)
    assert answer.json()["primorial"] == "6469693230"
    assert stack.kubectl_json("get", "pod", *place)["metadata"]["uid"] == before
    assert _all_well(stack)
    stack.run("pulumi", "preview", "--refresh", "--expect-no-changes")


def test_a_pod_that_has_failed_for_good_is_made_anew_by_the_next_up(stack: Stack) -> None:
    outputs = stack.outputs()
    place = (outputs["pod"], "-n", outputs["namespace"])
    before = stack.kubectl_json("get", "pod", *place)["metadata"]["uid"]
    stack.kubectl("patch", "pod", *place, "--patch", '{"spec": {"activeDeadlineSeconds": 1}}')
    stack.kubectl("wait", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s", "pod", *place)
    refused = stack.run("pulumi", "up", "--yes", "--refresh", check=False)
    assert f"kubectl delete pod {place[0]} --namespace {place[2]}" in refused.stdout, "it says what helps"
    stack.run("./scripts/up")
    assert stack.kubectl_json("get", "pod", *place)["metadata"]["uid"] != before
    assert _all_well(stack)
    stack.run("pulumi", "preview", "--expect-no-changes")
