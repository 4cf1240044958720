"""The node's HTTPS API: health, pods, stats and metrics, forwarded ports, and what a wasm node
cannot do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.integration.agent.harness import Cluster, Pod, Workspace
from tests.waiting import until


def test_health_is_told_in_a_word(space: Workspace) -> None:
    answer = space.agent.api("/healthz")
    assert (answer.status_code, answer.text) == (200, "ok")


def test_pods_are_listed_as_the_api_server_has_them(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    body = space.agent.api("/pods").json()
    assert (body["kind"], body["apiVersion"]) == ("PodList", "v1")

    def listed() -> bool:
        items = space.agent.api("/pods").json()["items"]
        found = [item for item in items if item["metadata"]["uid"] == pod.uid]
        return [item["status"]["phase"] for item in found] == ["Running"]

    until(listed, "the pod to be listed as running", timeout=5)
    running = space.agent.api("/runningpods/").json()["items"]
    (mine,) = (item for item in running if item["metadata"]["uid"] == pod.uid)
    assert mine["metadata"]["name"] == pod.name
    assert [item["name"] for item in mine["spec"]["containers"]] == ["web"]
    pod.delete(grace=0)
    until(
        lambda: pod.uid not in space.agent.api("/pods").text, "the pod to be on the list no more", timeout=10
    )


def test_the_summary_tells_what_node_and_pods_use(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    spinning = space.run("spin")
    spinning.wait_phase("Running")
    assert pod.get("/log", text="some bytes").ok

    def used() -> int:
        body = space.agent.api("/stats/summary").json()
        found = [item for item in body["pods"] if item["podRef"]["uid"] == spinning.uid]
        return int(found[0].get("cpu", {}).get("usageNanoCores", 0))

    assert until(used, "the rate of a busy pod", timeout=20, every=0.5) > 10_000_000
    body = space.agent.api("/stats/summary").json()
    node = body["node"]
    assert node["nodeName"] == space.agent.name
    for part in ("cpu", "memory", "fs", "runtime", "systemContainers", "startTime"):
        assert part in node, part
    assert node["memory"]["workingSetBytes"] > 0
    assert 0 < node["fs"]["usedBytes"] < node["fs"]["capacityBytes"]
    (mine,) = (item for item in body["pods"] if item["podRef"]["uid"] == pod.uid)
    assert mine["podRef"] == {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid}
    (container,) = mine["containers"]
    assert container["name"] == "web"
    assert container["cpu"]["usageCoreNanoSeconds"] >= 0
    assert container["logs"]["usedBytes"] > len("some bytes")
    assert container["startTime"] >= mine["startTime"]
    spinning.delete(grace=0)


def test_resource_metrics_are_those_that_the_metrics_server_reads(space: Workspace) -> None:
    pod = space.serve(env=[]).wait_ready()
    assert pod.get("/alloc", mib=8).ok
    answer = space.agent.api("/metrics/resource")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    of_pod = f'namespace="{pod.namespace}",pod="{pod.name}"'
    for name in (
        f'container_cpu_usage_seconds_total{{container="web",{of_pod}}}',
        f'container_memory_working_set_bytes{{container="web",{of_pod}}}',
        f'container_start_time_seconds{{container="web",{of_pod}}}',
        f"pod_cpu_usage_seconds_total{{{of_pod}}}",
        f"pod_memory_working_set_bytes{{{of_pod}}}",
        "node_cpu_usage_seconds_total",
        "node_memory_working_set_bytes",
        "resource_scrape_error",
    ):
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert float(line.removeprefix(name).split()[0]) >= 0
    assert "resource_scrape_error 0" in lines


def test_metrics_count_what_the_agent_does(space: Workspace) -> None:
    before = space.agent.metrics()
    image = space.registry.guest("http-guest", variant=space.unique("m"))
    pod = space.serve(image=image).wait_ready()
    for path in ("/version", "/version", "/status?code=404"):
        pod.get(path)
    after = space.agent.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown('krustlet_http_requests_total{code="200"}') >= 2
    assert grown('krustlet_http_requests_total{code="404"}') >= 1
    assert grown("krustlet_http_request_duration_seconds_count") >= 3
    assert grown('krustlet_image_pulls_total{result="pulled"}') == 1
    assert grown('krustlet_module_loads_total{source="compiled"}') == 1
    assert grown("krustlet_module_compile_duration_seconds_count") == 1
    assert grown("krustlet_pod_start_duration_seconds_count") == 1
    assert grown('krustlet_api_requests_total{endpoint="metrics",code="200"}') >= 1
    assert after["krustlet_pods"] >= 1
    assert after["krustlet_containers_running"] >= 1
    assert space.agent.api("/metrics").text.endswith("# EOF\n")


def test_metrics_do_not_grow_with_the_paths_that_are_asked_for(space: Workspace) -> None:
    names = set(space.agent.metrics())
    for number in range(5):
        space.agent.api(f"/made/up/{number}")
    new = {name for name in set(space.agent.metrics()) - names if "api_requests" in name}
    assert len(new) <= 1


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_exec_and_attach_are_not_implemented_and_say_why(space: Workspace, verb: str) -> None:
    pod = space.serve().wait_ready()
    target = f"{pod.namespace}/{pod.name}"
    for path, reason in (
        (f"/exec/{target}/web?command=ls", "exec is not supported by this node"),
        (f"/exec/{target}/{pod.uid}/web?command=ls", "exec is not supported by this node"),
        (f"/attach/{target}/web", "attach is not supported by this node"),
    ):
        answer = space.agent.api(path, verb=verb)
        assert (answer.status_code, reason in answer.text) == (501, True), path


def test_kubectl_shows_why_it_cannot_exec_or_attach(cluster: Cluster, space: Workspace) -> None:
    pod = space.serve().wait_ready()
    namespace = f"--namespace={pod.namespace}"
    for arguments, reason in (
        (("exec", namespace, pod.name, "--", "ls"), "exec is not supported by this node"),
        (("attach", namespace, pod.name), "attach is not supported by this node"),
    ):
        answer = cluster.kubectl(*arguments, check=False)
        assert answer.returncode != 0
        assert reason in answer.stderr, answer.stderr


@contextlib.contextmanager
def forwarded(pod: Pod, port: int) -> Iterator[tuple[str, Path]]:
    """The URL at which kubectl forwards a port of the pod, and what it prints."""
    log = pod.space.agent.directory / f"{pod.name}-forward.log"
    kubeconfig = log.with_suffix(".kubeconfig")
    kubeconfig.write_text(json.dumps(pod.space.cluster.kubeconfig))
    arguments = [
        f"--kubeconfig={kubeconfig}",
        f"--namespace={pod.namespace}",
        "port-forward",
        pod.name,
        f":{port}",
    ]
    with (
        log.open("wb") as output,
        subprocess.Popen(["kubectl", *arguments], stdout=output, stderr=output) as process,
    ):
        try:
            found = until(
                lambda: re.search(r"Forwarding from (127.0.0.1:\d+)", log.read_text()),
                "kubectl to forward the port",
            )
            yield f"http://{found[1]}", log
        finally:
            process.terminate()


def test_kubectl_forwards_a_port_of_a_pod_for_many_connections_at_once(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    with forwarded(pod, pod.port) as (url, log):
        session = requests.Session()
        for _ in range(3):
            assert session.get(f"{url}/version", timeout=20).text == "1"
        body = os.urandom(2_000_000)
        assert requests.post(f"{url}/echo", data=body, timeout=20).content == body
        with ThreadPoolExecutor(16) as pool:
            answers = list(
                pool.map(lambda _: requests.get(f"{url}/sleep?ms=50", timeout=20).status_code, range(48))
            )
        assert answers == [200] * 48
        streamed = requests.get(f"{url}/stream?chunks=5&ms=20", timeout=20).text
        assert len(streamed.splitlines()) == 5
        assert "error" not in log.read_text().lower(), log.read_text()


def test_kubectl_says_of_a_port_that_the_pod_does_not_serve_what_it_serves(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    # The agent's own API listens on the pod's address, and is not the pod's.
    with forwarded(pod, space.agent.port) as (url, log):
        with pytest.raises(requests.RequestException):
            requests.get(url, timeout=20)
        until(lambda: f"the pod does not listen on port {space.agent.port}" in log.read_text(), "the reason")
