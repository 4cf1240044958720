"""Attacks through outbound HTTP: what only the node may reach is refused, whatever a pod lists."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, condition, free_port

ALLOWED = "krustlet.dev/allowed-hosts"
CA_BUNDLE = "krustlet.dev/ca-bundle"


class _Secret(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "6")
        self.end_headers()
        self.wfile.write(b"secret")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


def _serve(address: str) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((address, free_port(address)), _Secret)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def loopback() -> Iterator[ThreadingHTTPServer]:
    """A service of the node's own, on its loopback."""
    server = _serve("127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def _caller(space: Workspace, hosts: str) -> Pod:
    return space.serve(pod={"annotations": {ALLOWED: hosts}}).wait_ready()


def _trusting(space: Workspace, hosts: str, bundle: str) -> Pod:
    """A pod that names a bundle, which it has as a volume: a node may read no other."""
    volumes = [{"name": "ca", "configMap": {"name": bundle.partition("/")[0]}}]
    return space.serve(pod={"annotations": {ALLOWED: hosts, CA_BUNDLE: bundle}, "volumes": volumes})


def test_a_service_on_the_nodes_loopback_is_refused_under_each_of_its_names(
    space: Workspace, loopback: ThreadingHTTPServer
) -> None:
    port = loopback.server_port
    hosts = ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::1]"]  # noqa: S104
    pod = _caller(space, ",".join(f"{host}:{port}" for host in hosts))
    for host in hosts:
        answer = pod.get("/fetch", url=f"http://{host}:{port}/{host}")
        assert (answer.status_code, answer.text) == (502, "DestinationIpProhibited"), host
    for spelling in ("127.1", "2130706433", "0x7f000001"):
        assert pod.get("/fetch", url=f"http://{spelling}:{port}/").status_code == 502, spelling
    assert loopback.asked == []  # type: ignore[attr-defined]
    log = pod.logs()
    assert f"denied a request to http://127.0.0.1:{port}" in log
    assert "a loopback address of the node, which this node does not open to guests" in log


def test_the_metadata_server_and_the_link_are_refused_though_they_are_listed(space: Workspace) -> None:
    targets = ["169.254.169.254", "metadata.google.internal", "169.254.1.1", "[fd20:ce::254]", "[fe80::1]"]
    pod = _caller(space, ",".join(targets))
    for host in [*targets, "METADATA.google.internal."]:
        answer = pod.get("/fetch", url=f"http://{host}/computeMetadata/v1/")
        assert (answer.status_code, answer.text) == (502, "DestinationIpProhibited"), host


def test_the_api_server_is_refused_though_it_is_listed(space: Workspace) -> None:
    authority = space.cluster.server.removeprefix("https://")
    pod = _caller(space, f"{authority},{authority.partition(':')[0]}")
    answer = pod.get("/fetch", url=f"{space.cluster.server}/version")
    assert (answer.status_code, answer.text) == (502, "DestinationIpProhibited")
    assert "denied a request" in pod.logs()


@pytest.mark.parametrize("kind", ["httpGet", "tcpSocket"])
def test_a_probe_goes_to_its_own_pod_and_to_nothing_else_that_is_the_nodes(
    space: Workspace, loopback: ThreadingHTTPServer, kind: str
) -> None:
    def probed(host: str, port: int | str) -> Pod:
        path = {"path": "/healthz"} if kind == "httpGet" else {}
        return space.serve(readinessProbe={kind: {"host": host, "port": port, **path}, "periodSeconds": 1})

    api, api_port = space.cluster.server.removeprefix("https://").split(":")
    spellings = ["127.0.0.1", "localhost", "127.1", "::ffff:127.0.0.1", "169.254.1.1", "metadata.goog"]
    pods = [probed(host, loopback.server_port) for host in spellings] + [probed(api, int(api_port))]
    own, silent = probed(space.agent.address, "http"), probed("", "http")
    for pod in pods:
        pod.wait_event("Unhealthy", "where the node does not go for a pod")
    for pod in (own, silent):
        pod.wait_ready()
    assert [condition(pod.read(), "Ready") for pod in pods] == ["False"] * len(pods)
    assert loopback.asked == []  # type: ignore[attr-defined]


def test_a_hook_goes_no_further_than_a_probe(space: Workspace, loopback: ThreadingHTTPServer) -> None:
    action = {"httpGet": {"host": "localhost", "port": loopback.server_port, "path": "/started"}}
    pod = space.serve(lifecycle={"postStart": action, "preStop": action}, pod={"restart": "Never"})
    pod.wait_event("FailedPostStartHook", "where the node does not go for a pod")
    pod.delete(grace=5)
    pod.wait_gone()
    assert loopback.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["httpGet", "tcpSocket"])
def test_of_the_nodes_address_a_probe_or_hook_reaches_its_own_pods_ports_and_no_others(
    make_agent: AgentFactory, make_workspace: Callable[[Agent], Workspace], kind: str
) -> None:
    agent = make_agent(f"closed-{kind.lower()}", "--guest-egress-networks=192.0.2.0/24")
    agent.start()
    space = make_workspace(agent)
    neighbour = space.serve().wait_ready()

    def action(port: int | str, host: str = "") -> Manifest:
        path = {"path": "/log?text=poked"} if kind == "httpGet" else {}
        return {kind: {"host": host, "port": port, **path}}

    others = [(port, host) for port in (neighbour.port, agent.port) for host in ("", agent.address)]
    for port, host in others:
        pod = space.serve(readinessProbe={**action(port, host), "periodSeconds": 1})
        why = f"port {port} of {agent.address} is not this pod's, which serves on {pod.port}"
        pod.wait_event("Unhealthy", why)
        assert condition(pod.read(), "Ready") == "False"
    if kind == "httpGet":
        hooked = space.serve(lifecycle={"postStart": action(neighbour.port)}, pod={"restart": "Never"})
        hooked.wait_event("FailedPostStartHook", "is not this pod's")
    assert "poked" not in neighbour.logs()
    on_host = space.port()
    mapped: Manifest = {"ports": [{"containerPort": 80, "hostPort": on_host}]}
    space.serve(readinessProbe=action("http")).wait_ready()
    space.serve(readinessProbe=action("http", agent.address)).wait_ready()
    space.serve(readinessProbe=action(80), **mapped).wait_ready()


def test_a_request_to_a_host_that_is_not_listed_leaves_a_line_in_the_log(space: Workspace) -> None:
    pod = _caller(space, "example.com")
    assert pod.get("/fetch", url="http://other.example/path?token=1").text == "HttpRequestDenied"
    log = pod.logs()
    assert "denied a request to http://other.example:80: its host is not among the pod's allowed hosts" in log
    assert "token" not in log


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ("*", "wildcard"),
        ("a.*.example.com", "wildcard"),
        ("*.127.0.0.1", "address"),
        ("127.1", "four decimal numbers"),
        ("https://example.com", "scheme"),
        ("example.com:0", "port"),
    ],
)
def test_an_entry_that_would_mean_nothing_is_refused_at_the_start(
    space: Workspace, hosts: str, reason: str
) -> None:
    pod = space.serve(pod={"annotations": {ALLOWED: hosts}})
    message = pod.wait_waiting("CreateContainerConfigError")
    assert hosts in message
    assert reason in message


def _certificates(directory: Path, address: str) -> str:
    """Write an authority's server certificate for an address; give the authority's certificate in PEM."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    constraint = x509.BasicConstraints(ca=True, path_length=None)
    authority = (
        certificate("private", authority_key)
        .add_extension(constraint, critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    server = (
        certificate("server", key).add_extension(names, critical=False).sign(authority_key, hashes.SHA256())
    )
    (directory / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (directory / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    return authority.public_bytes(serialization.Encoding.PEM).decode()


def test_https_to_a_private_authority_is_trusted_by_the_pod_that_names_its_bundle(
    space: Workspace, agent: Agent, tmp_path: Path
) -> None:
    authority = _certificates(tmp_path, agent.address)
    server = _serve(agent.address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://{agent.address}:{server.server_port}/"
    try:
        hosts = f"{agent.address}:{server.server_port}"
        without = _caller(space, hosts)
        assert without.get("/fetch", url=url).text == "TlsCertificateError"
        bundle = space.config_map({"ca.crt": authority, "empty": ""})
        trusting = _trusting(space, hosts, bundle).wait_ready()
        assert trusting.get("/fetch", url=url).text == "200\nsecret"
    finally:
        server.shutdown()
        server.server_close()
    for wrong in (f"{bundle}/no-such-key", f"{bundle}/empty"):
        _trusting(space, "example.com", wrong).wait_waiting("CreateContainerConfigError")
    other = space.config_map({"ca.crt": authority})
    unreferenced = space.serve(pod={"annotations": {ALLOWED: "example.com", CA_BUNDLE: other}})
    assert "among the pod's volumes" in unreferenced.wait_waiting("CreateContainerConfigError")
