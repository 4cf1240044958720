"""Pods from a grammar of valid and half-valid specs, thrown at one node.

After each batch the node is Ready, its agent is the same process and has not grown beyond a bound, what was
deleted is gone, and a pod that nobody touched has answered every request.

    KRUSTLET_RANDOM_PODS_SECONDS=600    so long, with seeds of the clock, in place of a few seeded batches
    KRUSTLET_RANDOM_PODS_SEED=7         one seed, such as one that has failed
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from kubernetes.client.exceptions import ApiException

from tests.integration.agent.harness import TOLERATIONS, Agent, Manifest, Workspace
from tests.waiting import until

# What the agent may hold more after a batch than before the first: code, and what allocators keep.
GROWTH = 256 << 20
BATCHES = 3
SEEDS = (1, 2)

NAMES = st.sampled_from(["a", "b", "main", "web-1"])
PORTS = st.sampled_from([0, 1, 53, 8080, 18080, 18081, 18082, 65535])
QUANTITIES = st.sampled_from(["0", "1", "1m", "100m", "1500m", "1Ki", "16Mi", "64Mi", "1Ti", "1e3", "0.1"])
PATHS = st.sampled_from(["/", "/healthz", "/nothing", "/status?code=500", "/x y", "//", "/sleep?ms=50", "#"])
DURATIONS = st.sampled_from(["30s", "1m30s", "0s", "soon", "", "999999999h", "1ms", "-1s", "1e9s"])


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Manifest]:
    """A mapping with any of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


def _ports() -> st.SearchStrategy[list[Manifest]]:
    port = st.fixed_dictionaries(
        {"containerPort": PORTS},
        optional={
            "protocol": st.sampled_from(["TCP", "UDP", "SCTP"]),
            "hostPort": PORTS,
            "name": st.sampled_from(["http", "metrics", "dns"]),
        },
    )
    return st.lists(port, max_size=4)


def _action() -> st.SearchStrategy[Manifest]:
    http = st.fixed_dictionaries(
        {"port": st.one_of(PORTS, st.sampled_from(["http", "none"]))},
        optional={
            "path": PATHS,
            "scheme": st.sampled_from(["HTTP", "HTTPS"]),
            "httpHeaders": st.just([{"name": "Host", "value": "a b"}]),
        },
    )
    return st.one_of(
        st.fixed_dictionaries({"httpGet": http}),
        st.fixed_dictionaries({"tcpSocket": st.fixed_dictionaries({"port": PORTS})}),
        st.just({"exec": {"command": ["true"]}}),
    )


def _probe() -> st.SearchStrategy[Manifest]:
    timing = _some(
        periodSeconds=st.integers(1, 2),
        failureThreshold=st.integers(1, 2),
        initialDelaySeconds=st.integers(0, 1),
    )
    return st.builds(lambda action, more: {**action, **more}, _action(), timing)


def _variables() -> st.SearchStrategy[list[Manifest]]:
    value = st.sampled_from(["x", "$(A)$(A)$(A)", "$(B)$(C)", "$$(A)", "$(", "x" * 5000, "\u00e9\U0001f980"])
    source = st.sampled_from(
        [
            {"fieldRef": {"fieldPath": "status.podIP"}},
            {"fieldRef": {"fieldPath": "metadata.nonsense"}},
            {"resourceFieldRef": {"resource": "limits.memory"}},
            {"configMapKeyRef": {"name": "missing", "key": "k"}},
            {"secretKeyRef": {"name": "missing", "key": "k", "optional": True}},
        ]
    )
    literal = st.builds(lambda name, text: {"name": name, "value": text}, st.sampled_from("ABC"), value)
    other = st.builds(
        lambda name, origin: {"name": name, "valueFrom": origin}, st.sampled_from("ABC"), source
    )
    return st.lists(st.one_of(literal, literal, other), max_size=4)


def _container(images: list[str]) -> st.SearchStrategy[Manifest]:
    commands = st.sampled_from(
        [
            ["print", "hello"],
            ["exit", "42"],
            ["fail"],
            ["trap"],
            ["sleep", "60000"],
            ["spin"],
            ["alloc", "200"],
            ["print", "x" * 20000],
            [],
        ]
    )
    mount = st.fixed_dictionaries(
        {
            "name": st.sampled_from(["v", "w", "unknown"]),
            "mountPath": st.sampled_from(["/v", "/v/w", "/", "relative"]),
        },
        optional={
            "subPath": st.sampled_from(["s", "../s", "a/../../b", "/absolute"]),
            "readOnly": st.booleans(),
        },
    )
    rules = st.just(
        [
            {"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}},
            {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [134]}},
        ]
    )
    return st.fixed_dictionaries(
        {"name": NAMES, "image": st.sampled_from(images)},
        optional={
            "args": commands,
            "env": _variables(),
            "ports": _ports(),
            "resources": _some(
                limits=_some(cpu=QUANTITIES, memory=QUANTITIES), requests=_some(cpu=st.just("1m"))
            ),
            "volumeMounts": st.lists(mount, max_size=3),
            "livenessProbe": _probe(),
            "readinessProbe": _probe(),
            "startupProbe": _probe(),
            "lifecycle": _some(
                postStart=_action(), preStop=st.one_of(_action(), st.just({"sleep": {"seconds": 1}}))
            ),
            "restartPolicy": st.sampled_from(["Always", "OnFailure", "Never"]),
            "restartPolicyRules": rules,
            "imagePullPolicy": st.sampled_from(["Always", "IfNotPresent", "Never"]),
            "terminationMessagePolicy": st.just("FallbackToLogsOnError"),
        },
    )


def _volumes() -> st.SearchStrategy[list[Manifest]]:
    source = st.sampled_from(
        [
            {"emptyDir": {}},
            {"emptyDir": {"sizeLimit": "1"}},
            {"configMap": {"name": "missing"}},
            {"configMap": {"name": "missing", "optional": True}},
            {"secret": {"secretName": "missing"}},
            {"hostPath": {"path": "/"}},
            {"downwardAPI": {"items": [{"path": "../x", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            {"projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}}]}},
        ]
    )
    volume = st.builds(lambda name, origin: {"name": name, **origin}, st.sampled_from(["v", "w"]), source)
    return st.lists(volume, max_size=3)


def pods(images: list[str]) -> st.SearchStrategy[Manifest]:
    """The grammar: metadata's annotations and a spec."""
    annotations = _some(
        **{
            "krustlet.dev/request-timeout": DURATIONS,
            "krustlet.dev/max-concurrent-requests": st.sampled_from(["1", "0", "100000", "many"]),
            "krustlet.dev/allowed-hosts": st.sampled_from(["127.0.0.1", "*", "*.example.com", "a b", ","]),
        }
    )
    spec = st.fixed_dictionaries(
        {"containers": st.lists(_container(images), min_size=1, max_size=3)},
        optional={
            "initContainers": st.lists(_container(images), max_size=2),
            "volumes": _volumes(),
            "restartPolicy": st.sampled_from(["Always", "OnFailure", "Never"]),
            "terminationGracePeriodSeconds": st.integers(0, 2),
            "activeDeadlineSeconds": st.integers(1, 3),
            "hostNetwork": st.booleans(),
            "resources": _some(limits=_some(cpu=QUANTITIES, memory=QUANTITIES)),
        },
    )
    return st.fixed_dictionaries({"annotations": annotations, "spec": spec})


@dataclass
class Neighbour:
    """A pod that nobody touches, and what it answers all the while."""

    url: str
    answers: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        with requests.Session() as session:
            while not self._stop.wait(0.05):
                try:
                    answer = str(session.get(f"{self.url}/version", timeout=20).status_code)
                except requests.RequestException as error:
                    answer = f"{error}"
                self.answers[answer] += 1

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        thread = threading.Thread(target=self.ask)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


@dataclass
class Target:
    """The node at which pods are thrown."""

    space: Workspace
    neighbour: Neighbour
    resident: int
    made: int = 0

    @property
    def agent(self) -> Agent:
        return self.space.agent

    def throw(self, batch: list[tuple[Manifest, int]]) -> None:
        """Make the pods of a batch that the API server takes, delete them, and look around."""
        names: list[tuple[str, int]] = []
        for body, grace in batch:
            self.made += 1
            name = self.space.unique("random")
            spec = {**body["spec"], "nodeName": self.agent.name, "tolerations": TOLERATIONS}
            metadata = {"name": name, "annotations": body["annotations"]}
            try:
                self.space.core.create_namespaced_pod(
                    self.space.namespace, {"metadata": metadata, "spec": spec}
                )
            except ApiException as error:
                # Half-valid: what the API server takes for wrong never reaches the node.
                assert error.status in (400, 422), error  # noqa: PT017
            else:
                names.append((name, grace))
        until(
            lambda: all(self._seen(name) for name, _ in names),
            "the node to have taken up all pods",
            timeout=60,
        )
        for name, grace in names:
            self.space.core.delete_namespaced_pod(name, self.space.namespace, grace_period_seconds=grace)
        until(lambda: not any(self._exists(name) for name, _ in names), "all pods to be gone", timeout=60)
        self.look()

    def _read(self, name: str) -> Any:
        try:
            return self.space.core.read_namespaced_pod(name, self.space.namespace)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def _exists(self, name: str) -> bool:
        return self._read(name) is not None

    def _seen(self, name: str) -> bool:
        found = self._read(name)
        return found is None or found.status.start_time is not None

    def look(self) -> None:
        assert self.agent.process is not None
        assert self.agent.process.poll() is None, f"the agent has ended\n{self.agent.log[-5000:]}"
        assert "panicked" not in self.agent.log
        assert self.agent.condition("Ready") == "True"
        grown = self.agent.resident_bytes() - self.resident
        assert grown < GROWTH, f"the agent has grown by {grown >> 20} MiB"
        assert set(self.neighbour.answers) <= {"200"}, self.neighbour.answers


@pytest.fixture
def target(
    make_agent: Callable[..., Agent], make_workspace: Callable[[Agent], Workspace]
) -> Iterator[Target]:
    agent = make_agent("random-pods")
    agent.start()
    space = make_workspace(agent)
    # What every pod needs is there before the first is thrown.
    space.run("print", "warm").wait_phase("Succeeded")
    pod = space.serve().wait_ready()
    neighbour = Neighbour(pod.url)
    with neighbour.asked():
        yield Target(space, neighbour, agent.resident_bytes())
    assert neighbour.answers["200"] > 0


def _seeds() -> Iterator[int]:
    """Those of the environment: one, those of so many seconds, or a few."""
    one, seconds = (os.environ.get(f"KRUSTLET_RANDOM_PODS_{name}") for name in ("SEED", "SECONDS"))
    if one:
        yield int(one)
    elif seconds:
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            yield time.time_ns() % 2**32
    else:
        yield from SEEDS


def test_no_pod_of_a_random_spec_brings_the_node_down(target: Target) -> None:
    registry = target.space.registry
    images = [
        *(registry.guest(name) for name in ("http-guest", "cli-guest", "preview1", "garbage")),
        f"{registry.uri}/missing:1",
        "not a name",
    ]
    batches = st.lists(st.tuples(pods(images), st.integers(0, 2)), min_size=3, max_size=8)
    for number in _seeds():

        @seed(number)
        @settings(
            max_examples=BATCHES,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(batch=batches)
        def thrown(batch: list[tuple[Manifest, int]]) -> None:
            target.throw(batch)

        try:
            thrown()
        except BaseException as error:
            error.add_note(f"KRUSTLET_RANDOM_PODS_SEED={number} throws the same pods again")
            raise
    assert target.made > 0
