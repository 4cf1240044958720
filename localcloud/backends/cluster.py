"""GKE's control plane: real etcd, kube-apiserver, kube-controller-manager and kube-scheduler under the
supervisor.

    clusters/NAME/pki/          keys and certificates (pki.py)
    clusters/NAME/etcd/         the data
    clusters/NAME/ports.json    etcd's and the API server's ports, kept
    clusters/NAME/*.kubeconfig  one for each component, and `admin.kubeconfig` for repairs by hand

Identities and bindings are GKE's: the account of a Google access token is checked by a token webhook, nodes
renew their client certificates (`selfnodeclient`), and csr_approver.py stands for GKE's own controller
manager.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from localcloud.backends import pki
from localcloud.backends.kubeapi import KubeApi, KubeError
from localcloud.backends.ports import remembered_ports
from localcloud.backends.processes import wait_until
from localcloud.backends.supervisor import Program, Supervisor, python_program
from localcloud.home import LOOPBACK, Home, write_private
from localcloud.specs import BackendError, Cluster, ClusterSpec

_SERVICE_NETWORK = "10.96.0.0/16"
_SERVICE_IP = "10.96.0.1"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
# From a start on empty data: about 4 s on two idle cores.
_READY_SECONDS = 120
# A healthy part starts once; the API server gives up a few times while a slow etcd begins.
_MOST_STARTS = {"etcd": 3, "apiserver": 8}


def create_cluster(home: Home, supervisor: Supervisor, spec: ClusterSpec) -> Cluster:
    """Run a control plane, and wait until it is ready and has GKE's own bindings. One that runs is left
    alone.

    Raises:
        BackendError: a component is missing, or the API server does not become ready.
    """
    if not _NAME.fullmatch(spec.name):
        raise BackendError(f"{spec.name!r} is no name for a cluster")
    try:
        return _run(home, supervisor, spec)
    except Exception:
        # Half a control plane would crash and be restarted for ever; its data stays.
        supervisor.remove_scope(f"clusters/{spec.name}", _program(spec.name, ""))
        raise


def _run(home: Home, supervisor: Supervisor, spec: ClusterSpec) -> Cluster:
    version = cluster_version()
    directory = home.cluster(spec.name)
    ports = remembered_ports(directory / "ports.json", "etcd", "etcd-peer", "apiserver")
    pki.ensure_pki(directory / "pki", LOOPBACK, _SERVICE_IP)
    endpoint = f"{LOOPBACK}:{ports['apiserver']}"
    _write_configuration(directory, spec, endpoint)

    supervisor.add(_etcd(spec, directory, ports))
    supervisor.add(_apiserver(spec, directory, ports))
    api = KubeApi(endpoint, directory / "pki", pki.ADMIN)
    _wait_until_ready(home, supervisor, spec, api)
    _apply_bindings(home, spec, api)
    for program in (_controller_manager(spec, directory), _scheduler(spec, directory), _approver(home, spec)):
        supervisor.add(program)
    return Cluster(endpoint, (directory / "pki/ca.crt").read_text(), version)


def _wait_until_ready(home: Home, supervisor: Supervisor, spec: ClusterSpec, api: KubeApi) -> None:
    """
    Raises:
        BackendError: it takes too long, or a part ends again and again.
    """
    pids: dict[str, set[int]] = {part: set() for part in _MOST_STARTS}

    def crashing() -> str:
        for part, most in _MOST_STARTS.items():
            program = _program(spec.name, part)
            pids[part].add(supervisor.status(program).pid)
            if len(pids[part] - {0}) > most:
                return program
        return ""

    if not wait_until(lambda: bool(crashing()) or api.is_ready(), _READY_SECONDS, 0.1):
        program = _program(spec.name, "apiserver")
        raise BackendError(
            f"cluster {spec.name}: the API server is not ready after {_READY_SECONDS} s: "
            f"{_last_words(home, program)}"
        )
    if program := crashing():
        raise BackendError(f"{program} ends again and again: {_last_words(home, program)}")


def _last_words(home: Home, program: str) -> str:
    """Why a program ended, as far as its log says so, and where the rest is."""
    log = home.logs / f"{program}.log"
    lines = [line for line in _text(log).splitlines() if line.strip()]
    # The last lines may be those of a panic; what led to it is logged before.
    errors = [line for line in lines if '"error":' in line]
    last = (errors or lines or ["it printed nothing"])[-1].strip()
    return f"{last[:400]} (see {log})"


def _text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def delete_cluster(home: Home, supervisor: Supervisor, name: str) -> None:
    """End a control plane and remove its data and logs. One that is not there is no error."""
    if not _NAME.fullmatch(name):
        raise BackendError(f"{name!r} is no name for a cluster")
    supervisor.remove_scope(f"clusters/{name}", _program(name, ""))
    directory = home.root / "clusters" / name
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BackendError(f"cannot remove {directory}: {error.strerror}") from error
    supervisor.remove_logs(_program(name, ""))


def suspend_cluster(supervisor: Supervisor, name: str) -> None:
    """End a cluster's API server and nothing else; `create_cluster` brings it back."""
    supervisor.remove(_program(name, "apiserver"))


@functools.cache
def cluster_version() -> str:
    """The version of the kube-apiserver on PATH, like `1.37.2`.

    Raises:
        BackendError: there is none.
    """
    try:
        shown = subprocess.run(
            ["kube-apiserver", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendError(f"kube-apiserver cannot be run: {error}") from error
    found = re.search(r"v(\d+\.\d+\.\d+)", shown)
    if found is None:
        raise BackendError(f"kube-apiserver --version says {shown.strip()!r}")
    return found.group(1)


def _program(cluster: str, part: str) -> str:
    # A dot is in no cluster's name: `a` and `a-b` cannot meet.
    return f"cluster-{cluster}.{part}"


def _component(spec: ClusterSpec, directory: Path, part: str, priority: int, *command: str) -> Program:
    return Program(
        _program(spec.name, part),
        command,
        directory=str(directory),
        scope=f"clusters/{spec.name}",
        priority=priority,
        stop_seconds=20,
    )


def _etcd(spec: ClusterSpec, directory: Path, ports: dict[str, int]) -> Program:
    files = directory / "pki"
    client = f"https://{LOOPBACK}:{ports['etcd']}"
    peer = f"https://{LOOPBACK}:{ports['etcd-peer']}"
    return _component(
        spec,
        directory,
        "etcd",
        20,
        "etcd",
        f"--name={spec.name}",
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={spec.name}={peer}",
        "--client-cert-auth",
        "--peer-client-cert-auth",
        *(
            f"--{prefix}{flag}={files / file}"
            for prefix in ("", "peer-")
            for flag, file in (
                ("trusted-ca-file", "etcd-ca.crt"),
                ("cert-file", "etcd.crt"),
                ("key-file", "etcd.key"),
            )
        ),
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--log-level=warn",
    )


def _apiserver(spec: ClusterSpec, directory: Path, ports: dict[str, int]) -> Program:
    files = directory / "pki"
    issuer = (
        f"https://container.googleapis.com/v1/projects/{spec.project}"
        f"/locations/{spec.location}/clusters/{spec.name}"
    )
    return _component(
        spec,
        directory,
        "apiserver",
        30,
        "kube-apiserver",
        f"--bind-address={LOOPBACK}",
        # Else it looks for the interface of the default route: a machine without a network has none.
        f"--advertise-address={LOOPBACK}",
        f"--secure-port={ports['apiserver']}",
        # An endpoint on loopback is refused; nothing in this cluster uses the `kubernetes` Service.
        "--endpoint-reconciler-type=none",
        f"--service-cluster-ip-range={_SERVICE_NETWORK}",
        f"--etcd-servers=https://{LOOPBACK}:{ports['etcd']}",
        f"--etcd-cafile={files / 'etcd-ca.crt'}",
        f"--etcd-certfile={files / 'apiserver-etcd-client.crt'}",
        f"--etcd-keyfile={files / 'apiserver-etcd-client.key'}",
        f"--tls-cert-file={files / 'apiserver.crt'}",
        f"--tls-private-key-file={files / 'apiserver.key'}",
        f"--client-ca-file={files / 'ca.crt'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--enable-bootstrap-token-auth",
        f"--authentication-config={directory / 'authentication.json'}",
        f"--authentication-token-webhook-config-file={directory / 'token-webhook.kubeconfig'}",
        "--authentication-token-webhook-version=v1",
        "--authentication-token-webhook-cache-ttl=10s",
        f"--kubelet-certificate-authority={files / 'ca.crt'}",
        f"--kubelet-client-certificate={files / 'apiserver-kubelet-client.crt'}",
        f"--kubelet-client-key={files / 'apiserver-kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer={issuer}",
        f"--service-account-key-file={files / 'service-account.pub'}",
        f"--service-account-signing-key-file={files / 'service-account.key'}",
        f"--requestheader-client-ca-file={files / 'front-proxy-ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={files / 'front-proxy-client.crt'}",
        f"--proxy-client-key-file={files / 'front-proxy-client.key'}",
        "--profiling=false",
    )


def _controller_manager(spec: ClusterSpec, directory: Path) -> Program:
    files = directory / "pki"
    return _component(
        spec,
        directory,
        "controller-manager",
        40,
        "kube-controller-manager",
        f"--kubeconfig={directory / 'controller-manager.kubeconfig'}",
        "--controllers=*,bootstrap-signer-controller,token-cleaner-controller",
        f"--cluster-name={spec.name}",
        f"--cluster-signing-cert-file={files / 'ca.crt'}",
        f"--cluster-signing-key-file={files / 'ca.key'}",
        f"--root-ca-file={files / 'ca.crt'}",
        f"--service-account-private-key-file={files / 'service-account.key'}",
        "--use-service-account-credentials",
        # One of each: nobody to elect, and no lease to wait for after a kill.
        "--leader-elect=false",
        "--secure-port=0",
        "--profiling=false",
    )


def _scheduler(spec: ClusterSpec, directory: Path) -> Program:
    return _component(
        spec,
        directory,
        "scheduler",
        40,
        "kube-scheduler",
        f"--kubeconfig={directory / 'scheduler.kubeconfig'}",
        "--leader-elect=false",
        "--secure-port=0",
        "--profiling=false",
    )


def _approver(home: Home, spec: ClusterSpec) -> Program:
    return python_program(
        home,
        _program(spec.name, "csr-approver"),
        "localcloud.backends.csr_approver",
        spec.name,
        spec.project,
        scope=f"clusters/{spec.name}",
        priority=40,
    )


def _write_configuration(directory: Path, spec: ClusterSpec, endpoint: str) -> None:
    for identity in (pki.ADMIN, pki.CONTROLLER_MANAGER, pki.SCHEDULER):
        user = {
            "client-certificate-data": _encoded(directory / "pki" / f"{identity}.crt"),
            "client-key-data": _encoded(directory / "pki" / f"{identity}.key"),
        }
        cluster = {
            "server": f"https://{endpoint}",
            "certificate-authority-data": _encoded(directory / "pki/ca.crt"),
        }
        _write_json(directory / f"{identity}.kubeconfig", _kubeconfig(spec.name, identity, cluster, user))
    webhook = _kubeconfig("webhook", "apiserver", {"server": spec.webhook_url}, {})
    _write_json(directory / "token-webhook.kubeconfig", webhook)
    # As on GKE: without credentials one may ask whether the server is well, and nothing else.
    probes = [{"path": path} for path in ("/healthz", "/livez", "/readyz")]
    _write_json(
        directory / "authentication.json",
        {
            "apiVersion": "apiserver.config.k8s.io/v1",
            "kind": "AuthenticationConfiguration",
            "anonymous": {"enabled": True, "conditions": probes},
        },
    )


def _kubeconfig(name: str, user: str, cluster: dict[str, str], credentials: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
        "current-context": name,
    }


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_private(path, json.dumps(document, indent=1))


def _apply_bindings(home: Home, spec: ClusterSpec, api: KubeApi) -> None:
    """What a new GKE cluster has: its owner, its nodes, its API server and its controller manager."""
    config = home.config()
    owner = config.user if config is not None else f"developer@{spec.project}.iam"
    group, user = "Group", "User"
    bindings = (
        ("localcloud:container.admin", "cluster-admin", user, owner),
        (
            "gce:beta:kubelet-certificate-rotation",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            group,
            "system:nodes",
        ),
        ("gce:kube-apiserver-kubelet-api-admin", "system:kubelet-api-admin", user, pki.KUBELET_CLIENT_USER),
        (pki.CSR_APPROVER_USER, pki.CSR_APPROVER_USER, user, pki.CSR_APPROVER_USER),
    )
    try:
        api.apply(f"{_RBAC}/clusterroles/{pki.CSR_APPROVER_USER}", _approver_role())
        for name, role, kind, subject in bindings:
            api.apply(f"{_RBAC}/clusterrolebindings/{name}", _binding(name, role, kind, subject))
    except KubeError as error:
        raise BackendError(f"cluster {spec.name}: cannot apply its own roles: {error}") from error


def _binding(name: str, role: str, kind: str, subject: str) -> dict[str, Any]:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": kind, "name": subject}],
    }


def _approver_role() -> dict[str, Any]:
    group = "certificates.k8s.io"
    signer = ["kubernetes.io/kubelet-serving"]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": pki.CSR_APPROVER_USER},
        "rules": [
            {
                "apiGroups": [group],
                "resources": ["certificatesigningrequests"],
                "verbs": ["get", "list", "watch"],
            },
            {"apiGroups": [group], "resources": ["certificatesigningrequests/approval"], "verbs": ["update"]},
            {"apiGroups": [group], "resources": ["signers"], "resourceNames": signer, "verbs": ["approve"]},
        ],
    }
