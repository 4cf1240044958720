"""NetworkPolicies: who may connect to a pod, as the node itself keeps it.

All of 127.0.0.0/8 is this machine's, so a test connects from whatever address it wants to be. Who does not
choose one comes from 127.0.0.1, or from the address that it calls, and is the node to the agent.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes
import pytest
import requests

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import (
    NETWORK_POLICIES,
    Agent,
    Cluster,
    Manifest,
    Pod,
    Registry,
    Workspace,
    make_namespace,
    served,
)
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other kernels hold 127.0.0.1 alone as local")

PORT = 8080
ALLOWED = "krustlet.dev/allowed-hosts"
NOT_KEPT = "NetworkPolicyNotKept"
CONDITION = "krustlet.dev/NetworkPoliciesNotKept"


@pytest.fixture(scope="module")
def cidr() -> str:
    return f"127.{random.randint(100, 199)}.{random.randint(0, 255)}.0/24"  # noqa: S311


@pytest.fixture(scope="module")
def node(
    cluster: Cluster,
    registry: Registry,
    agent_binary: Any,
    tmp_path_factory: pytest.TempPathFactory,
    cidr: str,
) -> Iterator[Agent]:
    """A node whose pods have addresses of their own, which their guests may call."""
    flags = [f"--pod-cidr={cidr}", f"--guest-egress-networks={cidr}"]
    directory = tmp_path_factory.mktemp("policies")
    made = Agent(cluster, agent_binary, directory, registry.key.public_key, "policies", registry.host, flags)
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
def on_node(cluster: Cluster, registry: Registry, node: Agent) -> Iterator[Callable[[], Workspace]]:
    """Gives a place in a namespace of its own, with the policies that a test makes there."""
    made: list[Workspace] = []

    def make() -> Workspace:
        made.append(Workspace(cluster, registry, node, make_namespace(cluster, registry)))
        return made[-1]

    yield make
    for space in made:
        space.close()
        space.cluster.networking.delete_collection_namespaced_network_policy(space.namespace)


def put(space: Workspace, spec: Manifest, name: str = "policy", **selected: str) -> None:
    """Make or change a policy for the pods of these labels; all pods without."""
    body = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": selected}, **spec},
    }
    api = space.cluster.networking
    if name in [item.metadata.name for item in api.list_namespaced_network_policy(space.namespace).items]:
        api.replace_namespaced_network_policy(name, space.namespace, body)
    else:
        api.create_namespaced_network_policy(space.namespace, body)


def ingress(*peers: Manifest, ports: list[Manifest] | None = None) -> Manifest:
    return {"ingress": [{"from": list(peers), "ports": ports or []}]}


def by_labels(**labels: str) -> Manifest:
    return {"podSelector": {"matchLabels": labels}}


def of_namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def serve(space: Workspace, **labels: str) -> Pod:
    return space.serve(port=PORT, pod={"labels": labels}).wait_ready()


def address(pod: Pod) -> str:
    return str(pod.read().status.pod_ip)


def caller(space: Workspace, *called: Pod, **labels: str) -> Pod:
    """A pod whose guest may call others."""
    hosts = {ALLOWED: ",".join(address(pod) for pod in called)}
    return space.serve(port=PORT, pod={"labels": labels, "annotations": hosts}).wait_ready()


def calls(pod: Pod, called: Pod) -> bool:
    """Whether a guest of the one pod is answered by the other."""
    answer = requests.get(
        f"http://{address(pod)}:{PORT}/fetch",
        params={"url": f"http://{address(called)}:{PORT}/version"},
        timeout=30,
    )
    assert answer.text == "200\n1" or answer.status_code == 502, answer.text
    return answer.ok


def is_answered(ip: str, source: str, port: int = PORT) -> bool:
    """Whether somebody at an address of this machine is answered; else no byte comes back."""
    connection = http.client.HTTPConnection(ip, port, timeout=20, source_address=(source, 0))
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/version")
            return connection.getresponse().read() == b"1"
        except ConnectionError:
            return False


def elsewhere(space: Workspace, ip: str, **labels: str) -> str:
    """A pod of another node, as far as the API tells: its name."""
    name = space.unique("elsewhere")
    body = {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": "a", "image": "a"}], "nodeSelector": {"no": "such"}},
    }
    space.core.create_namespaced_pod(space.namespace, body)
    status = {"phase": "Running", "hostIP": "127.99.0.1", "podIP": ip, "podIPs": [{"ip": ip}]}
    space.core.patch_namespaced_pod_status(name, space.namespace, {"status": status})
    return name


def an_address() -> str:
    return f"127.{random.randint(60, 69)}.{random.randint(0, 255)}.{random.randint(1, 254)}"  # noqa: S311


def test_a_policy_lets_one_namespace_in_and_keeps_another_out(on_node: Callable[[], Workspace]) -> None:
    shop, friends, strangers = on_node(), on_node(), on_node()
    called = serve(shop)
    friend, stranger = caller(friends, called), caller(strangers, called)
    assert calls(friend, called)
    assert calls(stranger, called)
    put(shop, ingress(of_namespace(friends.namespace)))
    until(lambda: not calls(stranger, called), "the policy to be kept")
    for _ in range(10):
        assert calls(friend, called)
        assert not calls(stranger, called)
    assert not calls(caller(shop, called), called), "its own namespace is not named"
    # Who is allowed may change while pods run.
    put(shop, ingress(of_namespace(strangers.namespace)))
    until(lambda: calls(stranger, called), "the changed policy to be kept")
    assert not calls(friend, called)
    labels = {"metadata": {"labels": {"team": "friends"}}}
    put(shop, ingress({"namespaceSelector": {"matchLabels": {"team": "friends"}}}))
    until(lambda: not calls(stranger, called), "the changed policy to be kept")
    shop.core.patch_namespace(friends.namespace, labels)
    until(lambda: calls(friend, called), "the namespace's label to be known")


def test_pods_of_this_node_and_of_others_are_let_in_by_their_labels(
    on_node: Callable[[], Workspace],
) -> None:
    shop, other = on_node(), on_node()
    called, open_one = serve(shop, app="db"), serve(shop, app="open")
    put(shop, ingress(by_labels(role="client")), app="db")
    client, stranger = caller(shop, called, role="client"), caller(shop, called, open_one, role="none")
    namesake = caller(other, called, role="client")
    until(lambda: not calls(stranger, called), "the policy to be kept")
    assert calls(client, called)
    assert not calls(namesake, called), "a pod of another namespace"
    assert calls(stranger, open_one), "a pod that no policy selects"
    ips = [an_address() for _ in range(3)]
    elsewhere(shop, ips[0], role="client")
    name = elsewhere(shop, ips[1], role="none")
    assert is_answered(address(called), ips[0])
    assert not is_answered(address(called), ips[1])
    assert not is_answered(address(called), ips[2]), "nobody's address"
    # Labels count as they are now, the caller's and the called one's.
    body = {"metadata": {"labels": {"role": "client"}}}
    shop.core.patch_namespaced_pod(name, shop.namespace, body)
    until(lambda: is_answered(address(called), ips[1]), "the label to be known")
    stranger.patch(body)
    until(lambda: calls(stranger, called), "the label to be known")
    shop.core.delete_namespaced_pod(name, shop.namespace, grace_period_seconds=0)
    until(lambda: not is_answered(address(called), ips[1]), "the pod to be gone")
    called.patch({"metadata": {"labels": {"app": "open"}}})
    until(lambda: is_answered(address(called), ips[2]), "the policy not to select it any more")


def test_networks_are_let_in_but_for_their_exceptions(on_node: Callable[[], Workspace]) -> None:
    shop = on_node()
    ip = address(serve(shop))
    put(shop, ingress({"ipBlock": {"cidr": "127.77.0.0/16", "except": ["127.77.5.0/24"]}}))
    until(lambda: not is_answered(ip, "127.78.0.1"), "the policy to be kept")
    for source, wanted in (
        ("127.77.0.1", True),
        ("127.77.255.254", True),
        ("127.77.5.1", False),
        ("127.76.0.1", False),
        # The node may always connect, and a pod to itself.
        ("127.0.0.1", True),
        (shop.agent.address, True),
        (ip, True),
    ):
        assert is_answered(ip, source) == wanted, source


def test_ports_are_let_in_by_number_range_and_name_and_those_of_other_protocols_are_none(
    on_node: Callable[[], Workspace],
) -> None:
    shop = on_node()
    ports = [
        {"name": name, "containerPort": PORT + number}
        for number, name in enumerate(("zero", "one", "two", "three"))
    ]
    host_port = shop.port()
    ports[0]["hostPort"] = host_port
    pod = shop.pod(served(shop.http_image, PORT, ports=ports)).wait_ready()
    ip, peer = address(pod), an_address()
    everybody: Manifest = {"ipBlock": {"cidr": "0.0.0.0/0"}}

    def open_ports() -> list[int]:
        return [number for number in range(4) if is_answered(ip, peer, PORT + number)]

    assert open_ports() == [0, 1, 2, 3]
    cases: list[tuple[list[Manifest], list[int]]] = [
        ([{"port": PORT}], [0]),
        ([{"port": "one"}, {"port": "none"}], [1]),
        ([{"port": PORT + 1, "endPort": PORT + 2}], [1, 2]),
        ([{"protocol": "UDP"}, {"port": PORT, "protocol": "SCTP"}], []),
        ([{"port": PORT, "protocol": "UDP"}, {"port": "three", "protocol": "TCP"}], [3]),
        ([{"protocol": "TCP"}], [0, 1, 2, 3]),
    ]
    for allowed, wanted in cases:
        put(shop, ingress(everybody, ports=allowed))
        until(lambda: open_ports() == wanted, f"{allowed} to be kept")  # noqa: B023
        # A port of the node's is the container's that it leads to.
        assert is_answered(shop.agent.address, peer, host_port) == (0 in wanted)


def test_where_all_is_denied_the_node_its_probes_and_port_forward_still_reach_the_pod(
    on_node: Callable[[], Workspace],
) -> None:
    shop = on_node()
    probe = {"httpGet": {"port": "http", "path": "/healthz"}, "periodSeconds": 1, "failureThreshold": 1}
    pod = shop.serve(port=PORT, readinessProbe=probe, livenessProbe=probe).wait_ready()
    ip, peer = address(pod), an_address()
    kept = http.client.HTTPConnection(ip, PORT, timeout=20, source_address=(peer, 0))
    kept.request("GET", "/version")
    assert kept.getresponse().read() == b"1"
    before = shop.agent.metrics()["krustlet_denied_connections_total"]
    put(shop, {"policyTypes": ["Ingress"]})
    until(lambda: not is_answered(ip, peer), "the policy to be kept")
    # A connection that was there takes no request more.
    with contextlib.closing(kept):
        kept.request("GET", "/version")
        with pytest.raises(ConnectionError):
            kept.getresponse()
    assert shop.agent.metrics()["krustlet_denied_connections_total"] >= before + 2
    restarts = pod.status().restart_count
    assert requests.get(f"http://{ip}:{PORT}/version", timeout=20).text == "1"
    probes = "krustlet_probe_results_total"
    seen = sum(value for name, value in shop.agent.metrics().items() if name.startswith(probes))

    def is_probed() -> bool:
        now = sum(value for name, value in shop.agent.metrics().items() if name.startswith(probes))
        return now > seen + 4

    until(is_probed, "probes under the policy")
    pod.wait_ready(1)
    assert pod.status().restart_count == restarts
    assert not is_answered(ip, peer)
    # Any policy that lets somebody in is enough.
    put(shop, ingress({"ipBlock": {"cidr": f"{peer}/32"}}), name="more")
    until(lambda: is_answered(ip, peer), "another policy")
    for name in ("policy", "more"):
        shop.cluster.networking.delete_namespaced_network_policy(name, shop.namespace)
    until(lambda: is_answered(ip, "127.70.0.9"), "the policies to be gone")


def test_a_policy_holds_from_the_first_moment_of_an_agent_that_starts_again(
    make_agent: AgentFactory, cluster: Cluster, registry: Registry
) -> None:
    agent = make_agent("policies-restarts", "--pod-cidr=127.90.0.0/24")
    agent.start()
    space = Workspace(cluster, registry, agent, make_namespace(cluster, registry))
    try:
        pod = serve(space)
        ip, friend, stranger = address(pod), an_address(), an_address()
        elsewhere(space, friend, role="client")
        put(space, ingress(by_labels(role="client")))
        until(lambda: not is_answered(ip, stranger), "the policy to be kept")
        for end in (agent.stop, agent.kill):
            end()
            agent.launch()
            # From the moment on which it listens.
            until(lambda: is_answered(ip, friend), "the pod to serve", every=0.01)
            for _ in range(5):
                assert not is_answered(ip, stranger)
            assert address(pod) == ip
            until(lambda: agent.condition("Ready") == "True", "the node")
    finally:
        space.close()


def test_a_guest_that_calls_a_service_by_name_is_judged_as_the_pod_that_it_is(
    make_agent: AgentFactory, cluster: Cluster, registry: Registry, routed_range: str
) -> None:
    agent = make_agent("policies-services", f"--pod-cidr={routed_range}")
    agent.start()
    space = Workspace(cluster, registry, agent, make_namespace(cluster, registry))
    try:
        serve(space, app="called")
        ports = [{"port": 80, "targetPort": PORT}]
        body = {"metadata": {"name": "called"}, "spec": {"selector": {"app": "called"}, "ports": ports}}
        space.core.create_namespaced_service(space.namespace, body)
        host = f"called.{space.namespace}.svc"
        clients = [
            space.serve(port=PORT, pod={"labels": {"role": role}, "annotations": {ALLOWED: host}})
            for role in ("client", "none")
        ]
        friend, stranger = (address(pod.wait_ready()) for pod in clients)

        def is_served(ip: str) -> bool:
            query = {"url": f"http://{host}/version"}
            return requests.get(f"http://{ip}:{PORT}/fetch", params=query, timeout=30).text == "200\n1"

        until(lambda: is_served(friend) and is_served(stranger), "the Service's endpoint")
        put(space, ingress(by_labels(role="client")), app="called")
        until(lambda: not is_served(stranger), "the policy to be kept")
        assert is_served(friend)
    finally:
        space.close()


def test_what_guests_call_is_kept_to_what_their_policies_allow_of_egress(
    on_node: Callable[[], Workspace],
) -> None:
    shop, other = on_node(), on_node()
    near, far = serve(shop, app="db"), serve(other, app="db")
    pod = caller(shop, near, far, role="client")
    assert calls(pod, near)
    assert calls(pod, far)
    before = len(pod.logs())

    def out(*peers: Manifest, ports: list[Manifest] | None = None) -> Manifest:
        return {"policyTypes": ["Egress"], "egress": [{"to": list(peers), "ports": ports or []}]}

    def called() -> tuple[bool, bool]:
        return calls(pod, near), calls(pod, far)

    for spec, wanted in (
        ({"policyTypes": ["Egress"]}, (False, False)),
        (out(by_labels(app="db")), (True, False)),
        (out(of_namespace(other.namespace)), (False, True)),
        (out({"ipBlock": {"cidr": "127.0.0.0/8", "except": [f"{address(far)}/32"]}}), (True, False)),
        (out(ports=[{"port": PORT + 1}]), (False, False)),
        (out({"namespaceSelector": {}}, ports=[{"port": "http"}]), (True, True)),
    ):
        put(shop, spec, role="client")
        until(lambda: called() == wanted, f"{spec} to be kept")  # noqa: B023
    assert f"a policy does not let the pod connect to {address(far)}:{PORT}" in pod.logs()[before:]
    # What comes in is another matter.
    assert is_answered(address(pod), an_address())
    shop.cluster.networking.delete_namespaced_network_policy("policy", shop.namespace)
    until(lambda: called() == (True, True), "the policy to be gone")


def test_an_event_says_what_of_a_policy_is_not_kept_once_for_each(on_node: Callable[[], Workspace]) -> None:
    shop = on_node()
    own = serve(shop, app="own")
    on_host = shop.serve(port=shop.port(), pod={"hostNetwork": True, "labels": {"app": "host"}}).wait_ready()
    put(shop, {"policyTypes": ["Ingress"]}, name="deny")
    put(shop, {"egress": [{"ports": [{"port": "dns"}]}], "policyTypes": ["Egress"]}, name="out", app="own")
    assert "does not apply to this pod: it is on the host's network" in on_host.wait_event(NOT_KEPT, "/deny ")
    assert is_answered(shop.agent.address, an_address(), on_host.port)
    assert "egress to ports by name" in own.wait_event(NOT_KEPT, "/out ")
    until(lambda: not is_answered(address(own), an_address()), "the policy to be kept")
    own.patch({"metadata": {"labels": {"more": "labels"}}})
    put(shop, {"policyTypes": ["Ingress"]}, name="another")
    on_host.wait_event(NOT_KEPT, "/another ")
    for pod, policies in ((own, ["out"]), (on_host, ["another", "deny"])):
        events = pod.events(NOT_KEPT)
        assert sorted(item.message.split(" ")[1].split("/")[1] for item in events) == policies
        assert {item.count for item in events} == {1}
        assert {item.type for item in events} == {"Warning"}


def test_without_addresses_for_pods_others_are_kept_out_and_an_event_says_that_pods_of_the_node_are_not(
    space: Workspace,
) -> None:
    label = {"app": space.unique("shared")}
    pod = space.serve(pod={"labels": label}).wait_ready()
    peer = an_address()
    assert is_answered(space.agent.address, peer, pod.port)
    put(space, {"policyTypes": ["Ingress"]}, **label)
    try:
        until(lambda: not is_answered(space.agent.address, peer, pod.port), "the policy to be kept")
        assert pod.get("/version").text == "1"
        assert "the pod has no address of its own" in pod.wait_event(NOT_KEPT)
    finally:
        space.cluster.networking.delete_namespaced_network_policy("policy", space.namespace)


def test_a_node_that_may_not_read_policies_serves_and_its_condition_says_so(
    make_agent: AgentFactory, cluster: Cluster, registry: Registry
) -> None:
    binding = cluster.rbac.read_cluster_role_binding(NETWORK_POLICIES)
    binding.metadata = kubernetes.client.V1ObjectMeta(name=NETWORK_POLICIES)
    cluster.rbac.delete_cluster_role_binding(NETWORK_POLICIES)
    try:
        agent = make_agent("policies-refused")
        agent.start()
        until(lambda: agent.condition(CONDITION) == "True", "the condition")
        [told] = [item for item in agent.node().status.conditions if item.type == CONDITION]
        assert "networkpolicies" in told.message
        assert NETWORK_POLICIES in told.message
        space = Workspace(cluster, registry, agent, make_namespace(cluster, registry))
        put(space, {"policyTypes": ["Ingress"]})
        pod = space.serve().wait_ready()
        peer = an_address()
        assert is_answered(agent.address, peer, pod.port)
    finally:
        cluster.rbac.create_cluster_role_binding(binding)
    try:
        until(lambda: agent.condition(CONDITION) == "False", "the condition to be over")
        until(lambda: not is_answered(agent.address, peer, pod.port), "the policy to be kept")
    finally:
        space.close()
