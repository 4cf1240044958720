"""Pod contract, the disk: what takes more than it may, or than the node has, is evicted, as by a kubelet."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, command, condition, served
from tests.waiting import until

MOUNTS = [{"name": "data", "mountPath": "/data"}]


def _limit(amount: str) -> Manifest:
    return {"limits": {"ephemeral-storage": amount}, "requests": {"ephemeral-storage": "0"}}


def _wait_evicted(pod: Pod, message: str) -> Any:
    status = pod.wait_phase("Failed")
    assert status.reason == "Evicted"
    assert message in status.message
    target = next(item for item in status.conditions if item.type == "DisruptionTarget")
    assert (target.status, target.reason) == ("True", "TerminationByKubelet")
    assert message in target.message
    pod.wait_event("Evicted", message)
    return status


def _fills(space: Workspace, mib: int, volume: Manifest, **fields: Any) -> Pod:
    """A pod that serves, and has a second container write so many MiB and wait."""
    words = f"fill /data/file {mib} then sleep 600000".split()
    return space.pod(
        served(space.http_image, space.port()),
        command(space.cli_image, *words, name="writer", volumeMounts=MOUNTS, **fields),
        volumes=[{"name": "data", "emptyDir": volume}],
    )


def test_what_outgrows_its_limits_is_evicted_and_its_files_go_while_its_object_stays(
    space: Workspace, agent: Agent
) -> None:
    within = _fills(space, 1, {"sizeLimit": "8Mi"}, resources=_limit("16Mi"))
    volume = _fills(space, 3, {"sizeLimit": "2Mi"})
    whole = _fills(space, 3, {}, resources=_limit("2Mi"))
    lines = " then ".join(["print " + "x" * 1000] * 120)
    talker = space.run(
        *f"{lines} then sleep 600000".split(), resources=_limit("64Ki"), pod={"restart": "Always"}
    )
    _wait_evicted(volume, 'Usage of EmptyDir volume "data" exceeds the limit "2Mi"')
    _wait_evicted(whole, "exceeds the total limit of containers 2097152")
    _wait_evicted(talker, "total limit of containers 65536")
    files = [agent.data_dir / "pods" / pod.uid / "volumes" for pod in (volume, whole)]
    until(lambda: not any(path.exists() for path in files), "the pods' files to go", timeout=20)
    assert volume.exists()
    assert whole.exists()
    within.wait_ready()
    assert within.get("/healthz").ok


def test_a_job_does_not_count_an_evicted_pod_as_its_own_failure(space: Workspace) -> None:
    name = space.unique("job")
    pod = {
        "restartPolicy": "Never",
        "nodeName": space.agent.name,
        "tolerations": [{"key": "kubernetes.io/arch", "operator": "Exists"}],
        "volumes": [{"name": "data", "emptyDir": {"sizeLimit": "1Mi"}}],
        "containers": [
            command(
                space.cli_image, *["fill", "/data/file", "3", "then", "sleep", "600000"], volumeMounts=MOUNTS
            )
        ],
    }
    ignore = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job = {
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "podFailurePolicy": {"rules": [ignore]}, "template": {"spec": pod}},
    }
    batch = space.cluster.batch
    batch.create_namespaced_job(space.namespace, job)
    try:

        def second() -> bool:
            found = space.core.list_namespaced_pod(space.namespace, label_selector=f"job-name={name}").items
            return len(found) > 1 or any(item.status.reason == "Evicted" for item in found)

        until(second, "the job's pod to be evicted", timeout=60)
        status = until(
            lambda: batch.read_namespaced_job(name, space.namespace).status, "the job's status", timeout=10
        )
        assert not any(item.type == "Failed" for item in status.conditions or [])
    finally:
        batch.delete_namespaced_job(name, space.namespace, propagation_policy="Background")


def test_a_node_that_is_low_on_disk_says_so_and_evicts_the_largest_first(
    make_agent: Callable[..., Agent], make_workspace: Callable[[Agent], Workspace]
) -> None:
    agent = make_agent("starved")
    agent.start()
    space = make_workspace(agent)
    critical = space.pod(served(space.http_image, space.port()), priorityClassName="system-node-critical")
    small, large = _fills(space, 1, {}), _fills(space, 20, {})
    for pod in (critical, small, large):
        pod.wait_ready()
    file = agent.data_dir / "pods" / large.uid / "volumes" / "data" / "file"
    until(lambda: file.exists() and file.stat().st_size == 20 << 20, "the file", timeout=20)
    # From now on there is always a GiB less than there has to be.
    disk = os.statvfs(agent.data_dir)
    agent.flags.append(f"--eviction-hard=nodefs.available<{disk.f_bavail * disk.f_frsize + (1 << 30)}")
    agent.restart()
    until(lambda: agent.condition("DiskPressure") == "True", "disk pressure", timeout=30)
    _wait_evicted(large, "The node was low on resource: ephemeral-storage. Threshold quantity: ")
    assert small.read().status.phase != "Failed"
    _wait_evicted(small, "The node was low on resource: ephemeral-storage.")
    assert condition(critical.read(), "Ready") == "True"
    assert agent.condition("Ready") == "True"
