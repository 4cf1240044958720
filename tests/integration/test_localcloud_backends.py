"""The backends with everything real: supervisord, the registry, a control plane, instances."""

import base64
import hashlib
import ipaddress
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from localcloud.backends import cluster, confinement, instance, registry
from localcloud.backends.processes import MARK, mark, marked, start_time
from localcloud.backends.rootfs import Rootfs
from localcloud.backends.supervisor import Program, Supervisor
from localcloud.home import Config, Home, is_free
from localcloud.specs import BackendError, Cluster, ClusterSpec, InstanceSpec
from localcloud.store import Record, Store, instance_key
from localcloud.tokens import RegistryAccess, mint_registry_token, registry_auth
from tests.waiting import until

PROJECT, ZONE = "localcloud-dev", "europe-west1-b"
TOKEN = "ya29.the-developers"
SLEEP = (sys.executable, "-c", "import time; time.sleep(9999)")


@dataclass(frozen=True)
class Local:
    """One home with its supervisor and store."""

    home: Home
    supervisor: Supervisor
    store: Store

    def pid(self, program: str) -> int:
        return until(lambda: self.supervisor.status(program).pid, f"{program} to run", timeout=20, every=0.05)

    def kill(self, program: str) -> None:
        """kill -9, and wait for the next process."""
        before = self.pid(program)
        os.kill(before, signal.SIGKILL)
        until(
            lambda: self.supervisor.status(program).pid not in (0, before),
            f"{program} to be started again",
            timeout=20,
            every=0.05,
        )

    def processes(self, scope: str = "") -> list[int]:
        return marked(f"{self.home.root}#{scope}")


def make_local(root: Path) -> Local:
    home = Home(root)
    home.save(Config(port=1, token=TOKEN, project=PROJECT))
    return Local(home, Supervisor(home), Store(home.store_path))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Local]:
    """A home of the test's own."""
    local = make_local(tmp_path / "home")
    local.supervisor.start()
    yield local
    local.supervisor.stop()
    assert local.processes() == []


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A home that the registry, the cluster and the instances share."""
    local = make_local(tmp_path_factory.mktemp("localcloud"))
    local.supervisor.start()
    yield local
    local.supervisor.stop()
    assert local.processes() == []


# The supervisor.


def test_a_program_that_is_killed_is_started_again(fresh: Local) -> None:
    fresh.supervisor.add(Program("sleeper", SLEEP))
    fresh.kill("sleeper")


def test_arguments_and_environment_reach_a_program_as_they_are(fresh: Local, tmp_path: Path) -> None:
    odd = "a b'c\"d %(x)s %% ; # $HOME \\ \n é"
    code = "import json,os,sys; json.dump([sys.argv[1], os.environ['ODD']], open(sys.argv[2], 'w'))"
    out = tmp_path / "out"
    command = (sys.executable, "-c", code, odd, str(out))
    fresh.supervisor.add(Program("odd", command, {"ODD": odd}, restart="no"))
    until(lambda: fresh.supervisor.state("odd") == "EXITED", "the program to end", every=0.05)
    assert json.loads(out.read_text()) == [odd, odd]


def test_a_failing_program_is_tried_again_only_if_it_should_be(fresh: Local, tmp_path: Path) -> None:
    def program(name: str, restart: str, status: int) -> Program:
        command = ("sh", "-c", f"echo x >> {tmp_path}/{name}; exit {status}")
        return Program(name, command, restart=restart, restart_delay=0.05)

    for name, restart, status in (("never", "no", 1), ("good", "on-failure", 0), ("bad", "on-failure", 1)):
        fresh.supervisor.add(program(name, restart, status))
    until(lambda: len((tmp_path / "bad").read_text().split()) > 3, "several tries", every=0.05)
    assert (tmp_path / "never").read_text().split() == ["x"]
    assert (tmp_path / "good").read_text().split() == ["x"]
    assert fresh.supervisor.status("never").exit_status == 1


@pytest.mark.parametrize("delay", [0.0, 0.05, 5.0])
def test_a_program_in_a_crash_loop_is_stopped_and_stays_so(
    fresh: Local, tmp_path: Path, delay: float
) -> None:
    tries = tmp_path / "tries"
    command = ("sh", "-c", f"echo x >> {tries}; exit 1")
    fresh.supervisor.add(Program("crashing", command, restart="on-failure", restart_delay=delay))
    until(tries.exists, "the first try", every=0.01)
    for _ in range(3):  # wherever in its loop it is
        fresh.supervisor.stop_program("crashing")
        assert not fresh.supervisor.status("crashing").live
        assert fresh.supervisor.status("crashing").pid == 0
        before = tries.read_text()
        # The daemon has had its turn when another program has come and gone.
        fresh.supervisor.add(Program("other", ("true",), restart="no"))
        until(lambda: fresh.supervisor.state("other") == "EXITED", "the other one to end", every=0.05)
        fresh.supervisor.remove("other")
        assert tries.read_text() == before
        fresh.supervisor.start_program("crashing")


def test_damaged_files_of_a_program_keep_nothing_else_from_starting(fresh: Local) -> None:
    for name in ("good", "fragment", "definition", "cluster-a.etcd"):
        fresh.supervisor.add(Program(name, SLEEP, scope="clusters/a" if "." in name else ""))
    directory = fresh.home.supervisor
    fresh.supervisor.stop()
    (directory / "conf.d" / "fragment.conf").write_text("[program:fragment\ncommand=")
    (directory / "programs" / "definition.json").write_text('{"name": ')
    fresh.supervisor.start()
    assert fresh.pid("good")
    assert fresh.pid("fragment")
    assert fresh.supervisor.state("definition") == "ABSENT"
    fresh.supervisor.add(Program("definition", SLEEP))
    assert fresh.pid("definition")
    # One that is damaged while it runs is removed with its scope.
    pid = fresh.pid("cluster-a.etcd")
    (directory / "programs" / "cluster-a.etcd.json").write_bytes(b"\xff\x00")
    fresh.supervisor.remove_scope("clusters/a", "cluster-a.")
    assert start_time(pid) is None
    assert fresh.supervisor.state("cluster-a.etcd") == "ABSENT"


def test_a_script_that_ends_at_once_runs_once(
    fresh: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = fresh.supervisor._call

    def slow_call(method: str, *arguments: Any) -> Any:
        """The script has come to its end before the call that adds it returns."""
        answer = call(method, *arguments)
        if method == "addProcessGroup":
            until(lambda: call("getProcessInfo", "once")["statename"] == "EXITED", "its end", every=0.05)
        return answer

    monkeypatch.setattr(fresh.supervisor, "_call", slow_call)
    fresh.supervisor.add(Program("once", ("sh", "-c", f"echo x >> {tmp_path}/once"), restart="no"))
    until(lambda: fresh.supervisor.state("once") == "EXITED", "a second run, if there was one", every=0.05)
    assert (tmp_path / "once").read_text() == "x\n"


def test_the_same_program_again_changes_nothing_and_a_changed_one_is_restarted(fresh: Local) -> None:
    fresh.supervisor.add(Program("sleeper", SLEEP))
    pid = fresh.pid("sleeper")
    fresh.supervisor.add(Program("sleeper", SLEEP))
    assert fresh.pid("sleeper") == pid
    fresh.supervisor.add(Program("sleeper", (*SLEEP, "changed")))
    assert fresh.pid("sleeper") != pid
    assert start_time(pid) is None


def test_a_missing_executable_is_named(fresh: Local) -> None:
    with pytest.raises(BackendError, match="no-such-program"):
        fresh.supervisor.add(Program("x", ("no-such-program",)))
    assert fresh.supervisor.state("x") == "ABSENT"


def test_a_removed_program_is_gone_with_what_it_started(fresh: Local) -> None:
    fresh.supervisor.add(
        Program("vm-x.parent", ("sh", "-c", "setsid sleep 9999 & sleep 9999"), scope="instances/x")
    )
    until(lambda: len(fresh.processes("instances/x#")) == 3, "the shell and its two children", every=0.05)
    fresh.supervisor.remove_scope("instances/x", "vm-x.")
    assert fresh.processes("instances/x#") == []
    assert fresh.supervisor.state("vm-x.parent") == "ABSENT"
    fresh.supervisor.remove("vm-x.parent")


def test_everything_comes_back_after_stop_and_start(fresh: Local) -> None:
    fresh.supervisor.add(Program("sleeper", SLEEP))
    fresh.supervisor.add(Program("by-hand", SLEEP, autostart=False))
    socket = fresh.supervisor.socket
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    fresh.supervisor.stop()
    fresh.supervisor.stop()
    assert fresh.processes() == []
    assert not socket.exists()
    assert not (fresh.home.supervisor / "supervisord.pid").exists()
    fresh.supervisor.start()
    fresh.supervisor.start()
    assert fresh.pid("sleeper")
    assert fresh.supervisor.state("by-hand") == "STOPPED"


def test_orphans_of_a_killed_supervisor_are_ended_before_a_new_start(fresh: Local) -> None:
    fresh.supervisor.add(Program("sleeper", SLEEP))
    # Neither of them can be told by its mark: one lost it, one is another's process with a recorded pid.
    fresh.supervisor.add(Program("bare", ("env", "-i", "sleep", "9999")))
    sleeper, bare = fresh.pid("sleeper"), fresh.pid("bare")
    stranger = subprocess.Popen(["sleep", "9999"])
    record = fresh.home.supervisor / "run" / "stranger.json"
    record.write_text(json.dumps({"pid": stranger.pid, "started": "long ago", "waiting": False}))
    daemon = json.loads((fresh.home.supervisor / "supervisord.json").read_text())["pid"]
    try:
        os.kill(daemon, signal.SIGKILL)
        until(lambda: not fresh.supervisor.is_running(), "the supervisor to be gone", every=0.05)
        assert start_time(bare) is not None
        fresh.supervisor.start()
        assert start_time(sleeper) is None
        assert start_time(bare) is None
        assert fresh.pid("sleeper") != sleeper
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_home_with_a_deep_and_odd_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make_local(tmp_path / ("deep %s & odd" + "/d" * 60))
    local.supervisor.start()
    socket = local.supervisor.socket
    try:
        assert len(os.fsencode(socket)) < 100
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        local.supervisor.add(Program("sleeper", SLEEP))
        local.kill("sleeper")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert Supervisor(local.home).socket == socket, "whoever calls, in whatever environment"
    finally:
        local.supervisor.stop()
    assert local.processes() == []
    assert not socket.parent.exists()


# The registry.


@pytest.fixture(scope="module")
def registry_url(local: Local) -> str:
    return f"http://{registry.ensure_registry(local.home, local.supervisor)}"


def allowed(local: Local, name: str) -> dict[str, str]:
    access = [RegistryAccess(name, ("pull", "push", "delete"))]
    return {"Authorization": f"Bearer {mint_registry_token(local.home, 'developer', access)}"}


def push(local: Local, url: str, name: str, tag: str) -> str:
    """Push an artifact without layers; returns the manifest's digest."""
    headers = allowed(local, name)
    blob = b"{}"
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    upload = requests.post(f"{url}/v2/{name}/blobs/uploads/", headers=headers, timeout=10)
    assert upload.status_code == 202, upload.text
    put = requests.put(
        upload.headers["Location"], params={"digest": digest}, data=blob, headers=headers, timeout=10
    )
    assert put.status_code == 201, put.text
    kind = "application/vnd.oci.image.manifest.v1+json"
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": len(blob)}
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [config]}
    done = requests.put(
        f"{url}/v2/{name}/manifests/{tag}",
        data=json.dumps(manifest),
        headers=headers | {"Content-Type": kind},
        timeout=10,
    )
    assert done.status_code == 201, done.text
    return done.headers["Docker-Content-Digest"]


def test_the_registry_asks_for_a_token_and_says_where_to_get_one(local: Local, registry_url: str) -> None:
    answer = requests.get(f"{registry_url}/v2/", timeout=10)
    assert answer.status_code == 401
    assert f'realm="{registry_auth(local.home).realm}"' in answer.headers["WWW-Authenticate"]
    other = requests.get(
        f"{registry_url}/v2/{PROJECT}/a/app/tags/list", headers=allowed(local, f"{PROJECT}/b/app"), timeout=10
    )
    assert other.status_code == 401


def test_images_are_listed_and_survive_a_kill_of_the_registry(local: Local, registry_url: str) -> None:
    name = f"{PROJECT}/kept/app"
    digest = push(local, registry_url, name, "v1")
    local.kill("registry")
    assert registry.ensure_registry(local.home, local.supervisor) == registry_url.removeprefix("http://")
    (found,) = registry.list_manifests(local.home, f"{PROJECT}/kept")
    assert (found["name"], found["digest"], found["tags"], found["size"]) == (name, digest, ["v1"], 4)
    pulled = requests.get(
        f"{registry_url}/v2/{name}/manifests/{digest}",
        headers=allowed(local, name) | {"Accept": found["media_type"]},
        timeout=10,
    )
    assert pulled.status_code == 200


def test_a_deleted_repository_is_gone_at_once_and_its_neighbour_stays(
    local: Local, registry_url: str
) -> None:
    for repository in ("gone", "gone-not"):
        push(local, registry_url, f"{PROJECT}/{repository}/app", "v1")
    registry.delete_repository(local.home, f"{PROJECT}/gone")
    registry.delete_repository(local.home, f"{PROJECT}/gone")
    for repository, status in (("gone", 404), ("gone-not", 200)):
        name = f"{PROJECT}/{repository}/app"
        answer = requests.get(f"{registry_url}/v2/{name}/tags/list", headers=allowed(local, name), timeout=10)
        assert answer.status_code == status
    assert registry.list_manifests(local.home, f"{PROJECT}/gone") == []


# The control plane.


class _Webhook(BaseHTTPRequestHandler):
    """Answers TokenReviews as localcloud's server does."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = review["spec"]["token"] == TOKEN
        status: dict[str, Any] = {"authenticated": good}
        if good:
            status["user"] = {"username": f"developer@{PROJECT}.iam", "uid": "1"}
        answer = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@dataclass(frozen=True)
class Plane:
    """A running control plane."""

    local: Local
    spec: ClusterSpec
    found: Cluster

    @property
    def directory(self) -> Path:
        return self.local.home.root / "clusters" / self.spec.name

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
        """A request; as administrator unless `headers` carry a token or `cert` is given."""
        pki = self.directory / "pki"
        if "Authorization" not in options.get("headers", {}):
            options.setdefault("cert", (str(pki / "admin.crt"), str(pki / "admin.key")))
        return requests.request(
            method,
            f"https://{self.found.endpoint}{path}",
            json=body,
            verify=str(pki / "ca.crt"),
            timeout=30,
            **options,
        )

    def create(self, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        answer = self.request("POST", path, body, **options)
        assert answer.status_code == 201, answer.text
        created: dict[str, Any] = answer.json()
        return created

    def conditions(self, request: str) -> list[str]:
        status = self.request("GET", f"{CSRS}/{request}").json()["status"]
        return [condition["type"] for condition in status.get("conditions", [])]

    def kubectl(self, *arguments: str) -> str:
        command = ["kubectl", f"--kubeconfig={self.directory / 'admin.kubeconfig'}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def is_ready(self) -> bool:
        return self.request("GET", "/readyz").text == "ok"


CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


@pytest.fixture(scope="module")
def plane(local: Local) -> Iterator[Plane]:
    webhook = ThreadingHTTPServer(("127.0.0.1", 0), _Webhook)
    thread = threading.Thread(target=webhook.serve_forever)
    thread.start()
    spec = ClusterSpec(
        "main", PROJECT, "europe-west1", f"http://127.0.0.1:{webhook.server_address[1]}/review"
    )
    try:
        yield Plane(local, spec, cluster.create_cluster(local.home, local.supervisor, spec))
    finally:
        cluster.delete_cluster(local.home, local.supervisor, "main")
        webhook.shutdown()
        webhook.server_close()
        thread.join()


def test_a_cluster_is_ready_for_its_administrator_and_created_once(plane: Plane) -> None:
    assert plane.kubectl("get", "--raw", "/readyz") == "ok"
    again = cluster.create_cluster(plane.local.home, plane.local.supervisor, plane.spec)
    assert again == plane.found
    assert again.ca_certificate_pem.startswith("-----BEGIN CERTIFICATE-----")


def test_a_google_access_token_is_its_accounts_and_another_is_refused(plane: Plane) -> None:
    good = {"Authorization": f"Bearer {TOKEN}"}
    review = plane.create(
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        {"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"},
        headers=good,
    )
    assert review["status"]["userInfo"]["username"] == f"developer@{PROJECT}.iam"
    assert plane.request("GET", "/readyz", headers=good).text == "ok"
    assert plane.request("GET", "/api/v1/secrets", headers=good).status_code == 200
    assert plane.request("GET", "/readyz", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_without_credentials_one_may_ask_for_health_and_nothing_else(plane: Plane) -> None:
    anonymous = {"cert": ()}
    assert plane.request("GET", "/healthz", **anonymous).text == "ok"
    assert plane.request("GET", "/api/v1/namespaces", **anonymous).status_code == 401


def test_gkes_own_bindings_are_there(plane: Plane) -> None:
    listed = plane.request("GET", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings").json()["items"]
    bound = {
        (item["roleRef"]["name"], subject["name"]) for item in listed for subject in item.get("subjects", [])
    }
    assert {
        ("system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", "system:nodes"),
        ("system:kubelet-api-admin", "kube-apiserver-kubelet-client"),
        ("cluster-admin", f"developer@{PROJECT}.iam"),
    } <= bound


def test_keys_are_readable_by_their_owner_alone(plane: Plane) -> None:
    files = [path for path in plane.directory.rglob("*") if path.suffix in (".key", ".kubeconfig")]
    assert len(files) > 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def certificate_request(node: str, addresses: tuple[str, ...] = ()) -> tuple[ec.EllipticCurvePrivateKey, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{node}"),
        ]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if addresses:
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(item)) for item in addresses]
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(node), *names]), critical=False
        )
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return key, base64.b64encode(pem).decode()


def signing_request(name: str, signer: str, request: str, *usages: str) -> dict[str, Any]:
    return {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": name},
        "spec": {"signerName": signer, "request": request, "usages": ["digital signature", *usages]},
    }


def test_a_node_joins_with_a_bootstrap_token_and_its_certificate_is_signed(
    plane: Plane, tmp_path: Path
) -> None:
    secret = {
        "metadata": {"name": "bootstrap-token-abcdef"},
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {
            "token-id": "abcdef",
            "token-secret": "0123456789abcdef",
            "usage-bootstrap-authentication": "true",
            "auth-extra-groups": "system:bootstrappers:krustlet",
        },
    }
    plane.create("/api/v1/namespaces/kube-system/secrets", secret)
    binding = {
        "metadata": {"name": "krustlet-bootstrap"},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "system:node-bootstrapper",
        },
        "subjects": [{"kind": "Group", "name": "system:bootstrappers:krustlet"}],
    }
    plane.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
    bearer = {"Authorization": "Bearer abcdef.0123456789abcdef"}
    key, request = certificate_request("node-1")
    signer = "kubernetes.io/kube-apiserver-client-kubelet"

    def post() -> dict[str, Any]:
        return plane.create(CSRS, signing_request("join", signer, request, "client auth"), headers=bearer)

    posted = until(post, "the token and its role to be known", timeout=20)
    assert posted["spec"]["username"] == "system:bootstrap:abcdef"
    plane.kubectl("certificate", "approve", "join")

    def signed() -> str | None:
        status = plane.request("GET", f"{CSRS}/join").json()["status"]
        certificate: str | None = status.get("certificate")
        return certificate

    (tmp_path / "node.crt").write_bytes(base64.b64decode(until(signed, "the certificate", timeout=30)))
    (tmp_path / "node.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    node = (str(tmp_path / "node.crt"), str(tmp_path / "node.key"))
    plane.create("/api/v1/nodes", {"metadata": {"name": "node-1"}}, cert=node)
    other = plane.request("POST", "/api/v1/nodes", {"metadata": {"name": "node-2"}}, cert=node)
    assert other.status_code == 403, "NodeRestriction holds a node to its own name"


def test_a_nodes_serving_certificate_is_decided_about_as_google_does(plane: Plane) -> None:
    body = {"name": "vm-new", "networkInterfaces": [{"networkIP": "127.0.0.9"}]}
    plane.local.store.put(Record(instance_key(PROJECT, ZONE, "vm-new"), "compute.instances", body))

    def ask(name: str, node: str, address: str) -> None:
        _, request = certificate_request(node, (address,))
        as_node = {"Impersonate-User": f"system:node:{node}", "Impersonate-Group": "system:nodes"}
        body = signing_request(name, "kubernetes.io/kubelet-serving", request, "server auth")
        plane.create(CSRS, body, headers=as_node)

    ask("foreign", "vm-new", "127.0.0.8")
    ask("no-instance", "vm-gone", "127.0.0.9")
    ask("own", "vm-new", "127.0.0.9")
    # Its Node is not there yet, let alone Ready.
    until(lambda: plane.conditions("own") == ["Approved"], "the request to be approved", timeout=30)
    until(lambda: plane.request("GET", f"{CSRS}/own").json()["status"].get("certificate"), "its certificate")
    for name in ("foreign", "no-instance"):
        until(lambda name=name: plane.conditions(name) == ["Denied"], f"{name} to be denied")  # type: ignore[misc]


@pytest.mark.parametrize("part", ["etcd", "apiserver", "controller-manager"])
def test_a_part_of_the_control_plane_that_is_killed_comes_back_with_its_data(plane: Plane, part: str) -> None:
    data = {"metadata": {"name": f"before-{part}"}, "data": {"answer": "42"}}
    plane.create("/api/v1/namespaces/default/configmaps", data)
    plane.local.kill(f"cluster-main.{part}")
    until(plane.is_ready, "the API server to be ready again", timeout=60)
    path = f"/api/v1/namespaces/default/configmaps/before-{part}"

    def read() -> bool:
        return bool(plane.request("GET", path).json()["data"] == {"answer": "42"})

    until(read, "the data to be read", timeout=60)
    # The controllers are at work again when a new namespace gets its service account.
    plane.create("/api/v1/namespaces", {"metadata": {"name": f"after-{part}"}})
    account = f"/api/v1/namespaces/after-{part}/serviceaccounts/default"
    until(lambda: plane.request("GET", account).status_code == 200, "the controllers", timeout=60)


def test_a_deleted_cluster_leaves_no_process_port_or_file(local: Local, plane: Plane) -> None:
    spec = ClusterSpec("second", PROJECT, "europe-west1", plane.spec.webhook_url)
    found = cluster.create_cluster(local.home, local.supervisor, spec)
    assert found.endpoint != plane.found.endpoint
    until(lambda: len(local.processes("clusters/second#")) == 5, "its five programs", every=0.05)
    cluster.delete_cluster(local.home, local.supervisor, "second")
    cluster.delete_cluster(local.home, local.supervisor, "second")
    assert local.processes("clusters/second#") == []
    assert is_free(int(found.endpoint.rpartition(":")[2]))
    assert not (local.home.root / "clusters/second").exists()
    assert not list(local.home.logs.glob("cluster-second.*"))
    assert plane.is_ready()


# Instances.

WEB = r"""#!/bin/sh
set -eu
attribute() { curl -fsS -H 'Metadata-Flavor: Google' "http://$GCE_METADATA_HOST/computeMetadata/v1/$1"; }
echo "boot of $(attribute instance/name)"
cat > "$SYSTEMD_UNIT_PATH/web.service" <<EOF
[Unit]
Description=A web server
[Service]
Environment=PORT=8099
ExecStart=PYTHON -u -m http.server --bind $(attribute instance/network-interfaces/0/ip) \
    --directory \${STATE_DIRECTORY} \${PORT}
StateDirectory=web
Restart=always
RestartSec=200ms
ProtectSystem=strict
[Install]
WantedBy=multi-user.target
EOF
systemctl daemon-reload
systemctl enable --now web
echo x >> "$(dirname "$SYSCONFDIR")/var/lib/web/boots"
nohup sleep 9999 &
echo to stderr >&2
exit 3
"""


@pytest.fixture
def vm(local: Local) -> Iterator[Callable[..., InstanceSpec]]:
    """Start an instance with a startup script."""
    started: list[str] = []

    def start(name: str, script: str) -> InstanceSpec:
        taken = {Rootfs(local.home, other).load().ip for other in started}
        address = instance.allocate_address(local.home, taken)
        started.append(name)
        script = script.replace("PYTHON", sys.executable)
        confinement.trust(local.home, script)
        spec = InstanceSpec(
            name,
            PROJECT,
            ZONE,
            "1",
            address,
            f"{name}.c.{PROJECT}.internal",
            metadata={"startup-script": script},
        )
        instance.start_instance(local.home, local.supervisor, spec)
        return spec

    yield start
    for name in started:
        instance.delete_instance(local.home, local.supervisor, name)


def boots(spec: InstanceSpec) -> int:
    """How often the script ran, as the instance's own web server tells it; 0 if it does not answer."""
    with suppress(requests.ConnectionError):
        answer = requests.get(f"http://{spec.ip}:8099/boots", timeout=5)
        return len(answer.text.split()) if answer.ok else 0
    return 0


def ended(local: Local, name: str) -> bool:
    return local.supervisor.state(f"vm-{name}.startup-script") == "EXITED"


def test_an_instance_boots_serves_recovers_reboots_and_goes(
    local: Local, vm: Callable[..., InstanceSpec]
) -> None:
    spec = vm("vm-1", WEB)
    until(lambda: boots(spec) == 1, "the unit to serve", timeout=30)
    until(lambda: ended(local, "vm-1"), "the script to end")

    console = until(lambda: finished_console(local, "vm-1"), "the console")
    assert " vm-1 google_metadata_script_runner[" in console
    assert "startup-script: boot of vm-1\n" in console
    assert "startup-script: to stderr\n" in console
    assert "startup-script exit status 3\n" in console
    until(lambda: "GET /boots" in instance.serial_output(local.home, "vm-1"), "the unit's own output")

    local.kill("vm-vm-1.web")
    until(lambda: boots(spec) == 1, "the unit to serve again", timeout=30)
    local.kill("vm-vm-1.metadata")

    instance.start_instance(local.home, local.supervisor, spec)
    assert boots(spec) == 1, "an instance that runs is not booted again"
    instance.stop_instance(local.home, local.supervisor, "vm-1")
    assert local.processes("instances/vm-1#") == [], "what the script left running ends, too"
    assert boots(spec) == 0
    instance.start_instance(local.home, local.supervisor, spec)
    until(lambda: boots(spec) == 2, "the script to run once more", timeout=30)

    instance.delete_instance(local.home, local.supervisor, "vm-1")
    instance.delete_instance(local.home, local.supervisor, "vm-1")
    assert local.processes("instances/vm-1#") == []
    assert is_free(8099, spec.ip)
    assert not (local.home.root / "instances/vm-1").exists()
    assert not list(local.home.logs.glob("vm-vm-1.*"))
    assert instance.serial_output(local.home, "vm-1") == ""


def finished_console(local: Local, name: str) -> str | None:
    console = instance.serial_output(local.home, name)
    return console if "Finished running startup scripts." in console else None


def test_two_instances_keep_apart(local: Local, vm: Callable[..., InstanceSpec]) -> None:
    first, second = vm("a", WEB), vm("a-b", WEB)
    if first.ip == second.ip:
        pytest.skip("this system has one loopback address")
    for spec in (first, second):
        until(lambda spec=spec: boots(spec) == 1, f"{spec.name} to serve", timeout=30)  # type: ignore[misc]
    instance.delete_instance(local.home, local.supervisor, "a")
    assert boots(first) == 0
    assert boots(second) == 1


def test_systemctl_has_systemds_words_and_exit_statuses(
    local: Local, vm: Callable[..., InstanceSpec]
) -> None:
    vm("ctl", "#!/bin/sh\necho ready\n")
    until(lambda: ended(local, "ctl"), "the script to end")
    rootfs = Rootfs(local.home, "ctl")

    def systemctl(*words: str) -> tuple[int, str]:
        command = [str(rootfs.root / "bin/systemctl"), *words]
        done = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout + done.stderr).strip()

    assert systemctl("is-active", "job") == (4, "inactive")
    assert systemctl("is-enabled", "job") == (4, "not-found")
    assert systemctl("start", "job")[0] == 5
    assert systemctl("status", "job")[0] == 4
    (rootfs.units / "job.service").write_text(
        "[Unit]\nDescription=A job\n[Service]\nExecStart=/bin/sh -c 'exec sleep 9999'\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )
    assert systemctl("daemon-reload") == (0, "")
    assert systemctl("is-enabled", "job") == (1, "disabled")
    assert systemctl("is-active", "job") == (3, "inactive")
    assert systemctl("start", "job.service") == (0, "")
    assert systemctl("is-active", "job") == (0, "active")
    pid = local.pid("vm-ctl.job")
    assert systemctl("enable", "-q", "--now", "job") == (0, "")
    assert systemctl("is-enabled", "job") == (0, "enabled")
    assert local.pid("vm-ctl.job") == pid, "enabling does not restart"
    assert systemctl("show", "-p", "ActiveState,MainPID", "job") == (0, f"ActiveState=active\nMainPID={pid}")
    assert systemctl("show", "-p", "SubState", "--value", "job") == (0, "running")
    status, text = systemctl("status", "job")
    assert status == 0
    assert "job.service - A job" in text
    assert systemctl("restart", "job") == (0, "")
    assert local.pid("vm-ctl.job") != pid
    assert systemctl("stop", "job") == (0, "")
    assert systemctl("is-active", "job") == (3, "inactive")
    assert systemctl("disable", "-q", "job") == (0, "")
    assert systemctl("is-enabled", "job") == (1, "disabled")

    (rootfs.units / "job.service").write_text("[Service]\nExecStart=/bin/false\n")
    assert systemctl("start", "job") == (0, "")
    until(lambda: systemctl("is-active", "job") == (3, "failed"), "the failure to be seen")
    (rootfs.units / "job.service").write_text("[Service]\nExecStart=/bin/true\nWatchdogSec=1\n")
    status, text = systemctl("restart", "job")
    assert status == 1
    assert "WatchdogSec" in text
    assert systemctl("frobnicate", "job") == (1, "Unknown command verb 'frobnicate'.")
    assert systemctl("start", "../job")[0] == 1


def test_metadata_of_a_running_instance_follows_the_store(
    local: Local, vm: Callable[..., InstanceSpec]
) -> None:
    spec = vm("meta", "#!/bin/sh\n")
    url = f"http://{Rootfs(local.home, 'meta').metadata_host(spec)}/computeMetadata/v1/instance/attributes/"
    body = {"metadata": {"items": [{"key": "new", "value": "1"}]}}
    local.store.put(Record(instance_key(PROJECT, ZONE, "meta"), "compute.instances", body))
    inside = os.environ | {MARK: mark(local.home.root, "instances/meta", "web")}
    command = ["curl", "-sS", "-H", "Metadata-Flavor: Google", url]
    assert subprocess.run(command, env=inside, capture_output=True, check=True).stdout == b"new\n"


def test_an_instance_whose_address_cannot_be_had_is_refused(local: Local) -> None:
    spec = InstanceSpec("nowhere", PROJECT, ZONE, "1", "192.0.2.1", "nowhere", metadata={})
    with pytest.raises(BackendError, match=r"192\.0\.2\.1"):
        instance.start_instance(local.home, local.supervisor, spec)
    instance.delete_instance(local.home, local.supervisor, "nowhere")
