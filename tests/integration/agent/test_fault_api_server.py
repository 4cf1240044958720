"""The API server is away, silent or says no: pods keep running, the agent stays quiet and catches up."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from kubernetes.client.exceptions import ApiException

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import (
    TOLERATIONS,
    Agent,
    Cluster,
    Manifest,
    Workspace,
    condition,
    http_probe,
)
from tests.integration.agent.link import Link
from tests.waiting import until

MakeWorkspace = Callable[[Agent], Workspace]

# An outage of 40 s may cost 100 lines of log and 1 s of CPU; a longer one as much more.
OUTAGE_SECONDS = int(os.environ.get("KRUSTLET_OUTAGE_SECONDS", "40"))
OUTAGE_LINES, OUTAGE_CPU_SECONDS = 100 * OUTAGE_SECONDS / 40, OUTAGE_SECONDS / 40
# Less than what systemd gives a unit to stop before it kills it.
STOP_SECONDS = 45
# A node whose lease is older than this counts as lost.
GRACE_SECONDS = 40
# What was missed is caught up with within so many seconds: the longest wait between two tries, and some work.
CATCH_UP_SECONDS = 20


@pytest.fixture
def own(make_agent: AgentFactory, link: Link) -> Agent:
    """An agent whose way to the API server can be cut; it logs what an operator's does."""
    agent = make_agent("cut")
    agent.environment["RUST_LOG"] = "info"
    link.carry(agent)
    agent.start()
    return agent


@pytest.fixture
def place(own: Agent, make_workspace: MakeWorkspace) -> Workspace:
    return make_workspace(own)


@pytest.mark.parametrize("outage", [Link.refused, Link.silent], ids=["refused", "silent"])
def test_an_outage_costs_little_and_pods_keep_answering_and_the_node_catches_up(
    own: Agent, place: Workspace, link: Link, cluster: Cluster, outage: Callable[[Link], Any]
) -> None:
    # Only the agent's link is cut: the controllers take this for a lost node, and empty such a one in time.
    stays = {"tolerations": [*TOLERATIONS, {"key": "node.kubernetes.io/unreachable", "operator": "Exists"}]}
    ports = [place.port(), place.port()]
    pods = [place.serve(readinessProbe=http_probe(port), port=port, pod=stays) for port in ports]
    pods += [place.serve(pod=stays) for _ in range(3)]
    for pod in pods:
        pod.wait_ready()
    doomed, volatile = pods[3:]
    ending = place.run("sleep", "4000", "then", "print", "ended", pod=stays)
    ending.wait_phase("Running")
    lines, cpu = len(own.log.splitlines()), own.cpu_seconds()
    asked: list[bool] = []

    def answered() -> bool:
        """Ask all pods; true when the outage has lasted."""
        asked.extend(pod.get("/version", timeout=2).ok for pod in pods)
        return time.monotonic() > begun + OUTAGE_SECONDS

    with outage(link):
        begun = time.monotonic()
        doomed.delete()
        volatile.delete(grace=0)
        until(answered, "the outage to last", timeout=OUTAGE_SECONDS + 10, every=0.5)
        spent, said = own.cpu_seconds() - cpu, own.log.splitlines()[lines:]
    assert all(asked)
    assert len(said) < OUTAGE_LINES, "\n".join(said)
    assert spent < OUTAGE_CPU_SECONDS

    over = datetime.now().astimezone()

    def beats() -> bool:
        lease = cluster.coordination.read_namespaced_lease(own.name, "kube-node-lease")
        return bool(lease.spec.renew_time > over)

    until(beats, "the lease to beat again", timeout=CATCH_UP_SECONDS)
    doomed.wait_gone(timeout=CATCH_UP_SECONDS)
    assert ending.wait_phase("Succeeded", timeout=CATCH_UP_SECONDS).container_statuses[0].restart_count == 0
    place.serve().wait_ready(timeout=CATCH_UP_SECONDS)
    with pytest.raises(OSError, match="refused"):
        volatile.get("/version")
    for pod in pods[:3]:
        # The controllers declare the pods of a lost node unready, and the agent corrects them.
        pod.wait_ready(timeout=CATCH_UP_SECONDS)
        assert pod.status().restart_count == 0
    assert "panicked" not in own.log


def _apiserver(cluster: Cluster) -> int:
    """The process ID of the cluster's API server, 0 while there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            if words[0].endswith("kube-apiserver") and any(str(cluster.pki) in word for word in words):
                return int(process.name)
    return 0


def test_a_killed_api_server_is_followed_again_and_no_change_is_missed(
    agent: Agent, space: Workspace, cluster: Cluster
) -> None:
    kept, deleted = space.serve().wait_ready(), space.serve().wait_ready()
    lines, killed = len(agent.log.splitlines()), _apiserver(cluster)
    with agent.frozen():
        # What it followed is not known to the new API server: it has to begin with a full list.
        os.kill(killed, signal.SIGKILL)
        until(lambda: _apiserver(cluster) not in (0, killed), "another API server")

        def gone() -> bool:
            deleted.delete(grace=0)
            return True

        until(gone, "the new API server to delete the pod", timeout=90)
        made = space.serve()
        assert not deleted.exists()
    made.wait_ready()
    with pytest.raises(OSError, match="refused"):
        deleted.get("/version")
    assert kept.get("/version").ok
    assert (kept.status().restart_count, condition(kept.read(), "Ready")) == (0, "True")
    until(lambda: agent.condition("Ready") == "True", "the node to be ready")
    warnings = [line for line in agent.log.splitlines()[lines:] if '"level":"WARN"' in line]
    assert len(warnings) < 20, "\n".join(warnings)


def test_a_silent_connection_is_given_up_long_before_the_node_counts_as_lost(
    own: Agent, link: Link, cluster: Cluster
) -> None:
    def renewed() -> datetime:
        lease = cluster.coordination.read_namespaced_lease(own.name, "kube-node-lease")
        found: datetime = lease.spec.renew_time
        return found

    before = renewed()
    # Only what is open now dies: the next connection passes.
    with link.silent():
        pass
    until(lambda: renewed() > before, "the lease to beat again", timeout=GRACE_SECONDS * 0.75)
    assert (renewed() - before).total_seconds() < GRACE_SECONDS * 0.75
    assert own.condition("Ready") == "True"


def test_what_ended_unseen_is_not_run_again_by_the_next_agent(
    own: Agent, place: Workspace, link: Link
) -> None:
    pod = place.run("print", "begun", "then", "sleep", "1500", pod={"restart": "OnFailure"})
    pod.wait_phase("Running")
    with link.refused():
        # The record of the run tells its end before anybody else may be told.
        record = own.data_dir / "pods" / pod.uid / "containers.json"
        until(lambda: '"exit_code":0' in record.read_text(), "the command to end", every=0.05)
        own.kill()
        assert pod.read().status.phase == "Running"
    own.start()
    status = pod.wait_phase("Succeeded").container_statuses[0]
    assert (status.restart_count, status.state.terminated.exit_code) == (0, 0)
    assert pod.logs() == "begun\n"


def test_an_agent_that_starts_without_an_api_server_waits_for_it(
    own: Agent, place: Workspace, link: Link
) -> None:
    pod = place.serve().wait_ready()
    own.kill()
    with link.refused():
        own.launch()
        until(lambda: "trying again" in own.log, "the agent to miss the API server")
        assert own.stop(timeout=5) == 0
        own.launch()
        until(lambda: "trying again" in own.log, "the next agent to miss the API server")
        assert own.process is not None
        assert own.process.poll() is None
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count == 1, "the pod to be taken up", 30)
    pod.wait_ready()
    assert own.stop() == 0


@pytest.mark.parametrize("outage", [Link.refused, Link.silent], ids=["refused", "silent"])
def test_an_agent_that_is_stopped_without_an_api_server_ends_in_time(
    own: Agent, place: Workspace, link: Link, outage: Callable[[Link], Any]
) -> None:
    kept = place.serve().wait_ready()
    # Its preStop hook has begun when the API server goes away, and its end cannot be told.
    ending = place.serve(lifecycle={"preStop": {"sleep": {"seconds": 2}}}).wait_ready()
    ending.delete(grace=5)
    ending.wait(lambda seen: condition(seen, "Ready") == "False", "the end to begin", 10)
    with outage(link):
        assert own.stop(timeout=STOP_SECONDS) == 0
    own.start()
    ending.wait_gone(timeout=10)
    kept.wait(lambda seen: seen.status.container_statuses[0].restart_count == 1, "the pod's return", 30)


@pytest.fixture
def policy(cluster: Cluster) -> Iterator[Callable[[str, Manifest, str], str]]:
    """Has the API server refuse requests: `policy(name, rule, expression)` gives the message of a refusal."""
    api: Any = kubernetes.client.AdmissionregistrationV1Api(cluster.core.api_client)
    with contextlib.ExitStack() as stack:

        def make(name: str, rule: Manifest, expression: str) -> str:
            message = f"the policy {name} refuses it"
            spec = {
                "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], **rule}]},
                "validations": [{"expression": expression, "message": message}],
            }
            api.create_validating_admission_policy({"metadata": {"name": name}, "spec": spec})
            stack.callback(api.delete_validating_admission_policy, name)
            binding = {"policyName": name, "validationActions": ["Deny"]}
            api.create_validating_admission_policy_binding({"metadata": {"name": name}, "spec": binding})
            stack.callback(api.delete_validating_admission_policy_binding, name)
            return message

        yield make


def test_a_status_that_the_api_server_refuses_is_written_again_until_it_is_taken(
    agent: Agent, space: Workspace, policy: Callable[[str, Manifest, str], str], cluster: Cluster
) -> None:
    marked = "has(object.metadata.labels) && 'refused' in object.metadata.labels"
    message = policy(
        "refuse-status",
        {"operations": ["UPDATE"], "resources": ["pods/status"]},
        f"!({marked}) || object.metadata.labels['refused'] != 'yes'",
    )
    probe = space.pod({"name": "none", "image": "none"}, labels={"refused": "yes"}, nodeName="nowhere")

    def in_force() -> bool:
        try:
            cluster.core.patch_namespaced_pod_status(probe.name, space.namespace, {"status": {"reason": "x"}})
        except ApiException as error:
            return message in str(error.body)
        return False

    until(in_force, "the policy to be in force")
    pod = space.serve(pod={"labels": {"refused": "yes"}})
    until(lambda: pod.get("/version").ok, "the pod to serve all the same")
    assert pod.read().status.phase == "Pending"
    pod.patch({"metadata": {"labels": {"refused": "no"}}})
    pod.wait_ready()
    assert pod.status().restart_count == 0
    assert "panicked" not in agent.log


def test_the_agent_deletes_a_pod_only_by_its_uid(
    space: Workspace, policy: Callable[[str, Manifest, str], str], cluster: Cluster
) -> None:
    message = policy(
        "delete-by-uid",
        {"operations": ["DELETE"], "resources": ["pods"]},
        "!('careful' in oldObject.metadata.?labels.orValue({}))"
        " || request.?options.?preconditions.?uid.orValue('') == oldObject.metadata.uid",
    )
    pod = space.serve(pod={"labels": {"careful": "yes"}}).wait_ready()

    def in_force() -> bool:
        try:
            cluster.core.delete_namespaced_pod(pod.name, space.namespace, dry_run="All")
        except ApiException as error:
            return message in str(error.body)
        return False

    until(in_force, "the policy to be in force")
    cluster.core.delete_namespaced_pod(
        pod.name, space.namespace, body={"preconditions": {"uid": pod.uid}, "gracePeriodSeconds": 20}
    )
    pod.wait_gone(timeout=10)


def test_a_pod_is_ready_after_at_most_four_changes_of_its_status(space: Workspace, cluster: Cluster) -> None:
    volume = {"name": "scratch", "emptyDir": {}}
    selector = {"kubernetes.io/hostname": space.agent.name}
    port = space.port()
    for cached in (False, True):
        moment = cluster.moment()
        pod = space.serve(
            image=space.registry.guest("http-guest", variant="patches"),
            port=port,
            readinessProbe=http_probe(port),
            startupProbe=http_probe(port),
            volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}],
            pod={
                "volumes": [volume],
                "nodeName": None,
                "nodeSelector": selector,
            },
        ).wait_ready()
        events = cluster.changes(
            moment,
            cluster.core.list_namespaced_pod,
            space.namespace,
            field_selector=f"metadata.name={pod.name}",
        )
        states = [event["object"] for event in events]
        scheduled = next(index for index, seen in enumerate(states) if seen.spec.node_name)
        ready = next(index for index, seen in enumerate(states) if condition(seen, "Ready") == "True")
        assert 1 <= ready - scheduled <= 4, f"cached: {cached}"
        pod.delete(grace=0)
        pod.wait_gone()


def test_a_status_that_another_hand_changed_is_put_right(space: Workspace, cluster: Cluster) -> None:
    pod = space.serve().wait_ready()
    unready = [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "False"}]
    cluster.core.patch_namespaced_pod_status(pod.name, space.namespace, {"status": {"conditions": unready}})
    pod.wait_ready(timeout=10)
    assert (pod.status().restart_count, pod.get("/version").ok) == (0, True)


def test_a_pod_that_another_hand_declared_failed_stops_and_stays_failed(
    space: Workspace, cluster: Cluster
) -> None:
    # As the garbage collector of pods does it.
    pod = space.serve().wait_ready()
    failed = {"phase": "Failed", "reason": "NodeLost"}
    cluster.core.patch_namespaced_pod_status(pod.name, space.namespace, {"status": failed})
    pod.wait(lambda seen: seen.status.container_statuses[0].state.terminated, "the container to end", 10)
    with pytest.raises(OSError, match="refused"):
        pod.get("/version")
    assert pod.read().status.phase == "Failed"


def test_no_change_of_a_pod_shows_it_succeeded_or_failed_while_a_container_runs(
    space: Workspace, cluster: Cluster
) -> None:
    moment = cluster.moment()
    hook = {"preStop": {"sleep": {"seconds": 1}}}
    short = {"name": "short", "image": space.cli_image, "args": ["print", "done"]}
    longer = {"name": "longer", "image": space.cli_image, "args": ["sleep", "1500", "then", "exit", "3"]}
    web = {
        "name": "web",
        "image": space.http_image,
        "ports": [{"containerPort": space.port()}],
        "lifecycle": hook,
    }
    once = space.pod(short, longer, restart="Never")
    serving = space.pod(short, web, restart="Never")
    timed = space.pod(
        short, {**web, "ports": [{"containerPort": space.port()}]}, restart="Never", activeDeadlineSeconds=2
    )
    serving.wait_phase("Running")
    serving.delete(grace=10)
    once.wait_phase("Failed")
    timed.wait_phase("Failed")
    serving.wait_gone()
    phases: dict[str, list[str]] = {}
    for event in cluster.changes(moment, cluster.core.list_namespaced_pod, space.namespace):
        seen = event["object"]
        if seen.metadata.name not in (once.name, serving.name, timed.name):
            continue
        phases.setdefault(seen.metadata.name, []).append(seen.status.phase)
        running = [item.name for item in seen.status.container_statuses or [] if item.state.running]
        assert not (running and seen.status.phase in ("Succeeded", "Failed")), (seen.status.phase, running)
    assert "Running" in phases[once.name]
    assert phases[once.name][-1] == phases[timed.name][-1] == "Failed"
