"""The node's HTTPS API: who may ask for what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.integration.agent.harness import Agent, Cluster, Pod, Workspace

# Every path with what it answers to those who may ask; `{}` is a pod's NAMESPACE/NAME.
PATHS = {
    "/healthz": 200,
    "/pods": 200,
    "/pods/": 200,
    "/runningpods/": 200,
    "/stats/summary": 200,
    "/metrics": 200,
    "/metrics/resource": 200,
    "/containerLogs/{}/web": 200,
    "/exec/{}/web?command=ls": 501,
    "/attach/{}/web": 501,
    "/run/{}/web": 501,
    "/portForward/{}": 400,
    "/": 404,
    "/no/such/path": 404,
    "/configz": 404,
    "/logs/": 404,
}
# What a grant on one subresource of nodes opens, and no more.
GRANTS = {
    "metrics": {"/metrics", "/metrics/resource"},
    "stats": {"/stats/summary"},
    "pods": {"/pods", "/pods/", "/runningpods/"},
    "healthz": {"/healthz"},
}


def _token(cluster: Cluster, namespace: str, account: str) -> str:
    request = {"spec": {"expirationSeconds": 600}}
    answer = cluster.core.create_namespaced_service_account_token(account, namespace, request)
    return str(answer.status.token)


@pytest.fixture
def pod(space: Workspace) -> Pod:
    return space.serve().wait_ready()


def _answers(
    agent: Agent, pod: Pod, token: str | None, certificate: tuple[str, str] | None = None
) -> dict[str, int]:
    """The status of each path's answer."""
    target = f"{pod.namespace}/{pod.name}"
    return {path: agent.api(path.format(target), token, cert=certificate).status_code for path in PATHS}


def test_whoever_may_do_everything_on_nodes_gets_an_answer_on_every_path(agent: Agent, pod: Pod) -> None:
    assert _answers(agent, pod, "") == PATHS


def test_nobody_gets_nothing_but_a_401_on_any_path(agent: Agent, pod: Pod) -> None:
    assert set(_answers(agent, pod, None).values()) == {401}
    assert agent.api("/pods", None).text == "Unauthorized"


@pytest.mark.parametrize("token", ["garbage", "a.b.c", "x" * 40_000], ids=["garbage", "no-jwt", "huge"])
def test_a_token_that_is_nobodys_gets_a_401(agent: Agent, token: str) -> None:
    assert agent.api("/pods", token).status_code == 401


def test_a_service_account_without_rights_gets_a_403_that_says_what_it_lacks_on_every_path(
    agent: Agent, pod: Pod, cluster: Cluster, namespace: str
) -> None:
    token = _token(cluster, namespace, "stranger")
    assert set(_answers(agent, pod, token).values()) == {403}
    text = agent.api("/stats/summary", token).text
    assert f"user=system:serviceaccount:{namespace}:stranger" in text
    assert "verb=get" in text
    assert "stats" in text


@pytest.mark.parametrize("subresource", GRANTS)
def test_a_grant_on_one_subresource_opens_its_paths_and_no_others(
    pod: Pod, cluster: Cluster, space: Workspace, subresource: str
) -> None:
    namespace = space.namespace
    name = space.unique(f"only-{subresource}")
    rule = {"apiGroups": [""], "resources": [f"nodes/{subresource}"], "verbs": ["get"]}
    cluster.core.create_namespaced_service_account(namespace, {"metadata": {"name": name}})
    cluster.rbac.create_cluster_role({"metadata": {"name": name}, "rules": [rule]})
    cluster.rbac.create_cluster_role_binding(
        {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        }
    )
    token = _token(cluster, namespace, name)
    answers = _answers(space.agent, pod, token)
    assert {path for path, status in answers.items() if status != 403} == GRANTS[subresource]
    assert {answers[path] for path in GRANTS[subresource]} == {200}
    cluster.rbac.delete_cluster_role_binding(name)
    cluster.rbac.delete_cluster_role(name)


def test_the_api_servers_own_certificate_opens_every_path(agent: Agent, pod: Pod, cluster: Cluster) -> None:
    pair = (
        str(cluster.pki / "apiserver-kubelet-client.crt"),
        str(cluster.pki / "apiserver-kubelet-client.key"),
    )
    assert _answers(agent, pod, None, pair) == PATHS


def test_a_node_may_not_ask_a_node(agent: Agent) -> None:
    # The agent's own client certificate is a node's: good for the API server, not for a node's API.
    pem = agent.data_dir / "pki" / "client.pem"
    answer = agent.api("/pods", None, cert=str(pem))
    assert answer.status_code == 403
    assert f"user=system:node:{agent.name}" in answer.text


@pytest.fixture
def foreign_certificate(tmp_path: Path) -> str:
    """A certificate with the API server's name that another authority signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kube-apiserver-kubelet-client")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "foreign.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*form))
    return str(path)


def test_a_certificate_of_another_authority_is_refused(agent: Agent, foreign_certificate: str) -> None:
    with pytest.raises(requests.RequestException):
        agent.api("/pods", "", cert=foreign_certificate)
    assert agent.answers()


def test_plain_http_and_garbage_do_not_disturb_the_api(agent: Agent) -> None:
    with pytest.raises(requests.RequestException):
        requests.get(f"http://{agent.address}:{agent.port}/healthz", timeout=5)
    assert agent.answers()
