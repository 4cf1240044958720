"""Pod contract, memory and disk: what takes more than it may, or is left, is evicted, as by a kubelet."""

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


EVERYTHING = [{"operator": "Exists"}]


def _holds(space: Workspace, mib: int, request: str = "", **pod: Any) -> Pod:
    """A pod that asked for so much memory, "" for none, and holds so much once it has a file /data/go."""
    resources = {"requests": {"memory": request}} if request else {}
    words = f"write /data/waits x then await /data/go then alloc {mib} then sleep 600000".split()
    made = command(space.cli_image, *words, volumeMounts=MOUNTS, resources=resources)
    return space.pod(made, volumes=[{"name": "data", "emptyDir": {}}], tolerations=EVERYTHING, **pod)


def test_a_node_that_is_low_on_memory_evicts_in_the_kubelets_order_and_keeps_out_who_asks_for_none(
    make_agent: Callable[..., Agent], make_workspace: Callable[[Agent], Workspace]
) -> None:
    # There is never as much free as there has to be, of memory.
    short = "--eviction-hard=memory.available<100%,nodefs.available<1%,nodefs.inodesFree<1%"
    agent = make_agent("short", short, "--eviction-pressure-transition-period=5s")
    agent.start()
    space = make_workspace(agent)
    small = space.serve(pod={"tolerations": EVERYTHING})
    critical = _holds(space, 16, priorityClassName="system-node-critical")
    within = _holds(space, 8, "64Mi")
    above, most = _holds(space, 8), _holds(space, 24)
    holders = [critical, within, above, most]
    small.wait_ready()
    volumes = [agent.data_dir / "pods" / pod.uid / "volumes" / "data" for pod in holders]
    until(lambda: all((volume / "waits").exists() for volume in volumes), "the pods to begin")
    # Between two looks, so that the next one finds all of them.
    looks = agent.log.count("has no pod that may be evicted")
    until(
        lambda: agent.log.count("has no pod that may be evicted") > looks, "a look at the memory", timeout=30
    )
    start = space.cluster.moment()
    for volume in volumes:
        (volume / "go").touch()
    for pod in (most, above, within):
        status = _wait_evicted(pod, "The node was low on resource: memory. Threshold quantity: ")
        assert ("has larger consumption of memory" in status.message) == (pod is not within)
    changes = space.cluster.changes(start, space.core.list_namespaced_pod, space.namespace)
    evicted = [item["object"].metadata.name for item in changes if item["object"].status.reason == "Evicted"]
    assert list(dict.fromkeys(evicted)) == [most.name, above.name, within.name]
    assert agent.condition("MemoryPressure") == "True"

    def tainted() -> bool:
        return any(item.key == "node.kubernetes.io/memory-pressure" for item in agent.node().spec.taints)

    until(tainted, "the taint")
    refused = space.serve().wait_phase("Failed")
    assert (refused.reason, refused.message) == ("Evicted", "The node had condition: [MemoryPressure]. ")
    asks = space.serve(resources={"requests": {"memory": "1Mi"}}).wait_ready()
    assert asks.get("/healthz").ok
    # Its end would bring nothing back.
    assert small.get("/healthz").ok
    assert critical.read().status.phase == "Running"
    agent.flags.remove(short)
    agent.restart()
    until(lambda: not tainted(), "the end of the pressure", timeout=30)
    space.serve().wait_ready()


def test_pods_that_together_take_what_all_of_them_may_lose_the_one_that_is_furthest_above_its_request(
    make_agent: Callable[..., Agent], make_workspace: Callable[[Agent], Workspace]
) -> None:
    # The machine has plenty; 100 MiB of the 300 for guests are to be left.
    agent = make_agent("crowded", "--guest-memory=300Mi", "--eviction-pressure-transition-period=5s")
    agent.start()
    space = make_workspace(agent)
    within = _holds(space, 60, "64Mi")
    above, most = _holds(space, 50), _holds(space, 64)
    last = _holds(space, 40, "40Mi")
    holders = [within, above, most, last]
    volumes = [agent.data_dir / "pods" / pod.uid / "volumes" / "data" for pod in holders]
    until(lambda: all((volume / "waits").exists() for volume in volumes), "the pods to begin")
    for volume in volumes[:-1]:
        (volume / "go").touch()

    def held() -> int:
        pods = agent.api("/stats/summary").json()["pods"]
        return sum(int(pod.get("memory", {}).get("workingSetBytes", 0)) for pod in pods)

    until(lambda: held() > 174 << 20, "three pods to hold what they are to", timeout=20)
    assert agent.condition("MemoryPressure") == "False"
    (volumes[-1] / "go").touch()
    _wait_evicted(most, "The node was low on resource: memory. Threshold quantity: 104857600, available: ")
    assert agent.condition("MemoryPressure") == "True"
    until(lambda: agent.condition("MemoryPressure") == "False", "the end of the pressure", timeout=30)
    assert [pod.read().status.phase for pod in (within, above, last)] == ["Running"] * 3
