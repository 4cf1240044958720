"""What a pod's author might try with the name of an image, its registry and its secrets."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from components.providers import artifacts, signature
from components.providers.client import Client
from tests.guests import build as guests
from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import Agent, Workspace, custom_section, layout

MakeWorkspace = Callable[[Agent], Workspace]
SPACES = {"serviceAccountName": "stranger"}


@dataclass
class Server:
    """An HTTP server on this machine that does as it is told, and what it was asked."""

    address: str
    asked: list[tuple[str, str]] = field(default_factory=list)


Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    """Starts a server that answers every GET so."""
    running: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                made.asked.append((self.path, self.headers.get("Authorization", "")))
                with contextlib.suppress(OSError):
                    answer(self)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        made = Server(f"127.0.0.1:{server.server_port}")
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return made

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def _not_found(request: BaseHTTPRequestHandler) -> None:
    request.send_error(404)


def _private(space: Workspace) -> str:
    """The signed image of a module that no node has, in a repository that asks who one is."""
    return space.registry.guest("http-guest", variant=space.unique("v"))


def _secret(space: Workspace, **config: Any) -> dict[str, Any]:
    """Keywords of a pod that has no right but the one that this Docker config gives it."""
    kind = "kubernetes.io/dockerconfigjson"
    name = space.secret({".dockerconfigjson": json.dumps(config)}, kind=kind)
    return {"serviceAccountName": "stranger", "imagePullSecrets": [{"name": name}]}


def _login(space: Workspace) -> dict[str, Any]:
    login: dict[str, Any] = json.loads(space.registry.docker_config)["auths"][space.registry.host]
    return login


def test_a_private_image_on_the_node_is_for_who_may_pull_it(space: Workspace) -> None:
    image = _private(space)
    space.serve(image=image).wait_ready()
    stranger = space.serve(image=image, pod=SPACES)
    assert image in stranger.wait_waiting("ErrImagePull")
    message = space.serve(image=image, imagePullPolicy="Never", pod=SPACES).wait_waiting("ErrImageNeverPull")
    assert message.startswith(f"image {image} is not on this node"), (
        "whether it is there is nobody's business"
    )
    another = _secret(space, auths={space.registry.host: _login(space)})
    space.serve(image=image, imagePullPolicy="Never", pod=another).wait_ready()


def test_who_may_use_an_image_is_known_after_a_restart(
    make_agent: AgentFactory, make_workspace: MakeWorkspace
) -> None:
    agent = make_agent("attack-restart")
    agent.start()
    space = make_workspace(agent)
    image = _private(space)
    owner = space.serve(image=image).wait_ready()
    agent.restart()
    space.serve(image=image, pod=SPACES).wait_waiting("ErrImagePull")
    space.serve(image=image, imagePullPolicy="Never").wait_ready()
    assert owner.wait_ready().get("/version").ok


def test_an_entry_without_a_password_takes_nothing_from_the_others(space: Workspace) -> None:
    auths = {
        "ghcr.io": {},
        "https://index.docker.io/v1/": {"email": "a@b.c"},
        space.registry.host: _login(space),
    }
    space.serve(image=_private(space), pod=_secret(space, auths=auths, credsStore="desktop")).wait_ready()


def test_a_secret_for_a_wildcard_host_fits(space: Workspace) -> None:
    host, _, port = space.registry.host.rpartition(":")
    key = f"https://{host[:3]}*:{port}"
    space.serve(image=_private(space), pod=_secret(space, auths={key: _login(space)})).wait_ready()


def test_a_secret_whose_passwords_are_elsewhere_is_told(space: Workspace) -> None:
    pod = space.serve(
        image=_private(space), pod=_secret(space, auths={space.registry.host: {}}, credsStore="desktop")
    )
    pod.wait_event("FailedToRetrieveImagePullSecret", "kubectl create secret docker-registry")
    pod.wait_waiting("ErrImagePull")


def test_no_pod_makes_the_node_ask_itself(space: Workspace, serve: Callable[[Answer], Server]) -> None:
    server = serve(_not_found)
    port = server.address.rpartition(":")[2]
    names = [
        f"127.0.0.1:{port}/app:v1",
        f"localhost:{port}/app:v1",
        f"127.1:{port}/app:v1",
        f"0.0.0.0:{port}/app:v1",
        "169.254.169.254/app:v1",
        f"{space.agent.address}:{space.agent.port}/app:v1",
    ]
    for pod in [space.serve(image=name, pod=SPACES) for name in names]:
        assert "of this node's own" in pod.wait_waiting("ErrImagePull")
    assert server.asked == []


def test_the_machines_token_goes_to_no_registry_that_a_pod_names(
    make_agent: AgentFactory, make_workspace: MakeWorkspace, serve: Callable[[Answer], Server]
) -> None:
    def metadata(request: BaseHTTPRequestHandler) -> None:
        body = json.dumps(
            {"access_token": "the-machines", "expires_in": 3600, "token_type": "Bearer"}
        ).encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def registry(request: BaseHTTPRequestHandler) -> None:
        request.send_response(401)
        request.send_header("WWW-Authenticate", 'Basic realm="it"')
        request.send_header("Content-Length", "0")
        request.end_headers()

    foreign, trusted = serve(registry), serve(registry)
    agent = make_agent(
        "attack-token",
        "--registry-credentials=gce",
        f"--insecure-registries={foreign.address}",
        f"--trusted-registries={trusted.address}",
    )
    agent.environment["GCE_METADATA_HOST"] = serve(metadata).address
    agent.start()
    space = make_workspace(agent)
    pods = [space.serve(image=f"{server.address}/app:v1", pod=SPACES) for server in (foreign, trusted)]
    for pod in pods:
        pod.wait_waiting("ErrImagePull")
    assert foreign.asked
    assert all(authorization == "" for _, authorization in foreign.asked)
    assert any(authorization.startswith("Basic ") for _, authorization in trusted.asked)


def _trickle(request: BaseHTTPRequestHandler) -> None:
    """A manifest of 4 MiB at a kilobyte a second."""
    request.send_response(200)
    request.send_header("Content-Length", str(4 << 20))
    request.end_headers()
    for _ in range(4 << 10):
        request.wfile.write(b" " * 1024)
        time.sleep(1)


def test_slow_registries_stop_no_other_pull(
    make_agent: AgentFactory, make_workspace: MakeWorkspace, serve: Callable[[Answer], Server]
) -> None:
    slow = [serve(_trickle) for _ in range(40)]
    agent = make_agent("attack-slow", f"--insecure-registries={','.join(server.address for server in slow)}")
    agent.start()
    space = make_workspace(agent)
    held = [space.serve(image=f"{server.address}/app:v1", pod=SPACES) for server in slow]
    space.serve(image=_private(space)).wait_ready(timeout=30)
    assert any(server.asked for server in slow)
    held[0].wait_waiting("ImagePullBackOff", timeout=60)


def test_a_container_image_is_told_its_platform_and_what_to_push_instead(space: Workspace) -> None:
    config = artifacts.Blob(
        artifacts.IMAGE_CONFIG, json.dumps({"os": "linux", "architecture": "amd64"}).encode()
    )
    layer = artifacts.Blob("application/vnd.oci.image.layer.v1.tar+gzip", b"layer")
    manifest = {
        "schemaVersion": 2,
        "mediaType": artifacts.MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    }
    image = artifacts.Artifact(
        artifacts.Blob(artifacts.MANIFEST, artifacts.canonical(manifest)), (config, layer)
    )
    name = space.registry.push("container", image, space.unique("tag"), key=None)
    message = space.serve(image=name).wait_waiting("InvalidImage")
    assert "linux/amd64" in message
    assert f"wkg oci push {name.partition('@')[0]}" in message


def test_a_bad_layer_takes_nothing_from_the_good_signature_beside_it(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = guests.build("http-guest").read_bytes() + custom_section("variant", space.unique("v").encode())
    image = space.registry.push("beside", layout(content), key=None)
    repository, _, digest = image.partition("@")
    made = signature.sign(space.registry.key.private_key, repository, digest)
    good = artifacts.signature_artifact(made.payload, made.signature)
    manifest = json.loads(good.manifest.content)
    [layer] = manifest["layers"]
    [annotation] = layer["annotations"]
    garbage = [{**layer, "annotations": {annotation: text}} for text in ("no base64!", "c2ln", "A" * 4096)]
    manifest["layers"] = [*garbage, {**layer, "size": 1 << 40}, layer, *garbage]
    mixed = artifacts.Artifact(artifacts.Blob(artifacts.MANIFEST, artifacts.canonical(manifest)), good.blobs)
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", space.cluster.cloud.token)
    Client(repository).push_artifact(mixed, artifacts.signature_tag(digest))
    space.serve(image=image).wait_ready()
