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
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from scripts.lib.changes import CHANGES, create, update
from tests.e2e.conftest import Stack, leaves, running
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


SECOND = {"name": "second", "crate": "wasm_app", "port": "8080", "replicas": str(REPLICAS)}
OF_SECOND = "app.kubernetes.io/name=second"


def rolled_out(stack: Stack) -> None:
    stack.kubectl("rollout", "status", "deployment/second", "--namespace=wasm", "--timeout=60s")


@pytest.fixture(scope="module")
def deployed(ranged: Stack) -> Stack:
    """The same stack with a second app, on the port of the first: three replicas, by configuration alone."""
    for path, value in leaves("apps", [{"name": "primorial"}, SECOND]):
        ranged.run("pulumi", "config", "set", "--path", path, value)
    wanted = create(
        *(f"app-second-{part}" for part in ("build", "push", "signature", "signature-push", "attestation")),
        *(f"workload-second-{part}" for part in ("prepare", "deployment", "service", "disruption-budget")),
    )
    assert preview(ranged) == wanted
    assert up(ranged) == wanted
    return ranged


def replicas(stack: Stack) -> list[dict[str, Any]]:
    listed = stack.kubectl_json("get", "pods", "--namespace=wasm", f"--selector={OF_SECOND}")
    items: list[dict[str, Any]] = listed["items"]
    return items


def endpoints(stack: Stack) -> list[str]:
    """The ready endpoints of the Service."""
    of_service = ("--namespace=wasm", "--selector=kubernetes.io/service-name=second")
    slices = stack.kubectl_json("get", "endpointslices", *of_service)
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
        deployed.kubectl("rollout", "restart", "deployment/second", "--namespace=wasm")
        rolled_out(deployed)
        until(
            lambda: before.isdisjoint(pod["metadata"]["uid"] for pod in replicas(deployed)),
            "the old ones to be gone",
        )
        until(lambda: set(endpoints(deployed)) <= set(client.answers), "answers of the new ones")
    assert client.failures == []
    assert sum(client.answers.values()) > 100


@contextmanager
def forwarded(stack: Stack, *what: str) -> Iterator[str]:
    """`kubectl port-forward`; gives the URL that it opens."""
    with subprocess.Popen(
        ["kubectl", "port-forward", *what],
        cwd=stack.directory,
        env=stack.env,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            # Forwarding from 127.0.0.1:PORT -> 8080
            yield f"http://{process.stdout.readline().split()[2]}"
        finally:
            process.terminate()


def test_every_app_is_verified_and_asked_from_outside(deployed: Stack) -> None:
    outputs = deployed.outputs()
    assert outputs["urls"] == {"primorial": outputs["url"], "second": "http://second.wasm.svc:8080"}
    assert outputs["images"].keys() == outputs["urls"].keys()
    checks = json.loads(deployed.run("./scripts/verify", "--json", "--wait", "60").stdout)["checks"]
    names = {check["name"] for check in checks}
    assert {"primorial: primorials are right", "second: primorials are right"} <= names
    with forwarded(deployed, "--namespace=wasm", "service/second", ":8080") as url:
        assert requests.get(f"{url}/primorial/30", timeout=10).json()["primorial"] == "6469693230"


@pytest.mark.parametrize(("field", "value"), [("memoryLimit", "32Mi"), ("replicas", "1"), ("replicas", "3")])
def test_replicas_are_changed_in_place_and_no_request_fails(deployed: Stack, field: str, value: str) -> None:
    deployed.run("pulumi", "config", "set", "--path", f"apps[1].{field}", value)
    with follower(deployed) as client:
        assert up(deployed) == update("workload-second-deployment")
        asked = sum(client.answers.values())
        until(lambda: sum(client.answers.values()) > asked + 20, "answers of those that are there now")
    assert client.failures == []
    assert preview(deployed) == {}


def test_an_autoscaler_has_the_say_of_how_many_there_are(deployed: Stack) -> None:
    for path, value in leaves("apps[1].autoscaling", {"minReplicas": "2", "maxReplicas": "3"}):
        deployed.run("pulumi", "config", "set", "--path", path, value)
    assert up(deployed) == update("workload-second-deployment") | create("workload-second-autoscaler")
    place = ("deployment/second", "--namespace=wasm")
    # As it would: nobody here measures what pods use.
    deployed.kubectl("scale", *place, "--replicas=2")
    deployed.run("pulumi", "config", "set", "--path", "apps[1].cpuLimit", "250m")
    assert up(deployed) == update("workload-second-deployment", "workload-second-autoscaler")
    assert deployed.kubectl_json("get", *place)["spec"]["replicas"] == 2
    assert preview(deployed, "--refresh") == {}


def test_the_first_app_goes_and_the_second_stays_as_it_is_and_back(deployed: Stack) -> None:
    before = {pod["metadata"]["uid"] for pod in replicas(deployed)}
    deployed.run("pulumi", "config", "rm", "--path", "apps[0]")
    with follower(deployed) as client:
        plan = up(deployed)
        until(lambda: len(client.answers) >= 2, "answers")
    assert client.failures == []
    assert set(plan.values()) == {"delete"}
    assert {pod["metadata"]["uid"] for pod in replicas(deployed)} == before
    assert preview(deployed) == {}
    deployed.run("pulumi", "config", "rm", "apps")
    deployed.run("./scripts/up")
    assert preview(deployed) == {}
    for kind in ("pods", "deployments", "services", "poddisruptionbudgets", "horizontalpodautoscalers"):
        assert deployed.kubectl("get", kind, "--namespace=wasm", f"--selector={OF_SECOND}") == ""
    assert deployed.outputs()["urls"] == {"primorial": deployed.outputs()["url"]}


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
