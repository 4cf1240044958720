"""What the agent's tests stand on: a control plane, a registry with signed guests, agents, pods.

Control plane and registry are localcloud's. The agent is a child of the test, so that a test may stop, kill
and start it; it joins with a bootstrap token, and its requests are judged by the program's own rules.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import kubernetes
import requests
from kubernetes.client.exceptions import ApiException

from components.providers import artifacts, certificates, oci, registration, signature
from components.providers.client import Client
from localcloud.backends.supervisor import Supervisor
from localcloud.home import Home
from tests.guests import build as guests
from tests.integration.conftest import Localcloud
from tests.waiting import T, until

PROJECT, REGION, ZONE = "localcloud-dev", "europe-west1", "europe-west1-b"
CLUSTERS = f"/container/v1/projects/{PROJECT}/locations/{ZONE}/clusters"
REPOSITORIES = f"/artifactregistry/v1/projects/{PROJECT}/locations/{REGION}/repositories"
ARCHITECTURE = "wasm32-wasi"
TOLERATIONS = [{"key": "kubernetes.io/arch", "operator": "Equal", "value": ARCHITECTURE}]
PULL_SECRET = "registry"
NETWORK_POLICIES = "krustlet-network-policies"
MIB = 1024 * 1024
# That the machine's own disk is nearly full is no matter, unless a flag of the test says otherwise.
AGENT_ENVIRONMENT = {
    "RUST_LOG": "info,krustlet=debug",
    "KRUSTLET_EVICTION_HARD": "nodefs.available<1%,nodefs.inodesFree<1%",
}

Manifest = dict[str, Any]


class Registry:
    """A repository of localcloud's, and the key that signs what is in it."""

    def __init__(self, cloud: Localcloud, name: str) -> None:
        body = {"format": "DOCKER"}
        answer = cloud.request("POST", f"{REPOSITORIES}?repositoryId={name}", body)
        assert answer.ok, answer.text
        found = until(
            lambda: cloud.request("GET", f"{REPOSITORIES}/{name}").json().get("registryUri"), "the repository"
        )
        self.uri = str(found)
        self.host = self.uri.partition("/")[0]
        self.key = signature.generate_key()
        self._token = cloud.token
        self._pushed: dict[tuple[str, ...], str] = {}

    def push(
        self, name: str, artifact: artifacts.Artifact, tag: str = "latest", *, key: str | None = ""
    ) -> str:
        """Push an artifact and a signature of it; give REPOSITORY/NAME@DIGEST.

        `key` is a private key in PEM, "" the registry's own; with None nothing is signed.
        """
        repository = f"{self.uri}/{name}"
        with mock.patch.dict(os.environ, {"GOOGLE_OAUTH_ACCESS_TOKEN": self._token}):
            digest = Client(repository).push_artifact(artifact, tag)
            if key is not None:
                signed = signature.sign(key or self.key.private_key, repository, digest)
                oci.push_signature(repository, digest, signed.payload, signed.signature)
        return f"{repository}@{digest}"

    def guest(self, name: str, version: str = "1", variant: str = "") -> str:
        """Give the signed image of a guest by digest; a `variant` does the same and is another image."""
        wanted = (name, version, variant)
        if wanted not in self._pushed:
            self._pushed[wanted] = self.push(name, artifact(name, version, variant), f"v{version}{variant}")
        return self._pushed[wanted]

    @property
    def docker_config(self) -> str:
        """The content of a pull secret."""
        login = base64.b64encode(f"oauth2accesstoken:{self._token}".encode()).decode()
        return json.dumps({"auths": {self.host: {"auth": login}}})


def artifact(name: str, version: str = "1", variant: str = "") -> artifacts.Artifact:
    """Lay a guest out; the Rust ones as the program lays out its app."""
    content = guests.build(name, version).read_bytes()
    if variant:
        content += custom_section("variant", variant.encode())
    return artifacts.wasm_artifact(content) if name in guests.RUST and not variant else layout(content)


def custom_section(name: str, content: bytes) -> bytes:
    """A section that means nothing to an engine, for modules and components alike."""
    assert len(name) + len(content) < 127, "longer sizes take more than one byte"
    return bytes([0, 1 + len(name) + len(content), len(name)]) + name.encode() + content


def layout(
    content: bytes,
    *,
    config_type: str = artifacts.WASM_CONFIG,
    layer_type: str = artifacts.WASM_LAYER,
    system: str = "wasip2",
) -> artifacts.Artifact:
    """Lay any bytes out as an artifact of these types."""
    layer = artifacts.Blob(layer_type, content)
    described = {"architecture": "wasm", "os": system, "layerDigests": [layer.digest]}
    config = artifacts.Blob(config_type, artifacts.canonical(described))
    manifest = {
        "schemaVersion": 2,
        "mediaType": artifacts.MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    }
    return artifacts.Artifact(
        artifacts.Blob(artifacts.MANIFEST, artifacts.canonical(manifest)), (config, layer)
    )


class Cluster:
    """A control plane of localcloud's, its clients as cluster-admin, and who may join it."""

    def __init__(self, cloud: Localcloud, name: str) -> None:
        self.cloud = cloud
        self.name = name
        answer = cloud.request("POST", CLUSTERS, {"cluster": {"name": name, "initialNodeCount": 1}})
        assert answer.ok, answer.text

        def running() -> Manifest | None:
            body: Manifest = cloud.request("GET", f"{CLUSTERS}/{name}").json()
            assert body["status"] in ("PROVISIONING", "RUNNING"), body.get("statusMessage")
            return body if body["status"] == "RUNNING" else None

        body = until(running, "the cluster to run", timeout=180, every=0.5)
        # As Google does, it denies what no VM of the project asks for; these agents run on none.
        Supervisor(Home(cloud.home)).stop_program(f"cluster-{name}.csr-approver")
        self.server = f"https://{body['endpoint']}"
        self.certificate: str = body["masterAuth"]["clusterCaCertificate"]
        self.kubeconfig = self.kubeconfig_of(cloud.token)
        api = self.client(cloud.token)
        self.core: Any = kubernetes.client.CoreV1Api(api)
        self.rbac: Any = kubernetes.client.RbacAuthorizationV1Api(api)
        self.coordination: Any = kubernetes.client.CoordinationV1Api(api)
        self.certificates: Any = kubernetes.client.CertificatesV1Api(api)
        self.batch: Any = kubernetes.client.BatchV1Api(api)
        self.policy: Any = kubernetes.client.PolicyV1Api(api)
        self.networking: Any = kubernetes.client.NetworkingV1Api(api)
        self.registration = registration.Cluster(json.dumps(self.kubeconfig))
        self._machines: dict[str, tuple[certificates.Machine, str]] = {}
        self._stop = threading.Event()
        self._approver = threading.Thread(target=self._approve, daemon=True)
        self._approver.start()
        self._allow_bootstrap()

    def kubeconfig_of(self, token: str) -> Manifest:
        """A kubeconfig for the bearer of a token."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "c",
                    "cluster": {"server": self.server, "certificate-authority-data": self.certificate},
                }
            ],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }

    def client(self, token: str) -> Any:
        """An ApiClient for the bearer of a token."""
        return kubernetes.config.new_client_from_config_dict(self.kubeconfig_of(token), persist_config=False)

    @property
    def pki(self) -> Path:
        """The cluster's keys and certificates."""
        return self.cloud.home / "clusters" / self.name / "pki"

    def kubectl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl as cluster-admin."""
        kubeconfig = self.cloud.home / f"{self.name}.kubeconfig"
        kubeconfig.write_text(json.dumps(self.kubeconfig))
        command = ["kubectl", f"--kubeconfig={kubeconfig}", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if check:
            assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
        return answer

    def moment(self) -> str:
        """A resource version: now, for `changes`."""
        return str(self.core.list_node(limit=1).metadata.resource_version)

    def changes(self, since: str, listing: Any, *scope: str, **selector: str) -> list[Manifest]:
        """Every change after a moment to what a call lists: `type` and `object`, none left out, in order."""
        watch = kubernetes.watch.Watch()
        return list(watch.stream(listing, *scope, resource_version=since, timeout_seconds=1, **selector))

    def _allow_bootstrap(self) -> None:
        """As the program does it for its node."""
        group = "rbac.authorization.k8s.io"
        watch = ["list", "watch"]
        self.rbac.create_cluster_role(
            {
                "metadata": {"name": NETWORK_POLICIES},
                "rules": [
                    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": watch},
                    {"apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": watch},
                ],
            }
        )
        for name, role, subject in (
            ("krustlet-bootstrap", "system:node-bootstrapper", certificates.BOOTSTRAP_GROUP),
            # Reads EndpointSlices, for guests that call Services by name.
            ("krustlet-services", "system:node-proxier", "system:nodes"),
            # Reads NetworkPolicies, and the pods and namespaces that they name.
            (NETWORK_POLICIES, NETWORK_POLICIES, "system:nodes"),
        ):
            self.rbac.create_cluster_role_binding(
                {
                    "metadata": {"name": name},
                    "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
                    "subjects": [{"apiGroup": group, "kind": "Group", "name": subject}],
                }
            )

    def admit(self, machine: certificates.Machine) -> Manifest:
        """Make a token for a machine, whose requests are judged from now on; give a kubeconfig."""
        token = registration.generate_token()
        self.registration.put_token(token, f"Lets {machine.name} join")
        self._machines[machine.name] = (machine, certificates.BOOTSTRAP_USER + token.partition(".")[0])
        return self.kubeconfig_of(token)

    def refuse(self, name: str) -> None:
        """Approve nothing of this machine any more."""
        self._machines.pop(name, None)

    @contextlib.contextmanager
    def unrenewed(self) -> Iterator[None]:
        """In here kube-controller-manager approves no node's renewal, as where no role lets it."""
        binding = self.rbac.read_cluster_role_binding("gce:beta:kubelet-certificate-rotation")
        self.rbac.delete_cluster_role_binding(binding.metadata.name)
        binding.metadata = {"name": binding.metadata.name}
        try:
            yield
        finally:
            self.rbac.create_cluster_role_binding(binding)

    def _approve(self) -> None:
        """Judge what is asked, for as long as the cluster is used."""
        while not self._stop.wait(0.2):
            # A control plane that a test has stopped is no reason to end.
            with contextlib.suppress(Exception):
                for item, request in self.registration.requests():
                    for machine, asker in list(self._machines.values()):
                        verdict = certificates.judge(request, machine, asker)
                        if verdict is not None:
                            self.registration.decide(item, verdict)
                            break

    def close(self) -> None:
        """Judge nothing any more."""
        self._stop.set()
        self._approver.join()


def own_address(port: int) -> str:
    """A loopback address on which nobody has the port; 127.0.0.1 where only that one can be bound."""
    for _ in range(50):
        address = f"127.{random.randint(200, 254)}.{random.randint(0, 255)}.{random.randint(2, 254)}"  # noqa: S311
        if _is_free(address, port):
            return address
    return "127.0.0.1"


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


@dataclass
class Agent:
    """An agent of the tests' own: a node of the cluster, run as a child process.

    It trusts what `public_key` signed, and `registry` (HOST:PORT), though that is on this machine.
    `flags` and `environment` may be changed between two starts.
    """

    cluster: Cluster
    binary: Path
    directory: Path
    public_key: str
    name: str
    registry: str
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = own_address(10250)
        self.port = 10250
        if self.address == "127.0.0.1":
            self.port = free_port(self.address)
        self.runs = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.host_directory = self.directory / "host"
        self.host_directory.mkdir(parents=True)
        (self.directory / "cosign.pub").write_text(self.public_key)
        (self.directory / "ca.crt").write_bytes(base64.b64decode(self.cluster.certificate))
        self._admit()

    def _admit(self) -> None:
        machine = certificates.Machine(
            self.name, frozenset([self.name, self.hostname]), frozenset([self.address])
        )
        self.bootstrap_file.write_text(json.dumps(self.cluster.admit(machine)))

    def move(self) -> None:
        """Give the machine another address, which it has from the next start on."""
        self.address = own_address(self.port)
        self._admit()

    @property
    def hostname(self) -> str:
        return f"{self.name}.c.{PROJECT}.internal"

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    @property
    def bootstrap_file(self) -> Path:
        return self.directory / "bootstrap.json"

    @property
    def url(self) -> str:
        """The agent's HTTPS API."""
        return f"https://{self.address}:{self.port}"

    @property
    def log_file(self) -> Path:
        """Where the present run, or the last one, logs."""
        return self.directory / f"agent.{self.runs}.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None, "the agent is not running"
        return self.process.pid

    def command(self) -> list[str]:
        return [
            str(self.binary),
            f"--node-ip={self.address}",
            f"--port={self.port}",
            f"--node-name={self.name}",
            f"--hostname={self.hostname}",
            f"--data-dir={self.data_dir}",
            f"--bootstrap-file={self.bootstrap_file}",
            f"--verification-keys={self.directory / 'cosign.pub'}",
            f"--hostpath-allow={self.host_directory}",
            f"--trusted-registries={self.registry}",
            f"--provider-id=gce://{PROJECT}/{ZONE}/{self.name}",
            *self._opened(),
            *self.flags,
        ]

    def _opened(self) -> list[str]:
        """Nodes of the tests are on loopback, as are the pods that a pod calls; `flags` may say otherwise."""
        flag = "--guest-egress-networks="
        is_given = any(given.startswith(flag) for given in self.flags)
        return [] if is_given else [f"{flag}{self.address}"]

    def launch(self) -> None:
        """Start the process, and no more."""
        assert self.process is None, "the agent is running"
        self.runs += 1
        environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR")}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=environment | AGENT_ENVIRONMENT | self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start(self, timeout: float = 90) -> None:
        """Start the agent and wait until its node is Ready and its HTTPS API answers the API server."""
        self.launch()

        def ready() -> bool:
            assert self.process is not None
            code = self.process.poll()
            if code is not None:
                return True
            return '"node is ready"' in self.log and self.condition("Ready") == "True" and self.answers()

        until(ready, f"{self.name} to be ready", timeout=timeout)
        assert self.process is not None
        assert self.process.poll() is None, f"the agent exited with {self.process.returncode}\n{self.log}"

    def api(
        self, path: str, token: str | None = "", *, verb: str = "GET", **options: Any
    ) -> requests.Response:
        """A request to the agent's HTTPS API: as the cluster's administrator, a token's bearer, or nobody.

        Directly: the API server's proxy refuses nodes on loopback addresses.
        """
        bearer = self.cluster.cloud.token if token == "" else token
        headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
        authority = str(self.directory / "ca.crt")
        return requests.request(
            verb, f"{self.url}{path}", headers=headers, verify=authority, timeout=20, **options
        )

    def answers(self) -> bool:
        """Whether the agent's HTTPS API has its certificate and answers."""
        try:
            return self.api("/healthz").ok
        except requests.RequestException:
            return False

    def stop(self, timeout: float = 40) -> int:
        """SIGTERM; give the exit code."""
        assert self.process is not None, "the agent is not running"
        self.process.terminate()
        try:
            code = self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None, "the agent is not running"
        self.process.kill()
        self.process.wait()
        self.process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The agent does nothing at all in here."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        """End it, and leave nothing of it in the cluster."""
        self.cluster.refuse(self.name)
        if self.process is not None:
            self.kill()
        with contextlib.suppress(ApiException):
            self.cluster.registration.delete_node(self.name)

    def node(self) -> Any:
        return self.cluster.core.read_node(self.name)

    def condition(self, kind: str) -> str:
        """The status of the node's condition, "" when it has none."""
        with contextlib.suppress(ApiException):
            for condition in self.node().status.conditions or []:
                if condition.type == kind:
                    return str(condition.status)
        return ""

    def resident_bytes(self) -> int:
        """What the process holds of the machine's memory."""
        shown = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True
        )
        return int(shown.stdout) * 1024

    @contextlib.contextmanager
    def bounded(self, mib: int) -> Iterator[None]:
        """In here it grows by no more, but for what pods, their logs and their connections take beside it."""
        before = most = self.resident_bytes()
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.02):
                most = max(most, self.resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        grown = (most - before) / MIB
        assert grown < mib + 48, f"the agent grew by {grown:.0f} MiB"

    def cpu_seconds(self) -> float:
        """CPU time that the process has used (Linux)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def children_cpu_seconds(self) -> float:
        """CPU time that the processes it started and that ended have used: the compiler's (Linux)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics, by name with labels."""
        text = self.api("/metrics").text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


_ports = itertools.count(random.randint(20_000, 27_000))  # noqa: S311


def free_port(address: str) -> int:
    """A port that no test of this session had before, below those that outgoing connections get."""
    return next(port for port in _ports if _is_free(address, port))


def served(image: str, port: int, name: str = "web", **fields: Any) -> Manifest:
    """A container that serves HTTP."""
    return {"name": name, "image": image, "ports": [{"name": "http", "containerPort": port}], **fields}


def command(image: str, *args: str, name: str = "main", **fields: Any) -> Manifest:
    """A container that runs to completion."""
    return {"name": name, "image": image, "args": list(args), **fields}


def literal(name: str, value: str) -> Manifest:
    """A variable of a container's environment."""
    return {"name": name, "value": value}


def http_probe(port: int, path: str = "/healthz", **timing: Any) -> Manifest:
    """A probe by HTTP, every second and at the first failure unless told otherwise."""
    return {"httpGet": {"path": path, "port": port}, "periodSeconds": 1, "failureThreshold": 1, **timing}


@dataclass
class Pod:
    """A pod that a test made."""

    space: Workspace
    name: str
    uid: str
    port: int

    @property
    def namespace(self) -> str:
        return self.space.namespace

    @property
    def url(self) -> str:
        return f"http://{self.space.agent.address}:{self.port}"

    def get(self, path: str, /, *, timeout: float = 20, **query: str | int) -> requests.Response:
        """A request to what the pod serves."""
        return requests.get(f"{self.url}{path}", params=query, timeout=timeout)

    def read(self) -> Any:
        """The object; it must be this one still."""
        found = self.space.core.read_namespaced_pod(self.name, self.namespace)
        assert found.metadata.uid == self.uid, "another pod of the same name"
        return found

    def exists(self) -> bool:
        try:
            found = self.space.core.read_namespaced_pod(self.name, self.namespace)
        except ApiException as error:
            if error.status == 404:
                return False
            raise
        return bool(found.metadata.uid == self.uid)

    def wait(self, condition: Callable[[Any], T | None], what: str, timeout: float = 60) -> T:
        """Wait until the condition gives something true for the object; a failure shows the pod as it is."""
        try:
            return until(lambda: condition(self.read()), what, timeout=timeout, every=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from error

    def wait_ready(self, timeout: float = 60) -> Pod:
        self.wait(lambda pod: condition(pod, "Ready") == "True", f"{self.name} to be ready", timeout)
        return self

    def wait_unready(self, timeout: float = 60) -> Any:
        """Wait until the pod runs and is not ready; give the pod."""
        return self.wait(
            lambda pod: pod if (pod.status.phase, condition(pod, "Ready")) == ("Running", "False") else None,
            f"{self.name} to run and not to be ready",
            timeout,
        )

    def wait_phase(self, phase: str, timeout: float = 60) -> Any:
        """Wait for a phase; give the pod's status."""
        return self.wait(
            lambda pod: pod.status if pod.status.phase == phase else None,
            f"{self.name} to be {phase}",
            timeout,
        )

    def wait_waiting(self, reason: str, container: str = "", timeout: float = 60) -> str:
        """Wait until a container waits for this reason; give the message."""

        def waits(pod: Any) -> str | None:
            waiting = status_of(pod, container).state.waiting
            return str(waiting.message or " ") if waiting and waiting.reason == reason else None

        return self.wait(waits, f"{self.name} to wait because of {reason}", timeout)

    def wait_terminated(self, container: str = "", timeout: float = 60) -> Any:
        """Wait until a container has ended; give how."""
        return self.wait(
            lambda pod: status_of(pod, container).state.terminated, f"{self.name} {container} to end", timeout
        )

    def wait_gone(self, timeout: float = 60) -> None:
        until(lambda: not self.exists(), f"{self.name} to be gone", timeout=timeout, every=0.1)

    def status(self, container: str = "") -> Any:
        """The status of a container, the first one unless it is named."""
        return status_of(self.read(), container)

    def logs(self, container: str | None = None, **options: Any) -> str:
        """What `kubectl logs` shows."""
        return str(
            self.space.core.read_namespaced_pod_log(self.name, self.namespace, container=container, **options)
        )

    def events(self, reason: str = "") -> list[Any]:
        """The events about this pod, with this reason."""
        selector = f"involvedObject.uid={self.uid}" + (f",reason={reason}" if reason else "")
        return list(self.space.core.list_namespaced_event(self.namespace, field_selector=selector).items)

    def wait_event(self, reason: str, part: str = "", timeout: float = 30) -> str:
        """Wait for an event whose message has this part; give the message."""

        def found() -> str | None:
            return next((str(item.message) for item in self.events(reason) if part in item.message), None)

        try:
            return until(found, f"an event {reason} {part!r}", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from error

    def patch(self, body: Manifest) -> None:
        self.space.core.patch_namespaced_pod(self.name, self.namespace, body)

    def set_image(self, image: str, container: str = "web") -> None:
        self.patch({"spec": {"containers": [{"name": container, "image": image}]}})

    def delete(self, grace: int | None = None) -> None:
        options: dict[str, Any] = {} if grace is None else {"grace_period_seconds": grace}
        self.space.core.delete_namespaced_pod(self.name, self.namespace, **options)

    def describe(self) -> str:
        """Status and events, for the message of a test that failed."""
        if not self.exists():
            return f"{self.name} is gone"
        api = self.space.core.api_client
        shown = json.dumps(api.sanitize_for_serialization(self.read().status), indent=1)
        events = [f"{item.type} {item.reason}: {item.message}" for item in self.events()]
        return "\n".join([shown, *events])


def condition(pod: Any, kind: str) -> str:
    """The status of a pod's condition, "" when it has none."""
    conditions = pod.status.conditions or []
    return next((str(item.status) for item in conditions if item.type == kind), "")


def status_of(pod: Any, container: str = "") -> Any:
    """The status of a container, init or not; the first one that is not, unless it is named."""
    main, init = pod.status.container_statuses or [], pod.status.init_container_statuses or []
    if not container:
        return main[0]
    return next(item for item in [*main, *init] if item.name == container)


class Workspace:
    """Where one test makes its objects, each under a name of its own, on one agent's node."""

    def __init__(self, cluster: Cluster, registry: Registry, agent: Agent, namespace: str) -> None:
        self.cluster = cluster
        self.core: Any = cluster.core
        self.registry = registry
        self.agent = agent
        self.namespace = namespace
        self._delete: list[Callable[[], object]] = []

    def unique(self, stem: str) -> str:
        return f"{stem}-{uuid.uuid4().hex[:8]}"

    def port(self) -> int:
        return free_port(self.agent.address)

    @property
    def http_image(self) -> str:
        return self.registry.guest("http-guest")

    @property
    def cli_image(self) -> str:
        return self.registry.guest("cli-guest")

    def pod(
        self,
        *containers: Manifest,
        name: str = "",
        init: Sequence[Manifest] = (),
        volumes: Sequence[Manifest] = (),
        restart: str = "Always",
        annotations: dict[str, str] | None = None,
        labels: dict[str, str] | None = None,
        **spec: Any,
    ) -> Pod:
        """Make a pod on the agent's node; further keywords are fields of its spec, in the API's spelling."""
        name = name or self.unique("pod")
        body = {
            "metadata": {"name": name, "annotations": annotations or {}, "labels": labels or {}},
            "spec": {
                "containers": list(containers),
                "initContainers": list(init),
                "volumes": list(volumes),
                "restartPolicy": restart,
                "nodeName": self.agent.name,
                "tolerations": TOLERATIONS,
                "automountServiceAccountToken": False,
                **spec,
            },
        }
        made = self.core.create_namespaced_pod(self.namespace, body)
        ports = [port["containerPort"] for item in containers for port in item.get("ports", [])]
        pod = Pod(self, name, made.metadata.uid, ports[0] if ports else 0)
        self._delete.append(lambda: pod.delete(grace=0))
        return pod

    def serve(self, *, image: str = "", port: int = 0, pod: Manifest | None = None, **container: Any) -> Pod:
        """Make a pod with one container "web" that serves the HTTP guest; `pod` is keywords for `pod()`."""
        return self.pod(served(image or self.http_image, port or self.port(), **container), **(pod or {}))

    def run(self, *args: str, image: str = "", pod: Manifest | None = None, **container: Any) -> Pod:
        """Make a pod with one container "main" that runs the command guest once."""
        return self.pod(
            command(image or self.cli_image, *args, **container), **{"restart": "Never", **(pod or {})}
        )

    def config_map(self, data: dict[str, str], name: str = "") -> str:
        name = name or self.unique("config")
        self.core.create_namespaced_config_map(self.namespace, {"metadata": {"name": name}, "data": data})
        self._delete.append(lambda: self.core.delete_namespaced_config_map(name, self.namespace))
        return name

    def secret(self, data: dict[str, str], name: str = "", kind: str = "Opaque") -> str:
        name = name or self.unique("secret")
        body = {"metadata": {"name": name}, "type": kind, "stringData": data}
        self.core.create_namespaced_secret(self.namespace, body)
        self._delete.append(lambda: self.core.delete_namespaced_secret(name, self.namespace))
        return name

    def pull_secret(self, name: str = "") -> str:
        """A Secret that lets a pod pull from the registry."""
        kind = "kubernetes.io/dockerconfigjson"
        return self.secret({".dockerconfigjson": self.registry.docker_config}, name, kind)

    def close(self) -> None:
        """Remove what the test made; what it removed itself is no matter."""
        for delete in reversed(self._delete):
            try:
                delete()
            except ApiException as error:
                if error.status != 404:
                    raise


def make_namespace(cluster: Cluster, registry: Registry) -> str:
    """A namespace whose pods may pull from the registry unless they name another account or secret."""
    name = f"agent-{uuid.uuid4().hex[:8]}"
    core: Any = cluster.core
    core.create_namespace({"metadata": {"name": name}})
    core.create_namespaced_secret(
        name,
        {
            "metadata": {"name": PULL_SECRET},
            "type": "kubernetes.io/dockerconfigjson",
            "stringData": {".dockerconfigjson": registry.docker_config},
        },
    )
    until(
        lambda: core.patch_namespaced_service_account(
            "default", name, {"imagePullSecrets": [{"name": PULL_SECRET}]}
        ),
        "the default service account",
    )
    core.create_namespaced_service_account(name, {"metadata": {"name": "stranger"}})
    return name
