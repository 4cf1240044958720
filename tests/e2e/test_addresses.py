"""A stack whose pods have addresses of their own: Deployments, Services and rollouts as on any node."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from scripts.lib.changes import CHANGES
from tests.e2e.conftest import Stack, running
from tests.e2e.test_changes import Client, preview, up
from tests.load import Follower
from tests.waiting import until

# Of the range for benchmarks (RFC 2544), so that nobody's network is cut off.
RANGE = f"198.18.{16 * random.randint(0, 15)}.0/20"  # noqa: S311
KEY = "wasmPodCidr"
REPLICAS = 3


def local_routes() -> list[str]:
    """What of the range this machine's kernel holds as local."""
    shown = subprocess.run(
        ["ip", "route", "show", "table", "local"], capture_output=True, text=True, check=True
    )
    return [line for line in shown.stdout.splitlines() if RANGE in line]


@pytest.fixture(scope="module")
def permitted() -> Iterator[None]:
    """The right to have a range: root's, or that of who has it made local beforehand."""
    if shutil.which("ip") is None:
        pytest.skip("no range of addresses can be made local: `ip` (iproute2) is missing")
    if os.geteuid() == 0:
        yield
        return
    route = ["local", RANGE, "dev", "lo"]
    sudo = ["sudo", "-n", "ip", "route"]
    if shutil.which("sudo") is None or subprocess.run([*sudo, "add", *route], check=False).returncode:
        pytest.skip(f"who runs this may not have a range of addresses made local: {' '.join(sudo)} failed")
    yield
    subprocess.run([*sudo, "del", *route], check=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own, as it is by default."""
    with running(tmp_path_factory.mktemp("addresses")) as made:
        yield made


# Gives up the right to change networks for all that it starts (PR_CAPBSET_DROP, CAP_NET_ADMIN), also root's.
WITHOUT_THE_RIGHT = (
    *("python", "-c"),
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 12, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])",
)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this right")
def test_who_may_not_have_a_range_is_told_what_to_run_and_the_app_goes_on(plain: Stack) -> None:
    plain.run("python", "-m", "localcloud", "stop")
    plain.run(*WITHOUT_THE_RIGHT, "python", "-m", "localcloud", "start")
    try:
        plain.run("./scripts/verify", "--wait", "90")
        refused = plain.run("pulumi", "up", "--yes", "--config", f"{KEY}={RANGE}", check=False)
        assert refused.returncode != 0
        printed = refused.stdout + refused.stderr
        assert f"sudo ip route add local {RANGE} dev lo" in printed, printed
        assert plain.get("/healthz").ok
    finally:
        plain.run("git", "checkout", "--quiet", "Pulumi.local.yaml")
        plain.run("python", "-m", "localcloud", "stop")
        plain.run("python", "-m", "localcloud", "start")
        # What there was of it is taken away again, and all that was in the subnetwork made anew.
        plain.run("./scripts/up")
    assert local_routes() == []
    assert preview(plain) == {}


@pytest.fixture(scope="module")
def ranged(permitted: None, plain: Stack) -> Stack:
    """The same stack with the range."""
    del permitted
    client = Client(str(plain.outputs()["url"]))
    plain.run("pulumi", "config", "set", KEY, RANGE)
    wanted = next(change.plan for change in CHANGES if change.key == KEY)
    assert preview(plain) == wanted
    with client.asking():
        assert up(plain) == wanted
    print(f"the app was away for {client.longest:.3f} s")  # noqa: T201 - with pytest -s
    return plain


def test_the_app_is_where_it_was_and_has_an_address_of_its_own_too(ranged: Stack) -> None:
    ranged.run("./scripts/verify", "--wait", "60")
    assert preview(ranged) == {}
    outputs = ranged.outputs()
    pod = ranged.kubectl_json("get", "pod", outputs["pod"], "--namespace", outputs["namespace"])
    ip, port = pod["status"]["podIP"], pod["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert ipaddress.ip_address(ip) in ipaddress.ip_network(RANGE)
    for url in (outputs["url"], f"http://{ip}:{port}"):
        assert requests.get(f"{url}/primorial/30", timeout=10).json()["primorial"] == "6469693230"
    node = ranged.kubectl_json("get", "node", outputs["node"])
    assert node["spec"]["podCIDR"] == RANGE
    as_node = (f"--as=system:node:{outputs['node']}", "--as-group=system:nodes")
    asked = ranged.kubectl("auth", "can-i", "list", "endpointslices", "--all-namespaces", *as_node)
    assert asked.strip() == "yes"


def manifests(image: str) -> str:
    """Three replicas, and the Service before them."""
    labels = {"app": "replicated"}
    health = {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1}
    container = {
        "name": "app",
        "image": image,
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": health,
        "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}, "requests": {"cpu": "10m"}},
    }
    key, value = "kubernetes.io/arch", "wasm32-wasi"
    spec = {
        "automountServiceAccountToken": False,
        "nodeSelector": {key: value},
        "tolerations": [{"key": key, "operator": "Equal", "value": value}],
        "containers": [container],
    }
    template = {"metadata": {"labels": labels}, "spec": spec}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "replicated"},
        "spec": {"replicas": REPLICAS, "selector": {"matchLabels": labels}, "template": template},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "replicated"},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": "http"}]},
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [deployment, service]})


def rolled_out(stack: Stack) -> None:
    stack.kubectl("rollout", "status", "deployment/replicated", "--timeout=60s")


@pytest.fixture(scope="module")
def deployed(ranged: Stack) -> Stack:
    """A Deployment and its Service, applied as anybody applies them, which stay to the end."""
    ranged.kubectl("apply", "-f", "-", text=manifests(ranged.outputs()["image"]))
    rolled_out(ranged)
    return ranged


def replicas(stack: Stack) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = stack.kubectl_json("get", "pods", "--selector=app=replicated")["items"]
    return items


def endpoints(stack: Stack) -> list[str]:
    """The ready endpoints of the Service."""
    slices = stack.kubectl_json("get", "endpointslices", "--selector=kubernetes.io/service-name=replicated")
    return [
        f"{endpoint['addresses'][0]}:{item['ports'][0]['port']}"
        for item in slices["items"]
        for endpoint in item["endpoints"] or []
        if endpoint["conditions"]["ready"]
    ]


def follower(stack: Stack) -> Follower:
    """A client of the Service, which counts the endpoints that answered."""
    return Follower(lambda: endpoints(stack), "/healthz", lambda answer: answer.url.split("/")[2])


def test_three_replicas_are_ready_on_one_node_at_three_addresses_and_all_of_a_service(
    deployed: Stack,
) -> None:
    addresses = {pod["status"]["podIP"] for pod in replicas(deployed)}
    assert len(addresses) == REPLICAS
    assert all(ipaddress.ip_address(ip) in ipaddress.ip_network(RANGE) for ip in addresses)
    assert {pod["status"]["hostIP"] for pod in replicas(deployed)}.isdisjoint(addresses)
    until(lambda: set(endpoints(deployed)) == {f"{ip}:8080" for ip in addresses}, "three endpoints")
    with follower(deployed) as client:
        until(lambda: len(client.answers) == REPLICAS, "an answer of each")
    assert client.failures == []


def test_no_request_fails_while_all_of_them_are_replaced(deployed: Stack) -> None:
    before = {pod["metadata"]["uid"] for pod in replicas(deployed)}
    with follower(deployed) as client:
        deployed.kubectl("rollout", "restart", "deployment/replicated")
        rolled_out(deployed)
        until(
            lambda: before.isdisjoint(pod["metadata"]["uid"] for pod in replicas(deployed)),
            "the old ones to be gone",
        )
        until(lambda: set(endpoints(deployed)) <= set(client.answers), "answers of the new ones")
    assert client.failures == []
    assert sum(client.answers.values()) > 100


def test_localcloud_has_the_range_again_after_a_restart(ranged: Stack) -> None:
    ranged.run("python", "-m", "localcloud", "stop")
    if os.geteuid() == 0:
        assert local_routes() == []
        # As after a reboot, where a route that was made by hand is gone.
        started = ranged.run(*WITHOUT_THE_RIGHT, "python", "-m", "localcloud", "start").stdout
        assert f"run this and try again: sudo ip route add local {RANGE} dev lo" in started
        ranged.run("python", "-m", "localcloud", "stop")
    ranged.run("python", "-m", "localcloud", "start")
    ranged.run("./scripts/verify", "--wait", "90")
    assert preview(ranged) == {}


def test_destroy_leaves_no_route(ranged: Stack) -> None:
    assert local_routes()
    ranged.run("pulumi", "destroy", "--yes", "--skip-preview")
    left = local_routes()
    # Made by hand, it is whoever's who made it.
    assert left == [] if os.geteuid() == 0 else len(left) == 1
