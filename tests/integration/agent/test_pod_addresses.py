"""An address for every pod, out of a range of the node's (`--pod-cidr`).

Ranges are parts of 127.0.0.0/8, all of which Linux holds as local. An EndpointSlice takes no loopback
address, so tests of Services have a range routed to this machine, which needs the right to do so.

KRUSTLET_ADDRESS_STARTS=2000 starts so many pods in the test of addresses that are never used twice.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes
import pytest
import requests

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import (
    TOLERATIONS,
    Agent,
    Manifest,
    Pod,
    Workspace,
    condition,
    served,
)
from tests.load import Follower
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other kernels hold 127.0.0.1 alone as local")

STARTS = int(os.environ.get("KRUSTLET_ADDRESS_STARTS", "40"))
PORT = 8080
Workspaces = Callable[[Agent], Workspace]


def a_range(prefix: int = 24) -> str:
    """A part of 127.0.0.0/8 in which the tests have nothing else."""
    address = f"127.{random.randint(100, 199)}.{random.randint(0, 255)}.0"  # noqa: S311
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))


def address(pod: Pod) -> str:
    """The pod's address, once it is ready."""
    pod.wait_ready()
    return str(pod.read().status.pod_ip)


def get(pod: Pod, path: str, **query: str | int) -> requests.Response:
    """A request to the pod's own address."""
    return requests.get(f"http://{address(pod)}:{pod.port}{path}", params=query, timeout=20)


def environment() -> list[Manifest]:
    return [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in (("NAME", "metadata.name"), ("IP", "status.podIP"), ("HOST", "status.hostIP"))
    ]


def test_two_apps_have_the_same_port_on_one_node_each_at_an_address_that_its_status_and_variables_tell(
    make_agent: AgentFactory, make_workspace: Workspaces
) -> None:
    cidr = a_range()
    agent = make_agent("addresses-apps", f"--pod-cidr={cidr}")
    agent.start()
    space = make_workspace(agent)
    hook = {"postStart": {"httpGet": {"port": "http", "path": "/log?text=hooked"}}}
    probe = {"httpGet": {"port": PORT, "path": "/healthz"}, "periodSeconds": 1}
    tcp = {"tcpSocket": {"port": "http"}, "periodSeconds": 1}
    ports = [{"name": "http", "containerPort": PORT}, {"name": "second", "containerPort": 8081}]
    extra: Manifest = {"env": environment(), "ports": ports, "lifecycle": hook}
    probes: Manifest = {"readinessProbe": probe, "livenessProbe": tcp}
    pods = [space.serve(port=PORT, **extra, **probes) for _ in range(2)]
    for pod in pods:
        told = get(pod, "/env").json()
        ip = address(pod)
        assert ipaddress.ip_address(ip) in ipaddress.ip_network(cidr)
        assert told == {"NAME": pod.name, "IP": ip, "HOST": agent.address}
        assert requests.get(f"http://{ip}:8081/version", timeout=20).text == "1"
        status = pod.read().status
        assert [item.ip for item in status.pod_ips] == [ip]
        assert (status.host_ip, [item.ip for item in status.host_ips]) == (agent.address, [agent.address])
        assert "hooked" in pod.logs()
        assert f"{ip}:{PORT}" in pod.wait_event("Started")
    assert len({address(pod) for pod in pods}) == 2
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://{agent.address}:{PORT}/version", timeout=5)
    node = agent.node()
    assert (node.spec.pod_cidr, node.spec.pod_cidrs) == (cidr, [cidr])
    assert f"pod: each pod has an address of its own out of {cidr}" in described(agent)
    # The other's address is one that only the node reaches, unless its operator opens it.
    caller = space.serve(
        port=PORT, pod={"annotations": {"krustlet.dev/allowed-hosts": f"{address(pods[0])}:{PORT}"}}
    )
    answer = get(caller, "/fetch", url=f"http://{address(pods[0])}:{PORT}/version")
    assert (answer.status_code, answer.text) == (502, "DestinationIpProhibited")


def described(agent: Agent) -> str:
    return " ".join(agent.cluster.kubectl("describe", "node", agent.name).stdout.split())


def test_two_containers_of_a_pod_share_its_address_and_cannot_share_a_port(
    make_agent: AgentFactory, make_workspace: Workspaces
) -> None:
    agent = make_agent("addresses-containers", f"--pod-cidr={a_range()}")
    agent.start()
    space = make_workspace(agent)
    both = space.pod(served(space.http_image, PORT), served(space.http_image, PORT + 1, name="other"))
    ip = address(both)
    for port in (PORT, PORT + 1):
        assert requests.get(f"http://{ip}:{port}/version", timeout=20).text == "1"
    clash = space.pod(served(space.http_image, PORT), served(space.http_image, PORT, name="other"))
    waiting = until(
        lambda: [
            item.state.waiting.message
            for item in clash.read().status.container_statuses or []
            if item.state.waiting and item.state.waiting.reason == "PortInUse"
        ],
        "one of them to wait",
    )
    assert "port 8080 of the pod's address is served by container" in waiting[0]


def test_host_network_and_host_ports_are_the_nodes(
    make_agent: AgentFactory, make_workspace: Workspaces
) -> None:
    agent = make_agent("addresses-host", f"--pod-cidr={a_range()}")
    agent.start()
    space = make_workspace(agent)
    on_node = space.serve(pod={"hostNetwork": True}).wait_ready()
    assert on_node.read().status.pod_ip == agent.address
    assert on_node.get("/version").text == "1"
    host_port = space.port()
    ports = [{"name": "http", "containerPort": PORT, "hostPort": host_port}]
    both = space.serve(port=PORT, ports=ports)
    assert get(both, "/version").text == "1"
    assert requests.get(f"http://{agent.address}:{host_port}/version", timeout=20).text == "1"
    second = space.serve(port=PORT, ports=ports)
    assert "this node" in second.wait_waiting("PortInUse")
    both.delete(grace=0)
    assert get(second, "/version").text == "1"


def test_a_pod_waits_for_an_address_with_a_reason_and_takes_one_that_becomes_free(
    make_agent: AgentFactory, make_workspace: Workspaces
) -> None:
    agent = make_agent("addresses-few", f"--pod-cidr={a_range(30)}")
    agent.start()
    space = make_workspace(agent)
    first, second = (space.serve(port=PORT) for _ in range(2))
    given = {address(first), address(second)}
    third = space.serve(port=PORT)
    assert "all 2 addresses of this node's range" in third.wait_waiting("NoPodAddress")
    third.wait_event("FailedCreatePodSandBox", "--pod-cidr")
    assert third.read().status.pod_ip is None
    # It takes no room from one that shares the node's address.
    space.serve(pod={"hostNetwork": True}).wait_ready()
    first.delete()
    assert address(third) in given - {address(second)}
    # One that has completed needs none any more.
    second.delete()
    done = space.run("print", "done")
    done.wait_phase("Succeeded")
    assert address(space.serve(port=PORT)) in given


def test_pods_keep_their_addresses_when_the_agent_stops_is_killed_or_loses_its_journal(
    make_agent: AgentFactory, make_workspace: Workspaces
) -> None:
    cidr = a_range()
    agent = make_agent("addresses-restarts", f"--pod-cidr={cidr}")
    agent.start()
    space = make_workspace(agent)
    pods = [space.serve(port=PORT) for _ in range(4)]
    before = {pod.name: address(pod) for pod in pods}
    pods[0].delete(grace=0)
    pods[0].wait_gone()

    def check() -> None:
        agent.start()
        for pod in pods[1:]:
            assert get(pod, "/version").text == "1"
        assert {pod.name: address(pod) for pod in pods[1:]} == {
            pod.name: before[pod.name] for pod in pods[1:]
        }

    agent.stop()
    check()
    agent.kill()
    check()
    agent.stop()
    (agent.data_dir / "addresses").unlink()
    check()
    agent.stop()
    other = a_range()
    agent.flags[-1] = f"--pod-cidr={other}"
    agent.start()
    for pod in pods[1:]:

        def moved(shown: Any) -> bool:
            ips = [item.ip for item in shown.status.pod_ips or []]
            return len(ips) == 1 and ipaddress.ip_address(ips[0]) in ipaddress.ip_network(other)

        pod.wait(moved, "another address, and the old one gone")
        assert get(pod, "/version").text == "1"
    assert agent.node().spec.pod_cidr == cidr, "the API server takes it once"
    assert f"out of {other}; the Node's podCIDR {cidr} was set before" in described(agent)
    agent.stop()
    agent.flags.pop()
    agent.start()
    assert "node: a containerPort is a port of the node's address" in described(agent)


def addressed(pods: list[Pod]) -> int:
    """How many of the pods have an address."""
    return sum(bool(pod.read().status.pod_ip) for pod in pods)


def test_an_address_is_never_used_twice_while_pods_come_and_go_and_the_agent_is_killed(
    make_agent: AgentFactory, make_workspace: Workspaces
) -> None:
    agent = make_agent("addresses-many", f"--pod-cidr={a_range(16)}")
    agent.start()
    space = make_workspace(agent)
    seen: dict[str, str] = {}
    started = 0
    for round_ in range(-(-STARTS // 20)):
        pods = [space.serve(port=PORT) for _ in range(20)]
        started += len(pods)
        if round_ % 5 == 0:
            # At some moment between the first one that has an address and the last that is ready.
            wanted = random.randint(1, 19)  # noqa: S311
            until(lambda: addressed(pods) >= wanted, "some addresses", every=0.02)  # noqa: B023
            shown = {pod.name: pod.read().status.pod_ip for pod in pods}
            agent.kill()
            agent.start()
            for pod in pods:
                assert shown[pod.name] in (None, address(pod)), "it was given before"
        for pod in pods:
            ip = address(pod)
            assert ip not in seen, f"{pod.name} has the address of {seen[ip]}"
            seen[ip] = pod.name
        for pod in pods:
            pod.delete(grace=0)
        for pod in pods:
            pod.wait_gone()
    assert len(seen) == started


def test_a_range_that_is_not_this_machines_is_refused_at_the_start_with_what_to_do(
    make_agent: AgentFactory,
) -> None:
    agent = make_agent("addresses-refused", "--pod-cidr=203.0.113.0/24")
    agent.launch()
    assert agent.process is not None
    assert agent.process.wait(60) != 0
    assert "ip route add local 203.0.113.0/24 dev lo" in agent.log
    agent.process = None


def follower(space: Workspace, service: str) -> Follower:
    """A client of a Service, which counts the pods that answered by their names."""
    api: Any = kubernetes.client.DiscoveryV1Api(space.core.api_client)
    selector = f"kubernetes.io/service-name={service}"

    def ready() -> list[str]:
        return [
            f"{endpoint.addresses[0]}:{item.ports[0].port}"
            for item in api.list_namespaced_endpoint_slice(space.namespace, label_selector=selector).items
            for endpoint in item.endpoints or []
            if endpoint.conditions.ready
        ]

    return Follower(ready, "/env", lambda answer: str(answer.json()["NAME"]))


def deploy(space: Workspace, name: str, replicas: int) -> Any:
    """A Deployment on the agent's node with a Service of its name; gives the API of both."""
    labels = {"app": name}
    container = served(
        space.http_image,
        PORT,
        env=environment(),
        readinessProbe={"httpGet": {"port": "http", "path": "/healthz"}, "periodSeconds": 1},
    )
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "containers": [container],
            "nodeName": space.agent.name,
            "tolerations": TOLERATIONS,
            "automountServiceAccountToken": False,
        },
    }
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    apps: Any = kubernetes.client.AppsV1Api(space.core.api_client)
    apps.create_namespaced_deployment(space.namespace, {"metadata": {"name": name}, "spec": spec})
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    space.core.create_namespaced_service(
        space.namespace, {"metadata": {"name": name}, "spec": {"selector": labels, "ports": ports}}
    )
    wait_rolled_out(space, name)
    return apps


def wait_rolled_out(space: Workspace, name: str) -> None:
    space.cluster.kubectl(
        "rollout", "status", f"deployment/{name}", f"--namespace={space.namespace}", "--timeout=50s"
    )


@pytest.fixture
def routed(make_agent: AgentFactory, make_workspace: Workspaces, routed_range: str) -> Iterator[Workspace]:
    """A place for Deployments and Services on a node whose pods' addresses an EndpointSlice takes."""
    agent = make_agent("addresses-routed", f"--pod-cidr={routed_range}")
    agent.start()
    space = make_workspace(agent)
    yield space
    for kind in ("deployments", "services"):
        space.cluster.kubectl("delete", kind, "--all", f"--namespace={space.namespace}", "--wait=false")


def test_twenty_replicas_on_one_node_are_twenty_endpoints_of_a_service_on_one_port(routed: Workspace) -> None:
    deploy(routed, "twenty", 20)
    with follower(routed, "twenty") as client:
        until(lambda: len(client.ready) == 20, "twenty ready endpoints")
        client.answers.clear()
        until(lambda: sum(client.answers.values()) >= 400, "answers")
    assert client.failures == []
    counts = client.answers.values()
    assert len(counts) == 20
    assert max(counts) <= 1.2 * sum(counts) / 20, client.answers


def test_no_request_fails_in_a_rollout_under_load(routed: Workspace) -> None:
    deploy(routed, "rolled", 2)
    with follower(routed, "rolled") as client:
        before = set(names(routed, "rolled"))
        for number in range(2):
            # A number of our own: `kubectl rollout restart` writes the second, and refuses another within it.
            template = {"metadata": {"annotations": {"tests/rollout": str(number)}}}
            routed.cluster.kubectl(
                "patch",
                "deployment/rolled",
                f"--namespace={routed.namespace}",
                f"--patch={json.dumps({'spec': {'template': template}})}",
            )
            wait_rolled_out(routed, "rolled")
        until(lambda: len(names(routed, "rolled")) == 2, "the old ones to be gone")
        after = set(names(routed, "rolled"))
        until(lambda: after <= set(client.answers), "answers of the new ones")
    assert client.failures == []
    assert not before & after


def test_a_guest_calls_an_app_by_the_name_of_its_service_and_its_requests_are_spread(
    routed: Workspace,
) -> None:
    deploy(routed, "called", 4)
    with follower(routed, "called") as client:
        until(lambda: len(client.ready) == 4, "four ready endpoints")
    service = f"called.{routed.namespace}.svc"
    caller = routed.serve(port=PORT, pod={"annotations": {"krustlet.dev/allowed-hosts": service}})
    counts: Counter[str] = Counter()
    for _ in range(80):
        status, _, body = get(caller, "/fetch", url=f"http://{service}/env").text.partition("\n")
        assert status == "200", body
        counts[json.loads(body)["NAME"]] += 1
    assert set(counts) == set(names(routed, "called"))
    assert max(counts.values()) <= 1.2 * 20, counts
    # Its list of hosts is still the first word, and what a Service is not is said in its log.
    other = get(caller, "/fetch", url=f"http://other.{routed.namespace}.svc/")
    assert (other.status_code, other.text) == (502, "HttpRequestDenied")
    assert get(caller, "/fetch", url=f"http://{service}:81/").status_code == 502
    assert "the Service has no TCP port 81" in caller.logs()


def names(space: Workspace, app: str) -> list[str]:
    pods = space.core.list_namespaced_pod(space.namespace, label_selector=f"app={app}").items
    assert all(condition(pod, "PodScheduled") for pod in pods)
    return [str(pod.metadata.name) for pod in pods]
