"""The Node as operators see it: what it says of itself, its heartbeat, its flags, and kubectl."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import ARCHITECTURE, PROJECT, ZONE, Agent, Cluster, Workspace, condition
from tests.waiting import until

LEASES = "kube-node-lease"
KIBI, MEBI = 1024, 1024 * 1024
# The kubelet renews its lease that often, and so does the agent; a busy machine may be a little late.
HEARTBEAT_SECONDS = 10
LATE_SECONDS = 6

MakeWorkspace = Callable[[Agent], Workspace]


def _bytes(quantity: str) -> int:
    assert quantity.endswith("Ki"), quantity
    return int(quantity.removesuffix("Ki")) * KIBI


def _lease(cluster: Cluster, name: str) -> Any:
    """The node's lease, None when there is none."""
    try:
        return cluster.coordination.read_namespaced_lease(name, LEASES)
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def test_the_node_has_its_labels_and_its_taints_from_the_start(agent: Agent) -> None:
    node = agent.node()
    wanted = {
        "kubernetes.io/arch": ARCHITECTURE,
        "kubernetes.io/os": "wasi",
        "kubernetes.io/hostname": agent.name,
        "type": "krustlet",
        "node.kubernetes.io/exclude-from-external-load-balancers": "true",
    }
    assert wanted.items() <= node.metadata.labels.items()
    taints = {(taint.key, taint.value, taint.effect) for taint in node.spec.taints}
    assert taints == {("kubernetes.io/arch", ARCHITECTURE, effect) for effect in ("NoSchedule", "NoExecute")}


def test_capacity_is_the_machines_and_allocatable_is_what_it_leaves_to_pods(agent: Agent) -> None:
    status = agent.node().status
    capacity, allocatable = status.capacity, status.allocatable
    assert int(capacity["cpu"]) == len(os.sched_getaffinity(0))
    assert capacity["cpu"] == allocatable["cpu"]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < _bytes(capacity["memory"]) <= physical
    # Guests do not get the quarter for the system and idle instances (krustlet/README.md).
    guests = _bytes(allocatable["memory"]) + 100 * MEBI
    assert guests == pytest.approx(0.75 * _bytes(capacity["memory"]), rel=0.001)
    disk = os.statvfs(agent.data_dir)
    assert _bytes(capacity["ephemeral-storage"]) == disk.f_blocks * disk.f_frsize // KIBI * KIBI
    ratio = _bytes(allocatable["ephemeral-storage"]) / _bytes(capacity["ephemeral-storage"])
    # The tests' agents are to keep 1 % of the disk free (AGENT_ENVIRONMENT).
    assert ratio == pytest.approx(0.99, abs=0.001)
    assert capacity["pods"] == allocatable["pods"] == "500"


def test_the_conditions_are_those_of_a_healthy_kubelet(agent: Agent) -> None:
    conditions = {item.type: item for item in agent.node().status.conditions}
    assert {kind: item.status for kind, item in conditions.items()} == {
        "Ready": "True",
        "MemoryPressure": "False",
        "DiskPressure": "False",
        "PIDPressure": "False",
        "krustlet.dev/ClientCertificateExpiring": "False",
        "krustlet.dev/NetworkPoliciesNotKept": "False",
    }
    assert conditions["Ready"].reason == "KubeletReady"
    for item in conditions.values():
        assert item.message
        assert item.last_transition_time <= item.last_heartbeat_time


def test_the_node_tells_who_and_where_it_is_and_what_it_runs(agent: Agent) -> None:
    node = agent.node()
    assert node.spec.provider_id == f"gce://{PROJECT}/{ZONE}/{agent.name}"
    addresses = [(item.type, item.address) for item in node.status.addresses]
    assert addresses == [("InternalIP", agent.address), ("Hostname", agent.hostname)]
    assert node.status.daemon_endpoints.kubelet_endpoint.port == agent.port
    info = node.status.node_info
    assert info.kubelet_version.startswith("v1.")
    assert "+krustlet." in info.kubelet_version
    assert info.container_runtime_version.startswith("wasmtime://")
    assert (info.architecture, info.operating_system) == (ARCHITECTURE, "wasi")
    assert info.kernel_version == os.uname().release
    assert info.boot_id
    assert info.os_image


def test_the_lease_is_the_nodes_and_beats_every_ten_seconds(agent: Agent, cluster: Cluster) -> None:
    lease = _lease(cluster, agent.name)
    assert (lease.spec.holder_identity, lease.spec.lease_duration_seconds) == (agent.name, 40)
    owner = lease.metadata.owner_references[0]
    assert (owner.kind, owner.name, owner.uid) == ("Node", agent.name, agent.node().metadata.uid)

    def beat() -> datetime | None:
        now: datetime = _lease(cluster, agent.name).spec.renew_time
        return now if now > lease.spec.renew_time else None

    later = until(beat, "the next heartbeat", timeout=HEARTBEAT_SECONDS + LATE_SECONDS)
    assert (later - lease.spec.renew_time).total_seconds() <= HEARTBEAT_SECONDS + LATE_SECONDS


def test_get_nodes_reads_well(agent: Agent, cluster: Cluster) -> None:
    cluster.kubectl("label", "node", agent.name, "node-role.kubernetes.io/wasm=", "--overwrite")
    heading, line = cluster.kubectl("get", "node", agent.name, "-o", "wide").stdout.splitlines()
    for column in ("NAME", "STATUS", "ROLES", "VERSION", "INTERNAL-IP", "CONTAINER-RUNTIME"):
        assert column in heading
    words = line.split()
    assert words[:3] == [agent.name, "Ready", "wasm"]
    assert agent.address in words
    assert any(word.startswith("v1.") and "krustlet" in word for word in words)
    assert any(word.startswith("wasmtime://") for word in words)


def test_describe_node_reads_well(agent: Agent, cluster: Cluster, space: Workspace) -> None:
    pod = space.serve(resources={"requests": {"memory": "16Mi"}}).wait_ready()
    text = cluster.kubectl("describe", "node", agent.name).stdout
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {f"Name: {agent.name}", f"ProviderID: gce://{PROJECT}/{ZONE}/{agent.name}"} <= lines
    assert "Taints: kubernetes.io/arch=wasm32-wasi:NoExecute" in lines
    assert any(line.startswith("Container Runtime Version: wasmtime://") for line in lines)
    assert any(line.startswith(f"HolderIdentity: {agent.name}") for line in lines)
    assert any(line.startswith("Ready True") for line in lines)
    assert any(line.startswith(f"{pod.namespace} {pod.name} 0 (0%) 0 (0%) 16Mi") for line in lines)
    assert any("Starting" in line and "krustlet starts" in line for line in lines)


def test_a_deleted_lease_is_back_with_the_next_heartbeat(agent: Agent, cluster: Cluster) -> None:
    old = _lease(cluster, agent.name)
    cluster.coordination.delete_namespaced_lease(agent.name, LEASES)
    back = until(
        lambda: _lease(cluster, agent.name), "the lease to be back", timeout=HEARTBEAT_SECONDS + LATE_SECONDS
    )
    assert back.metadata.uid != old.metadata.uid
    assert (back.spec.holder_identity, back.spec.lease_duration_seconds) == (agent.name, 40)


def test_a_deleted_node_is_back_ready_with_its_lease_and_its_pods_never_stopped(
    make_agent: AgentFactory, make_workspace: MakeWorkspace, cluster: Cluster
) -> None:
    agent = make_agent("deleted", "--node-labels=disk=fast")
    agent.start()
    pod = make_workspace(agent).serve().wait_ready()
    old = agent.node()
    cluster.core.delete_node(agent.name)

    def back() -> Any:
        node = agent.node()
        return node if node.metadata.uid != old.metadata.uid else None

    new = until(back, "the node to be back", timeout=HEARTBEAT_SECONDS + LATE_SECONDS)
    assert new.metadata.labels["disk"] == "fast"
    assert {taint.effect for taint in new.spec.taints} == {"NoSchedule", "NoExecute"}
    assert new.spec.provider_id == old.spec.provider_id
    until(lambda: agent.condition("Ready") == "True", "the new node to be ready", timeout=10)

    def owned() -> bool:
        lease = _lease(cluster, agent.name)
        return lease is not None and lease.metadata.owner_references[0].uid == new.metadata.uid

    until(owned, "the lease to be the new node's", timeout=HEARTBEAT_SECONDS + LATE_SECONDS)
    assert pod.get("/version").ok
    assert (pod.status().restart_count, condition(pod.read(), "Ready")) == (0, "True")


def test_a_node_that_was_given_up_says_at_once_that_it_is_ready(agent: Agent, cluster: Cluster) -> None:
    # As the node controller does it when the lease has not been renewed for long.
    lost = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "lost"}
    cluster.core.patch_node_status(agent.name, {"status": {"conditions": [lost]}})
    until(lambda: agent.condition("Ready") == "True", "the node to be ready again", timeout=5)


def test_the_node_follows_its_flags_at_a_restart_and_keeps_what_others_set(
    make_agent: AgentFactory, cluster: Cluster
) -> None:
    agent = make_agent("flags", "--node-labels=zone=a,tier=web", "--max-pods=7")
    agent.start()
    assert agent.node().status.capacity["pods"] == "7"
    foreign = {"metadata": {"labels": {"team": "blue"}, "annotations": {"note": "kept"}}}
    cluster.core.patch_node(agent.name, foreign | {"spec": {"unschedulable": True}})
    agent.stop()
    agent.flags = ["--node-labels=zone=b", "--max-pods=9", "--external-ip=203.0.113.7"]
    agent.start()
    node = agent.node()
    assert node.metadata.labels["zone"] == "b"
    assert "tier" not in node.metadata.labels
    assert node.status.capacity["pods"] == node.status.allocatable["pods"] == "9"
    assert ("ExternalIP", "203.0.113.7") in [(item.type, item.address) for item in node.status.addresses]
    assert (node.metadata.labels["team"], node.metadata.annotations["note"]) == ("blue", "kept")
    assert node.spec.unschedulable is True
    agent.stop()
    agent.flags = ["--node-labels=zone=b", "--max-pods=9"]
    agent.start()
    assert "ExternalIP" not in [item.type for item in agent.node().status.addresses]


def test_a_pod_beyond_max_pods_is_refused_with_a_reason_and_one_that_ended_does_not_count(
    make_agent: AgentFactory, make_workspace: MakeWorkspace
) -> None:
    agent = make_agent("full", "--max-pods=2")
    agent.start()
    space = make_workspace(agent)
    space.run("print", "done").wait_phase("Succeeded")
    first, second = space.serve().wait_ready(), space.serve().wait_ready()
    refused = space.serve().wait_phase("Failed")
    assert refused.reason == "OutOfpods"
    assert "--max-pods" in refused.message
    assert first.get("/version").ok
    assert second.get("/version").ok
    second.delete()
    second.wait_gone()
    space.serve().wait_ready()


def test_a_drained_node_has_let_its_pods_finish_and_takes_no_more_until_it_is_uncordoned(
    make_agent: AgentFactory, make_workspace: MakeWorkspace, cluster: Cluster
) -> None:
    agent = make_agent("drained")
    agent.start()
    space = make_workspace(agent)
    pods = [space.serve().wait_ready() for _ in range(3)]
    pods.append(space.run("sleep", "60000", pod={"terminationGracePeriodSeconds": 2}))
    pods[-1].wait_phase("Running")
    cluster.kubectl(
        "drain", agent.name, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=50s"
    )
    assert not any(pod.exists() for pod in pods)
    selector = {"kubernetes.io/hostname": agent.name}
    waiting = space.serve(pod={"nodeName": None, "nodeSelector": selector})
    waiting.wait(
        lambda seen: any(
            item.type == "PodScheduled" and item.status == "False" and "unschedulable" in item.message
            for item in seen.status.conditions or []
        ),
        "the cordon to keep the pod away",
    )
    cluster.kubectl("uncordon", agent.name)
    waiting.wait_ready()
