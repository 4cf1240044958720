"""A stack of three VMs and two apps, a pod and a Deployment, by configuration alone: its whole life."""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from scripts.lib.changes import delete, replace, update
from tests.e2e.cloud import Cloud
from tests.e2e.conftest import Stack, running
from tests.e2e.test_addresses import (
    RANGE,
    REPLICAS,
    SECOND,
    endpoints,
    follower,
    local_routes,
    permitted,
    replicas,
)
from tests.e2e.test_changes import preview, up
from tests.waiting import until

__all__ = ["permitted"]
NODES = ["krustlet-1", "krustlet-2", "krustlet-3"]
ZONES = ["europe-west1-b", "europe-west1-c", "europe-west1-d"]
# A /23 for each of them.
MAX_PODS = 250


@pytest.fixture(scope="module")
def three(permitted: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, in a directory with a blank in its name."""
    del permitted
    apps = [{"name": "primorial"}, SECOND]
    directory = tmp_path_factory.mktemp("three nodes")
    began = time.monotonic()
    with running(directory, nodes=3, maxPods=MAX_PODS, wasmPodCidr=RANGE, apps=apps) as made:
        print(f"up after {time.monotonic() - began:.0f} s")  # noqa: T201 - with pytest -s
        yield made


def nodes(stack: Stack) -> dict[str, Any]:
    listed = stack.kubectl_json("get", "nodes", "--selector=kubernetes.io/arch=wasm32-wasi")
    return {node["metadata"]["name"]: node for node in listed["items"]}


def is_ready(node: dict[str, Any]) -> bool:
    ready = [item["status"] for item in node["status"]["conditions"] if item["type"] == "Ready"]
    return ready == ["True"] and not node["spec"].get("unschedulable")


def places(stack: Stack) -> set[str]:
    """The nodes on which the Deployment's pods are."""
    return {pod["spec"]["nodeName"] for pod in replicas(stack)}


@contextmanager
def watched(stack: Stack) -> Iterator[list[set[str]]]:
    """Look at the nodes all the time; gives the sets of those that took pods."""
    seen: list[set[str]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.5):
            seen.append({name for name, node in nodes(stack).items() if is_ready(node)})

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@contextmanager
def under_load(stack: Stack) -> Iterator[None]:
    """Call the Deployment's Service while something is done: no request fails, before or after."""
    with follower(stack) as client:
        yield
        asked = sum(client.answers.values())
        until(lambda: sum(client.answers.values()) > asked + 20, "answers of those that are there now")
    print(f"{sum(client.answers.values())} requests, {len(client.failures)} failed")  # noqa: T201
    assert client.failures == []


def test_three_vms_are_in_three_zones_each_with_a_range_of_its_own(three: Stack) -> None:
    told = three.outputs()["nodes"]
    assert [node["name"] for node in told] == NODES
    assert [node["zone"] for node in told] == ZONES
    assert len({node["address"] for node in told}) == 3
    found = nodes(three)
    assert all(map(is_ready, found.values()))
    ranges = [ipaddress.IPv4Network(found[name]["spec"]["podCIDR"]) for name in NODES]
    assert all(range_.subnet_of(ipaddress.IPv4Network(RANGE)) for range_ in ranges)
    assert len(set(ranges)) == 3
    for node in told:
        name, zone = node["name"], node["zone"]
        labels = found[name]["metadata"]["labels"]
        assert labels["topology.kubernetes.io/zone"] == zone
        assert found[name]["spec"]["providerID"] == f"gce://localcloud-dev/{zone}/{name}"
    assert preview(three, "--refresh") == {}


def test_the_pod_is_on_the_first_node_and_the_replicas_on_one_each(three: Stack) -> None:
    outputs = three.outputs()
    assert outputs["url"] == f"http://{outputs['nodes'][0]['address']}:8080"
    pod = three.kubectl_json("get", "pod", outputs["pod"], "--namespace=wasm")
    assert pod["spec"]["nodeName"] == NODES[0]
    assert places(three) == set(NODES)
    for pod in replicas(three):
        name, ip = pod["spec"]["nodeName"], pod["status"]["podIP"]
        assert ipaddress.ip_address(ip) in ipaddress.ip_network(nodes(three)[name]["spec"]["podCIDR"])
        # By each agent's own port, which is the same on all.
        three.kubectl("logs", pod["metadata"]["name"], "--namespace=wasm")
    until(lambda: len(endpoints(three)) == REPLICAS, "an endpoint of each")


def test_every_app_and_every_node_is_verified(three: Stack) -> None:
    checks = json.loads(three.run("./scripts/verify", "--json", "--wait", "60").stdout)["checks"]
    names = {check["name"] for check in checks}
    assert {f"{node} is Ready, wasm32-wasi" for node in NODES} <= names
    assert {"primorial: primorials are right", "second: primorials are right"} <= names
    three.kubectl("cordon", NODES[1])
    try:
        refused = three.run("./scripts/verify", "--json", check=False)
        failed = [check for check in json.loads(refused.stdout)["checks"] if not check["passed"]]
        assert [(check["name"], check["detail"]) for check in failed] == [
            (f"{NODES[1]} is Ready, wasm32-wasi", "it is cordoned")
        ]
    finally:
        three.kubectl("uncordon", NODES[1])


def test_a_changed_line_of_the_app_fails_no_request_of_the_deployment(three: Stack) -> None:
    page = three.directory / "wasm_app" / "src" / "page.html"
    page.write_text(page.read_text().replace("</body>", "<p>yet another line</p></body>"))
    with under_load(three):
        plan = up(three)
    assert plan["workload-second-deployment"] == "update"
    assert "yet another line" in three.get("/").text
    assert places(three) == set(NODES)
    assert preview(three) == {}


def test_vms_are_replaced_one_after_the_other_and_no_request_fails(three: Stack) -> None:
    three.run("pulumi", "config", "set", "bootImage", "debian-cloud/debian-13")
    before = {name: node["metadata"]["uid"] for name, node in nodes(three).items()}
    with under_load(three), watched(three) as seen:
        plan = up(three)
    parts = ("disk", "vm", "registration")
    assert plan == replace(
        *(f"{node}-{part}" for node in ("node", "node-2", "node-3") for part in parts),
        *(f"workload-{app}-prepare" for app in ("primorial", "second")),
        *("workload-primorial-pod", "workload-primorial-smoke-test"),
    )
    after = {name: node["metadata"]["uid"] for name, node in nodes(three).items()}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert min(map(len, seen)) == 2, "never more than one of them was away"
    three.run("./scripts/verify", "--wait", "60")
    assert preview(three) == {}


def test_a_vm_that_somebody_deleted_is_there_again_after_one_up(three: Stack) -> None:
    before = nodes(three)[NODES[1]]["metadata"]["uid"]
    cloud = Cloud(three.env)
    cloud.delete_instance(NODES[1])
    up(three, "--refresh")
    assert nodes(three)[NODES[1]]["metadata"]["uid"] == before
    three.run("./scripts/verify", "--wait", "60")
    assert preview(three, "--refresh") == {}
    assert cloud.resources() == cloud.in_state(three)


def test_of_three_nodes_one_is_left_and_no_request_fails(three: Stack) -> None:
    three.run("pulumi", "config", "set", "nodes", "1")
    with under_load(three):
        plan = up(three)
    gone = ("account", "agent-firewall", "pods-firewall", "address", "token", "bootstrap")
    assert plan == update("workload-second-deployment") | delete(
        *(f"node-{number}-{part}" for number in (2, 3) for part in (*gone, "disk", "vm", "registration")),
        *(f"registry-node-{number}-reader" for number in (2, 3)),
    )
    assert list(nodes(three)) == NODES[:1]
    assert places(three) == {NODES[0]}
    assert [node["name"] for node in three.outputs()["nodes"]] == NODES[:1]
    three.run("./scripts/verify", "--wait", "60")
    assert preview(three, "--refresh") == {}
    cloud = Cloud(three.env)
    assert cloud.resources() == cloud.in_state(three)
    assert not any(f"/{name}" in path for path in cloud.resources() for name in NODES[1:])
    instances = three.directory / ".localcloud" / "instances"
    assert [path.name for path in instances.iterdir()] == NODES[:1]


def test_destroy_leaves_nothing(three: Stack) -> None:
    url = three.outputs()["url"]
    three.run("pulumi", "destroy", "--yes", "--skip-preview")
    assert Cloud(three.env).resources() == set()
    assert list((three.directory / ".localcloud" / "instances").iterdir()) == []
    assert local_routes() == [] or len(local_routes()) == 1
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/healthz", timeout=5)
