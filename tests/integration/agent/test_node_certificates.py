"""The node's certificates: asked for with the least that is needed, renewed in time without a restart.

A cluster's signer gives months. Here the test signs, with the cluster's own authority, and gives seconds.
"""

from __future__ import annotations

import base64
import contextlib
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from components.providers import certificates
from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import Agent, Cluster, Workspace
from tests.waiting import until

# Kubernetes' own signer dates its certificates back as far.
BACKDATED = timedelta(minutes=5)
LIFE = timedelta(seconds=12)


class Signer:
    """Approves and signs what one node asks for; keeps the requests in their order."""

    def __init__(self, cluster: Cluster, node: str, life: timedelta) -> None:
        self.requests: list[certificates.Request] = []
        self._cluster, self._node, self._life = cluster, node, life
        key = serialization.load_pem_private_key((cluster.pki / "ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._authority = x509.load_pem_x509_certificate((cluster.pki / "ca.crt").read_bytes())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def of(self, signer: str) -> list[certificates.Request]:
        return [request for request in self.requests if request.signer == signer]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            # Another hand may be quicker with a request; then it is that one's.
            with contextlib.suppress(Exception):
                for item, request in self._cluster.registration.requests():
                    csr = x509.load_pem_x509_csr(request.pem)
                    if f"CN=system:node:{self._node}," in f"{csr.subject.rfc4514_string()},":
                        self._sign(item, request, csr)

    def _sign(self, item: Any, request: certificates.Request, csr: x509.CertificateSigningRequest) -> None:
        """Sign first, then approve, so that the cluster's own signer finds it done."""
        item.status.certificate = base64.b64encode(self._certificate(request, csr)).decode()
        signed = self._cluster.certificates.replace_certificate_signing_request_status(
            item.metadata.name, item
        )
        self._cluster.registration.decide(signed, certificates.Verdict(True, "it is the test's node"))
        self.requests.append(request)

    def _certificate(self, request: certificates.Request, csr: x509.CertificateSigningRequest) -> bytes:
        now = datetime.now(UTC)
        serving = request.signer == certificates.SERVING_SIGNER
        usage = ExtendedKeyUsageOID.SERVER_AUTH if serving else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(csr.subject)
            .issuer_name(self._authority.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + self._life)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        for extension in csr.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                builder = builder.add_extension(extension.value, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def own(make_agent: AgentFactory, cluster: Cluster) -> Agent:
    """An agent, not started yet, whose requests are left to the test."""
    # What an earlier node of that name asked for may still be there.
    agent = make_agent(f"certified-{uuid.uuid4().hex[:8]}")
    cluster.refuse(agent.name)
    return agent


@pytest.fixture
def signer(own: Agent, cluster: Cluster) -> Iterator[Signer]:
    made = Signer(cluster, own.name, LIFE)
    yield made
    made.close()


def _served(agent: Agent) -> x509.Certificate:
    """The certificate that the agent's HTTPS API shows."""
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((agent.address, agent.port)).encode())


def _held(agent: Agent) -> x509.Certificate:
    """The certificate that the agent shows the API server."""
    return x509.load_pem_x509_certificate((agent.data_dir / "pki" / "client.pem").read_bytes())


def test_certificates_are_renewed_before_they_end_without_a_restart(
    own: Agent, signer: Signer, cluster: Cluster, make_workspace: Callable[[Agent], Workspace]
) -> None:
    own.start()
    space = make_workspace(own)
    pod = space.serve().wait_ready()
    served, held = _served(own), _held(own)
    until(lambda: _served(own).serial_number != served.serial_number, "another serving certificate")
    assert datetime.now(UTC) < served.not_valid_after_utc
    until(lambda: _held(own).serial_number != held.serial_number, "another client certificate")
    assert datetime.now(UTC) < held.not_valid_after_utc
    ends = max(served.not_valid_after_utc, held.not_valid_after_utc)
    until(lambda: datetime.now(UTC) > ends, "the first certificates to end", timeout=LIFE.total_seconds())
    assert {request.username for request in signer.of(certificates.SERVING_SIGNER)[:2]} == {
        f"system:node:{own.name}"
    }
    assert len(signer.of(certificates.SERVING_SIGNER)) >= 2
    # Both ways still work: the API server reaches the agent, and the agent the API server.
    assert own.answers()
    assert pod.get("/log", text="after the first certificates").ok
    assert "after the first certificates" in cluster.kubectl("logs", "-n", pod.namespace, pod.name).stdout
    space.serve().wait_ready()
    assert (pod.status().restart_count, own.condition("Ready")) == (0, "True")


def test_only_the_first_request_comes_with_the_token_and_each_has_a_key_of_its_own(
    own: Agent, signer: Signer
) -> None:
    own.start()
    client, *renewals = signer.of(certificates.CLIENT_SIGNER)
    assert client.username.startswith("system:bootstrap:")
    assert client.usages == {"digital signature", "client auth"}
    node = f"system:node:{own.name}"
    assert {request.username for request in renewals} <= {node}
    for request in signer.of(certificates.SERVING_SIGNER):
        assert request.username == node
        assert request.usages == {"digital signature", "server auth"}
        names = x509.load_pem_x509_csr(request.pem).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        assert {str(name.value) for name in names.value} == {own.name, own.hostname, own.address}
    keys = {
        x509.load_pem_x509_csr(request.pem)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        for request in signer.requests
    }
    assert len(keys) == len(signer.requests)


def test_a_certificate_that_nobody_renews_is_told_of_before_it_ends_and_until_it_is_renewed(
    own: Agent, cluster: Cluster
) -> None:
    # Long enough that nine tenths of it leave time to look.
    life = timedelta(seconds=60)
    condition = "krustlet.dev/ClientCertificateExpiring"

    def told() -> list[Any]:
        of_node = "involvedObject.kind=Node,involvedObject.name=" + own.name
        found = cluster.core.list_event_for_all_namespaces(field_selector=of_node).items
        return [event for event in found if event.reason == "ClientCertificateExpiring"]

    with cluster.unrenewed():
        signer = Signer(cluster, own.name, life)
        own.start()
        signer.close()
        held = _held(own)
        assert own.condition(condition) == "False"
        until(lambda: own.condition(condition) == "True", "the condition", timeout=life.total_seconds())
        assert datetime.now(UTC) < held.not_valid_after_utc
        (event,) = until(told, "the Event", timeout=10)
        assert event.type == "Warning"
        assert "kubectl certificate approve" in event.message
        signer = Signer(cluster, own.name, timedelta(hours=1))
        try:
            until(lambda: own.condition(condition) == "False", "the condition to end")
        finally:
            signer.close()
    assert _held(own).serial_number != held.serial_number
    assert own.condition("Ready") == "True"


def test_keys_are_readable_by_the_agents_user_alone(agent: Agent) -> None:
    pki = agent.data_dir / "pki"
    assert {path.name for path in pki.iterdir()} >= {"client.pem", "serving.pem"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in pki.iterdir())


def test_a_restart_with_valid_certificates_asks_for_none(make_agent: AgentFactory, cluster: Cluster) -> None:
    agent = make_agent("joined")
    agent.start()
    served, held = _served(agent).serial_number, _held(agent).serial_number
    # Nobody approves anything more, and the token is of no use any more.
    cluster.refuse(agent.name)
    agent.stop()
    agent.bootstrap_file.unlink()
    agent.start()
    assert (_served(agent).serial_number, _held(agent).serial_number) == (served, held)


def _pending(cluster: Cluster, node: str) -> list[Any]:
    """The node's requests that nobody has decided about."""
    return [
        item
        for item, request in cluster.registration.requests()
        if f"CN=system:node:{node}" in x509.load_pem_x509_csr(request.pem).subject.rfc4514_string()
    ]


def test_a_request_that_a_crash_interrupted_is_taken_up_again_and_no_other_made(
    own: Agent, cluster: Cluster
) -> None:
    own.launch()
    (first,) = until(lambda: _pending(cluster, own.name), "the request")
    own.kill()
    own.launch()
    until(lambda: "waiting for the certificate request" in own.log, "the next agent to wait")
    (again,) = _pending(cluster, own.name)
    assert again.metadata.uid == first.metadata.uid
    signer = Signer(cluster, own.name, timedelta(hours=1))
    try:
        until(lambda: own.condition("Ready") == "True", "the node to be ready")
        assert len(signer.of(certificates.CLIENT_SIGNER)) == 1
    finally:
        signer.close()


def test_a_request_that_is_denied_is_told_and_not_repeated_every_moment(own: Agent, cluster: Cluster) -> None:
    own.launch()
    (item,) = until(lambda: _pending(cluster, own.name), "the request")
    cluster.registration.decide(item, certificates.Verdict(False, "nobody knows this machine"))
    until(lambda: "was denied: nobody knows this machine" in own.log, "the agent to say so")
    assert own.process is not None
    assert own.process.poll() is None
    assert _pending(cluster, own.name) == []
    assert own.stop(timeout=5) == 0


def test_a_node_without_a_serving_certificate_is_ready_and_serves_once_it_has_one(
    own: Agent, cluster: Cluster
) -> None:
    client_only = threading.Event()

    def approve_client() -> bool:
        for item, request in cluster.registration.requests():
            node = f"system:node:{own.name}"
            if request.signer == certificates.CLIENT_SIGNER and node in str(
                x509.load_pem_x509_csr(request.pem).subject.rfc4514_string()
            ):
                cluster.registration.decide(item, certificates.Verdict(True, "it is the test's node"))
                client_only.set()
        return client_only.is_set()

    own.launch()
    until(approve_client, "the request for a client certificate")
    until(lambda: own.condition("Ready") == "True", "the node to be ready")
    assert not own.answers()
    signer = Signer(cluster, own.name, timedelta(hours=1))
    try:
        until(own.answers, "the agent to serve")
    finally:
        signer.close()
