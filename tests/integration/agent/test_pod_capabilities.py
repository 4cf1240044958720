"""Pod contract, capabilities: nothing but what the pod asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.agent.harness import Agent, Manifest, Workspace


def test_a_guest_has_no_environment_and_no_arguments_but_its_name(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    assert pod.get("/env").json() == {}
    assert pod.get("/args").json() in ([], ["web"])


def test_a_guest_sees_its_volumes_and_nothing_else_of_the_file_system(space: Workspace, agent: Agent) -> None:
    pod = space.serve().wait_ready()
    inside = agent.directory / "cosign.pub"
    for path in ("/", "/etc/passwd", str(inside), "/proc/self/environ", "..", "."):
        assert pod.get("/read", path=path).status_code in (403, 404), path
    target = agent.directory / "written"
    assert pod.get("/write", path=str(target), text="x").status_code in (403, 404)
    assert not target.exists()
    assert pod.get("/ls", path="/").text.strip() in ("", "[]")


def test_outbound_http_is_denied_without_the_annotation(space: Workspace) -> None:
    target = space.serve().wait_ready()
    pod = space.serve().wait_ready()
    answer = pod.get("/fetch", url=f"{target.url}/version")
    assert (answer.status_code, answer.text) == (502, "HttpRequestDenied")


def test_outbound_http_reaches_the_hosts_of_the_annotation_and_no_others(space: Workspace) -> None:
    listed, other = space.serve().wait_ready(), space.serve().wait_ready()
    hosts = f"{space.agent.address}:{listed.port}, example.com"
    pod = space.serve(pod={"annotations": {"krustlet.dev/allowed-hosts": hosts}}).wait_ready()
    assert pod.get("/fetch", url=f"{listed.url}/version").text == "200\n1"
    for url in (
        other.url,
        f"http://127.0.0.1:{listed.port}",
        space.cluster.server,
        "http://metadata.google.internal/",
        "http://169.254.169.254/",
    ):
        answer = pod.get("/fetch", url=url)
        assert (answer.status_code, answer.text) == (502, "HttpRequestDenied"), url


def test_a_request_to_a_host_that_does_not_answer_is_the_guests_to_handle(space: Workspace) -> None:
    closed = space.port()
    hosts = f"{space.agent.address}:{closed}"
    pod = space.serve(pod={"annotations": {"krustlet.dev/allowed-hosts": hosts}}).wait_ready()
    answer = pod.get("/fetch", url=f"http://{hosts}/")
    assert answer.status_code == 502
    assert "Connection" in answer.text


@pytest.mark.parametrize("hosts", ["https://example.com", "user@example.com"])
def test_an_allowed_host_that_is_none_is_told(space: Workspace, hosts: str) -> None:
    pod = space.serve(pod={"annotations": {"krustlet.dev/allowed-hosts": hosts}})
    assert hosts in pod.wait_waiting("CreateContainerConfigError")


@pytest.mark.parametrize(
    ("guest", "name"),
    [("http-vault", "acme:secret/vault"), ("cli-vault", "acme:secret/vault"), ("core-secret", "acme")],
)
def test_a_module_that_imports_what_it_is_not_given_waits_with_the_import_named(
    space: Workspace, guest: str, name: str
) -> None:
    pod = space.serve(image=space.registry.guest(guest))
    assert name in pod.wait_waiting("UnsupportedImport")
    pod.wait_event("Failed", name)


def test_what_two_pods_are_given_stays_apart(space: Workspace, agent: Agent) -> None:
    mount: Manifest = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    volumes: Manifest = {"volumes": [{"name": "data", "emptyDir": {}}]}
    one = space.serve(pod=volumes, **mount).wait_ready()
    two = space.serve(pod=volumes, **mount).wait_ready()
    assert one.get("/write", path="/data/file", text="one's").ok
    assert two.get("/read", path="/data/file").status_code == 404
    escape = f"/data/../../../{one.uid}/volumes/data/file"
    assert "one's" not in two.get("/read", path=escape).text
    # Private on the host as well.
    directory = agent.data_dir / "pods" / one.uid / "volumes" / "data"
    assert Path(directory).exists()
    assert agent.data_dir.stat().st_mode & 0o077 == 0
