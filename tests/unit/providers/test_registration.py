"""Each lie in a certificate request is refused; a node that joins is waited for; the token always goes."""

from __future__ import annotations

import base64
import ipaddress
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pulumi
import pytest
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from kubernetes.client.exceptions import ApiException

from components.providers import certificates, registration
from components.providers.certificates import CLIENT_SIGNER, SERVING_SIGNER, Machine, Request, judge

VM = Machine(
    "krustlet-1",
    frozenset({"krustlet-1", "krustlet-1.c.p.internal"}),
    frozenset({"10.10.0.2", "203.0.113.7"}),
)
TOKEN_ID = "abcdef"
BOOTSTRAP = f"system:bootstrap:{TOKEN_ID}"
ACCOUNT = "krustlet-1-node@p.iam.gserviceaccount.com"
NODE = "system:node:krustlet-1"
KEY = ec.generate_private_key(ec.SECP256R1())
NAMES = ("DNS:krustlet-1", "DNS:krustlet-1.c.p.internal", "IP:10.10.0.2", "IP:203.0.113.7")


def pem(
    common_name: str = NODE,
    organization: str | None = "system:nodes",
    names: tuple[str, ...] = (),
    key: Any = KEY,
    extra: x509.ExtensionType | None = None,
) -> bytes:
    """Make a real PKCS#10 request."""
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization is not None:
        subject.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), False)
    if extra is not None:
        builder = builder.add_extension(extra, True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.GeneralName:
    kind, _, value = text.partition(":")
    if kind == "IP":
        return x509.IPAddress(ipaddress.ip_address(value))
    return x509.DNSName(value) if kind == "DNS" else x509.RFC822Name(value)


def _damaged(pem: bytes, old: bytes, new: bytes) -> bytes:
    """A request with some bytes of its DER changed."""
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    assert old in der
    body = base64.encodebytes(der.replace(old, new, 1))
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"


NAMES_OID = x509.SubjectAlternativeName.oid
P256 = bytes.fromhex("2a8648ce3d030107")

CLIENT = Request(
    CLIENT_SIGNER,
    frozenset({"digital signature", "client auth"}),
    BOOTSTRAP,
    frozenset({certificates.BOOTSTRAP_GROUP, "system:authenticated"}),
    pem(),
)
SERVING = Request(
    SERVING_SIGNER,
    frozenset({"digital signature", "server auth"}),
    NODE,
    frozenset({"system:nodes", "system:authenticated"}),
    pem(names=NAMES),
)


def verdict(request: Request) -> certificates.Verdict:
    """Judge a request that is this machine's affair; what the VM's own account asks for is judged alike."""
    found, as_account = judge(request, VM, BOOTSTRAP), judge(_by_account(request), VM, ACCOUNT)
    assert found is not None
    assert as_account is not None
    if certificates.BOOTSTRAP_GROUP in request.groups or request.username != BOOTSTRAP:
        assert as_account.approve == found.approve
    return found


def _by_account(request: Request) -> Request:
    if request.username != BOOTSTRAP:
        return request
    return replace(request, username=ACCOUNT, groups=request.groups - {certificates.BOOTSTRAP_GROUP})


@pytest.mark.parametrize(
    "asker", [ACCOUNT, BOOTSTRAP, "system:bootstrap:zzzzzz", "other@p.iam.gserviceaccount.com"]
)
def test_only_the_one_that_is_meant_to_ask_gets_the_first_certificate(asker: str) -> None:
    groups = CLIENT.groups | {"system:authenticated"}
    for who in (ACCOUNT, BOOTSTRAP, "mallory"):
        found = judge(replace(CLIENT, username=who, groups=groups), VM, asker)
        assert found is not None
        assert found.approve is (who == asker)


def test_true_requests_are_approved() -> None:
    assert verdict(CLIENT).approve
    assert verdict(SERVING).approve
    with_rsa = rsa.generate_private_key(65537, 2048)
    usages = frozenset({"digital signature", "key encipherment", "client auth"})
    assert verdict(replace(CLIENT, usages=usages, pem=pem(key=with_rsa))).approve
    renewal = replace(CLIENT, username=NODE, groups=frozenset({"system:nodes"}))
    assert verdict(renewal).approve


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (replace(CLIENT, pem=pem("system:node:other")), "subject"),
        (replace(CLIENT, pem=pem("admin")), "subject"),
        (replace(CLIENT, pem=pem(organization="system:masters")), "subject"),
        (replace(CLIENT, pem=pem(organization=None)), "subject"),
        (replace(CLIENT, usages=frozenset({"digital signature", "server auth"})), "usages"),
        (replace(CLIENT, usages=CLIENT.usages | {"cert sign"}), "usages"),
        (replace(CLIENT, usages=frozenset()), "usages"),
        (replace(CLIENT, username="system:bootstrap:zzzzzz"), "may not ask"),
        (replace(CLIENT, username="mallory"), "may not ask"),
        (replace(CLIENT, groups=frozenset({"system:bootstrappers"})), "may not ask"),
        (replace(CLIENT, pem=pem(names=("DNS:krustlet-1",))), "no alternative names"),
        (replace(CLIENT, pem=b"rubbish"), "no PKCS#10"),
        (replace(CLIENT, pem=pem(extra=x509.BasicConstraints(ca=True, path_length=None))), "extension"),
        (replace(CLIENT, pem=pem(key=ed25519.Ed25519PrivateKey.generate())), "key"),
        (replace(CLIENT, pem=_damaged(pem(), P256, P256[:-1] + b"\x7f")), "cannot be read"),
        (
            replace(SERVING, pem=pem(extra=x509.UnrecognizedExtension(NAMES_OID, b"\x30\x03"))),
            "cannot be read",
        ),
        (replace(SERVING, pem=pem(names=(*NAMES, "DNS:kubernetes.default"))), "kubernetes.default"),
        (replace(SERVING, pem=pem(names=("IP:10.10.0.3",))), "10.10.0.3"),
        (replace(SERVING, pem=pem(names=(*NAMES, "MAIL:a@b.example"))), "a@b.example"),
        (replace(SERVING, pem=pem()), "no address"),
        (replace(SERVING, pem=pem(names=NAMES[:1])), "no address"),
        (replace(SERVING, username=BOOTSTRAP), "may not ask"),
        (replace(SERVING, username="system:node:other"), "may not ask"),
        (replace(SERVING, groups=frozenset()), "may not ask"),
        (replace(SERVING, usages=frozenset({"digital signature", "client auth"})), "usages"),
        (replace(SERVING, pem=pem(organization="system:masters", names=NAMES)), "subject"),
    ],
)
def test_each_lie_is_denied_with_its_reason(request_: Request, reason: str) -> None:
    found = verdict(request_)
    assert not found.approve
    assert reason in found.reason


def test_a_request_whose_signature_was_altered_is_denied() -> None:
    der = bytearray(x509.load_pem_x509_csr(pem()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    body = base64.b64encode(bytes(der)).decode()
    text = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"
    assert verdict(replace(CLIENT, pem=text.encode())).reason == "its signature is wrong"


@pytest.mark.parametrize(
    "request_",
    [
        replace(CLIENT, signer="example.com/other"),
        replace(CLIENT, username="system:bootstrap:zzzzzz", pem=pem("system:node:other")),
        replace(SERVING, username="system:node:other", pem=pem("system:node:other")),
        replace(CLIENT, username="somebody", pem=b"rubbish"),
    ],
)
def test_another_node_s_request_is_left_alone(request_: Request) -> None:
    assert judge(request_, VM, BOOTSTRAP) is None
    assert judge(request_, VM, ACCOUNT) is None


def node(ready: str = "True", arch: str = "wasm32-wasi") -> Any:
    """Make a Node as the client library gives it."""
    condition = SimpleNamespace(type="Ready", status=ready, reason="AgentReady", message="it serves")
    return SimpleNamespace(
        metadata=SimpleNamespace(uid="u", labels={"kubernetes.io/arch": arch, "kubernetes.io/os": "wasi"}),
        status=SimpleNamespace(conditions=[condition]),
    )


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("found", "renewed", "trouble"),
    [
        (None, None, "no Node"),
        (node(arch="amd64"), NOW, "kubernetes.io/arch is amd64"),
        (node(ready="False"), NOW, "Ready=False (AgentReady: it serves)"),
        (node(), None, "lease"),
        (node(), NOW - timedelta(seconds=1), "lease"),
    ],
)
def test_a_node_that_is_not_the_ready_one_is_told_apart(
    found: Any, renewed: datetime | None, trouble: str
) -> None:
    assert trouble in registration.not_ready(found, renewed, NOW)


def test_a_ready_node_with_a_fresh_lease_is_it() -> None:
    assert registration.not_ready(node(), NOW + timedelta(seconds=1), NOW) == ""


class FakeCluster(registration.Cluster):
    """A cluster in memory: a list of requests, and a Node that is Ready once both are approved."""

    def __init__(self, *requests: Request) -> None:
        self.waiting = {f"csr-{number}": request for number, request in enumerate(requests)}
        self.decided: dict[str, certificates.Verdict] = {}
        self.token = ""
        self.denied: list[list[tuple[Any, Request, str]]] = [[]]
        self.failures: list[Exception] = []
        self.role_failures: list[Exception] = []
        self.is_away = False

    def put_token(self, token: str, description: str) -> None:
        assert description
        self.token = token

    def delete_token(self, token: str) -> None:
        assert token
        if self.is_away:
            raise ApiException(status=503, reason="Service Unavailable")
        self.token = ""

    def requests(self) -> Iterator[tuple[Any, Request]]:
        if self.failures:
            raise self.failures.pop()
        for name, request in list(self.waiting.items()):
            yield SimpleNamespace(metadata=SimpleNamespace(name=name)), request

    def denials(self) -> Iterator[tuple[Any, Request, str]]:
        """Give what was denied when it is asked once more, and the last of it from then on."""
        yield from self.denied.pop(0) if len(self.denied) > 1 else self.denied[0]

    def decide(self, item: Any, verdict: certificates.Verdict) -> None:
        assert self.token
        self.decided[item.metadata.name] = verdict
        del self.waiting[item.metadata.name]

    def node(self, name: str) -> Any | None:
        assert name == VM.name
        return node() if sum(found.approve for found in self.decided.values()) == 2 else None

    def renewed(self, name: str) -> datetime | None:
        assert name == VM.name
        return NOW

    def name_role(self, name: str) -> None:
        assert name == VM.name
        if self.role_failures:
            raise self.role_failures.pop()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "POLL_SECONDS", 0.01)


def join(cluster: FakeCluster) -> Any:
    """Let the VM in, within a moment."""
    return registration.join(cluster, VM, f"{TOKEN_ID}.0123456789abcdef", NOW, timeout=timedelta(seconds=0.2))


def test_a_node_joins_and_its_token_is_gone() -> None:
    cluster = FakeCluster(CLIENT, SERVING)
    assert join(cluster).metadata.uid == "u"
    assert cluster.token == ""


def test_a_vm_joins_as_its_own_account_and_no_token_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(_by_account(CLIENT), SERVING)
    cluster.token = "none is needed"
    monkeypatch.delattr(FakeCluster, "put_token")
    monkeypatch.delattr(FakeCluster, "delete_token")
    monkeypatch.setattr(registration.Cluster, "put_token", None)
    joined = registration.join(cluster, VM, "", NOW, account=ACCOUNT, timeout=timedelta(seconds=0.2))
    assert joined.metadata.uid == "u"
    by_token = FakeCluster(CLIENT, SERVING)
    by_token.token = "somebody's"
    with pytest.raises(
        registration.RegistrationError, match="may not ask for this node's client certificate"
    ):
        registration.join(by_token, VM, "", NOW, account=ACCOUNT, timeout=timedelta(seconds=0.2))


def test_a_lie_is_named_in_the_error_and_the_token_is_gone() -> None:
    cluster = FakeCluster(CLIENT, replace(SERVING, pem=pem(names=("DNS:evil",))))
    with pytest.raises(registration.RegistrationError, match=r"no Node of its name yet.*evil"):
        join(cluster)
    assert [found.approve for found in cluster.decided.values()] == [True, False]
    assert cluster.token == ""


def denial(uid: str, request: Request) -> tuple[Any, Request, str]:
    """Make a request that somebody else denied."""
    return (
        SimpleNamespace(metadata=SimpleNamespace(name=f"csr-{uid}", uid=uid)),
        request,
        "Denied (AutoDenied)",
    )


def test_a_denial_by_the_cloud_ends_the_wait_at_once() -> None:
    cluster = FakeCluster(CLIENT)
    cluster.denied = [[], [denial("a", SERVING)]]
    with pytest.raises(
        registration.DeniedError, match=r"csr-a for .*kubelet-serving is Denied \(AutoDenied\)"
    ):
        registration.join(cluster, VM, f"{TOKEN_ID}.0123456789abcdef", NOW, timeout=timedelta(minutes=5))
    assert cluster.token == ""


@pytest.mark.parametrize(
    "denied",
    [
        [[denial("old", SERVING)]],  # by an earlier attempt
        [
            [],
            [denial("other", replace(SERVING, username="system:node:other"))],
        ],  # another's that names this node
    ],
)
def test_a_denial_that_is_old_or_anothers_ends_nothing(denied: list[Any]) -> None:
    cluster = FakeCluster(CLIENT, SERVING)
    cluster.denied = denied
    assert join(cluster).metadata.uid == "u"


@pytest.mark.parametrize(
    ("reason", "message", "said"),
    [
        ("AutoDenied", "", "Denied (AutoDenied)"),
        ("AutoDenied", "not yours", "Denied (AutoDenied: not yours)"),
        (None, None, "Denied (no reason given)"),
        (registration.DENIED, "by ourselves", None),
    ],
)
def test_a_denial_is_given_with_what_its_condition_says(
    reason: str | None, message: str | None, said: str | None
) -> None:
    condition = SimpleNamespace(type="Denied", reason=reason, message=message)
    spec = SimpleNamespace(
        signer_name="s", usages=[], username="u", groups=[], request="", expiration_seconds=None
    )
    item = SimpleNamespace(spec=spec, status=SimpleNamespace(conditions=[condition]))
    cluster = registration.Cluster.__new__(registration.Cluster)
    client: Any = SimpleNamespace(list_certificate_signing_request=lambda: SimpleNamespace(items=[item]))
    cluster.certificates = client
    assert [why for _, _, why in cluster.denials()] == ([said] if said else [])


def test_an_api_server_that_is_away_for_a_moment_is_waited_for() -> None:
    cluster = FakeCluster(CLIENT, SERVING)
    cluster.failures = [ApiException(status=503, reason="Service Unavailable")]
    cluster.role_failures = [ApiException(status=503, reason="Service Unavailable")]
    assert join(cluster).metadata.uid == "u"
    assert cluster.role_failures == []


def test_why_a_node_did_not_join_is_said_also_when_its_token_cannot_be_deleted() -> None:
    cluster = FakeCluster(CLIENT)
    cluster.is_away = True
    with pytest.raises(registration.RegistrationError, match="is not Ready after 0 s: there is no Node"):
        join(cluster)


def test_a_token_that_outlives_the_join_is_an_error() -> None:
    cluster = FakeCluster(CLIENT, SERVING)
    cluster.is_away = True
    with pytest.raises(registration.RegistrationError, match="the bootstrap token cannot be deleted"):
        join(cluster)


def test_a_bootstrap_token_has_kubernetes_form_and_is_another_each_time() -> None:
    tokens = {registration.generate_token() for _ in range(20)}
    assert len(tokens) == 20
    assert all(registration.TOKEN.fullmatch(token) for token in tokens)


def kubeconfig_of(authority: str, server: str = "https://10.0.0.1") -> str:
    """Write what tells one cluster from another, and where it is."""
    cluster = {"server": server, "certificate-authority-data": authority}
    return json.dumps({"clusters": [{"cluster": cluster}]})


OLDS = {
    "node": "n",
    "instance": "1",
    "kubeconfig": kubeconfig_of("CA"),
    "hostnames": ["x"],
    "created": "t",
    "configuration": "a",
}


@pytest.mark.parametrize(
    ("news", "replaces"),
    [
        ({"hostnames": ["y"], "created": "u"}, None),
        ({"configuration": "b"}, []),
        ({"kubeconfig": kubeconfig_of("CA", "https://10.0.0.2")}, []),
        ({"kubeconfig": kubeconfig_of("another")}, ["kubeconfig"]),
        ({"kubeconfig": pulumi.runtime.rpc.UNKNOWN}, ["kubeconfig"]),
        ({"instance": "2", "created": "u"}, []),
        ({"instance": pulumi.runtime.rpc.UNKNOWN, "created": pulumi.runtime.rpc.UNKNOWN}, ["instance"]),
        ({"node": "m"}, ["node"]),
    ],
)
def test_another_node_and_another_cluster_are_joined_anew_and_the_rest_is_an_update(
    news: dict[str, Any], replaces: list[str] | None
) -> None:
    result = registration.NodeRegistrationProvider().diff("n", OLDS, {**OLDS, **news})
    assert result.changes is (replaces is not None)
    assert result.replaces == (replaces or [])
    assert result.delete_before_replace


def test_another_cluster_has_another_token() -> None:
    provider, olds = registration.BootstrapTokenProvider(), {"node": "n", "kubeconfig": kubeconfig_of("CA")}
    assert provider.diff("n", olds, {**olds, "kubeconfig": kubeconfig_of("B")}).replaces == ["kubeconfig"]
    moved = {**olds, "kubeconfig": kubeconfig_of("CA", "https://10.0.0.2")}
    assert provider.diff("n", olds, moved).replaces == []


def test_a_node_runs_with_its_configuration_once_its_agent_says_so() -> None:
    found = node()
    found.metadata.labels[registration.CONFIGURATION_LABEL] = "a"
    assert registration.not_ready(found, None, None, "a") == ""
    assert registration.not_ready(found, None, None) == ""
    assert "krustlet.dev/configuration is a, not b" in registration.not_ready(found, None, None, "b")
    assert "krustlet.dev/verification-keys is None, not k" in registration.not_ready(
        found, None, None, "a", "k"
    )
    found.metadata.labels[registration.KEYS_LABEL] = "k"
    assert registration.not_ready(found, None, None, "a", "k") == ""


@pytest.mark.parametrize(("uid", "is_there"), [("u", True), ("another", False), (None, False)])
def test_a_refresh_sees_a_node_that_is_gone_or_came_back_as_another(
    monkeypatch: pytest.MonkeyPatch, uid: str | None, is_there: bool
) -> None:
    node = None if uid is None else SimpleNamespace(metadata=SimpleNamespace(uid=uid))
    cluster = SimpleNamespace(node=lambda _: node, requests=list, runs=lambda _: True)
    monkeypatch.setattr(registration, "Cluster", lambda _: cluster)
    found = registration.NodeRegistrationProvider().read("n", STATE)
    assert bool(found.id) is is_there
    assert "waiting_requests" not in (found.outs or {})


@pytest.mark.parametrize("runs", [True, False])
def test_a_node_that_nobody_runs_is_joined_again_by_whatever_machine_comes(
    monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    there = SimpleNamespace(metadata=SimpleNamespace(uid="u"))
    cluster = SimpleNamespace(node=lambda _: there, requests=list, runs=lambda _: runs)
    monkeypatch.setattr(registration, "Cluster", lambda _: cluster)
    provider = registration.NodeRegistrationProvider()
    seen = provider.read("n", STATE).outs or {}
    assert provider.diff("n", seen, STATE).changes is not runs
    another = {**STATE, "instance": pulumi.runtime.rpc.UNKNOWN, "created": pulumi.runtime.rpc.UNKNOWN}
    assert provider.diff("n", seen, another).replaces == (["instance"] if runs else [])


@pytest.mark.parametrize(
    ("renewals", "runs"),
    [
        ([timedelta(seconds=1)], True),
        ([timedelta(minutes=5)], False),
        ([None], False),
        # A machine whose clock is behind.
        ([timedelta(minutes=5), timedelta(minutes=5), timedelta(minutes=4)], True),
    ],
)
def test_a_node_runs_while_its_lease_is_renewed(
    monkeypatch: pytest.MonkeyPatch, renewals: list[timedelta | None], runs: bool
) -> None:
    now = datetime.now(UTC)
    leases = [age and now - age for age in renewals]
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    cluster = with_core(SimpleNamespace())
    monkeypatch.setattr(cluster, "renewed", lambda _: leases.pop(0) if len(leases) > 1 else leases[0])
    assert cluster.runs("n") is runs


STATE = {**OLDS, "node": VM.name, "addresses": [], "uid": "u", "account": ACCOUNT, "token": "t"}
RENEWAL = replace(CLIENT, username=NODE, groups=frozenset({"system:nodes"}))


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        (RENEWAL, True),
        (_by_account(CLIENT), True),
        (replace(RENEWAL, pem=pem("admin")), False),
        (replace(RENEWAL, username="mallory"), False),
        (SERVING, False),
    ],
)
def test_a_true_request_that_waits_is_drift_and_the_next_up_decides_about_it(
    monkeypatch: pytest.MonkeyPatch, asked: Request, waits: bool
) -> None:
    there = SimpleNamespace(metadata=SimpleNamespace(uid="u"))
    cluster = FakeCluster(asked)
    monkeypatch.setattr(cluster, "node", lambda _: there)
    monkeypatch.setattr(cluster, "runs", lambda _: True)
    monkeypatch.setattr(registration, "Cluster", lambda _: cluster)
    provider = registration.NodeRegistrationProvider()
    seen = provider.read("n", {**STATE, "waiting_requests": ["csr-of-before"]}).outs or {}
    assert seen.get("waiting_requests") == (["csr-0"] if waits else None)
    assert provider.diff("n", seen, STATE).changes is waits


def test_whoever_may_not_list_requests_sees_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(RENEWAL)
    cluster.failures.append(ApiException(status=403))
    monkeypatch.setattr(cluster, "node", lambda _: SimpleNamespace(metadata=SimpleNamespace(uid="u")))
    monkeypatch.setattr(cluster, "runs", lambda _: True)
    monkeypatch.setattr(registration, "Cluster", lambda _: cluster)
    found = registration.NodeRegistrationProvider().read("n", STATE)
    assert "waiting_requests" not in (found.outs or {})


def away(_kubeconfig: str) -> SimpleNamespace:
    """Give a cluster whose API server does not answer."""

    def refuse(*_arguments: object) -> None:
        raise urllib3.exceptions.MaxRetryError(urllib3.HTTPSConnectionPool("10.0.0.1"), "/")

    return SimpleNamespace(node=refuse, drain=refuse, delete_node=refuse, delete_token=refuse)


def test_an_api_server_that_is_away_is_an_error_until_the_cluster_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider, props = registration.NodeRegistrationProvider(), {**OLDS, "uid": "u", "token": "t"}
    token = registration.BootstrapTokenProvider()
    monkeypatch.setattr(registration, "Cluster", away)
    monkeypatch.delenv(registration.DELETE_UNREACHABLE, raising=False)
    for call in (provider.read, provider.delete, token.delete):
        with pytest.raises(registration.UnreachableError, match=r"cannot be reached.*=true forgets"):
            call("n", props)
    monkeypatch.setenv(registration.DELETE_UNREACHABLE, "true")
    assert not provider.read("n", props).id
    provider.delete("n", props)
    token.delete("n", props)


def named(name: str, ready: bool) -> SimpleNamespace:
    condition = SimpleNamespace(type="Ready", status=str(ready))
    return SimpleNamespace(
        metadata=SimpleNamespace(name=name),
        spec=SimpleNamespace(unschedulable=None),
        status=SimpleNamespace(conditions=[condition]),
    )


class Pods:
    """A core API with the pods of one node; `hung` are those whose node does not end them."""

    def __init__(
        self, *names: str, hung: frozenset[str] = frozenset(), past: timedelta = timedelta(0)
    ) -> None:
        self.there = {name: SimpleNamespace(metadata=self._metadata(name)) for name in names}
        self.hung = hung
        self.past = past
        self.calls: list[tuple[str, int | None]] = []
        self.nodes = {VM.name: True}
        self.evicted: list[str] = []
        self.cordoned = False

    @staticmethod
    def _metadata(name: str) -> SimpleNamespace:
        kind = "DaemonSet" if name == "daemon" else "ReplicaSet"
        owners = [SimpleNamespace(kind=kind)]
        return SimpleNamespace(name=name, namespace="x", deletion_timestamp=None, owner_references=owners)

    def patch_node(self, name: str, body: Any) -> None:
        assert name == VM.name
        self.cordoned = body["spec"]["unschedulable"]

    def list_node(self, label_selector: str) -> SimpleNamespace:
        assert label_selector == "kubernetes.io/arch=wasm32-wasi,kubernetes.io/os=wasi"
        return SimpleNamespace(items=[named(name, ready) for name, ready in self.nodes.items()])

    def create_namespaced_pod_eviction(self, name: str, namespace: str, body: Any) -> None:
        assert (name, namespace) == (body.metadata.name, body.metadata.namespace)
        self.evicted.append(name)
        if self.evicted.count(name) < 2:
            raise ApiException(429, "Cannot evict pod as it would violate the pod's disruption budget.")
        del self.there[name]

    def list_pod_for_all_namespaces(self, field_selector: str) -> SimpleNamespace:
        assert field_selector == f"spec.nodeName={VM.name}"
        return SimpleNamespace(items=list(self.there.values()))

    def delete_namespaced_pod(
        self, name: str, namespace: str, grace_period_seconds: int | None = None
    ) -> None:
        assert namespace == "x"
        self.calls.append((name, grace_period_seconds))
        if name in self.hung and grace_period_seconds is None:
            self.there[name].metadata.deletion_timestamp = datetime.now(UTC) - self.past
        else:
            del self.there[name]


def with_core(core: Any) -> registration.Cluster:
    """Give a cluster of this core API."""
    cluster = registration.Cluster.__new__(registration.Cluster)
    cluster.core = core
    return cluster


def test_a_node_that_goes_ends_its_pods_first_and_one_that_cannot_loses_them() -> None:
    core = Pods("ends", "hangs", "daemon", hung=frozenset({"hangs"}), past=timedelta(minutes=1))
    with_core(core).drain(VM.name)
    assert core.calls == [("ends", None), ("hangs", None), ("hangs", 0)]
    assert list(core.there) == ["daemon"]


def test_a_pod_has_its_grace_period_and_one_that_stays_is_named() -> None:
    core = Pods("hangs", hung=frozenset({"hangs"}))
    with pytest.raises(registration.RegistrationError, match="still has pods after 0 s: x/hangs"):
        with_core(core).drain(VM.name, timeout=timedelta(seconds=0.1))
    assert core.calls == [("hangs", None)]
    assert core.cordoned is False, "it takes pods again"


def test_pods_go_to_other_nodes_as_their_disruption_budgets_let_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "POLL_SECONDS", 0)
    core = Pods("one", "two", "daemon")
    core.nodes["other"] = True
    with_core(core).drain(VM.name)
    assert core.evicted == ["one", "two"] * 2
    assert core.calls == [], "none is deleted"
    assert core.cordoned


@pytest.mark.parametrize("own", [True, False])
def test_the_last_node_of_several_is_not_taken_away_unless_it_is_down_itself(own: bool) -> None:
    core = Pods("one")
    core.nodes = {VM.name: own, "other": False}
    if own:
        with pytest.raises(registration.RegistrationError, match=f"{VM.name} is the last one .* other must"):
            with_core(core).drain(VM.name)
        assert (list(core.there), core.cordoned) == (["one"], False)
    else:
        with_core(core).drain(VM.name)
        assert core.calls == [("one", None)]
