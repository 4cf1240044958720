"""How the OCI client talks to a registry: tokens, retries and refusals, against one in this process."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pulumi.dynamic import ResourceProvider
from pulumi.runtime.rpc import UNKNOWN

from components.providers import artifacts, attestation, cache, oci
from components.providers.client import Client
from components.providers.retries import ATTEMPTS
from components.providers.signature import generate_key, payload

ACTIONS = {"GET": "pull", "HEAD": "pull", "POST": "push", "PUT": "push", "DELETE": "delete"}


@dataclass
class Registry:
    """Keeps what is pushed; a token is good for one kind of action, until `expire` is called."""

    name: str = ""
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    failures: list[int] = field(default_factory=list)
    no_uploads: bool = False
    generation: int = 0

    def expire(self) -> None:
        """Make every token that was given useless."""
        self.generation += 1

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """Answer one request; the body is read for nobody without a token, as Go's servers have it."""
        path, _, query = handler.path.partition("?")
        verb, length = handler.command, int(handler.headers.get("Content-Length") or 0)
        host = handler.headers["Host"]
        if path == "/token":
            self.asked["token"] += 1
            return 200, {}, json.dumps({"token": f"{query[-4:]}-{self.generation}"}).encode()
        wanted = ACTIONS[verb][-4:].rjust(4, "=")
        if handler.headers.get("Authorization") != f"Bearer {wanted}-{self.generation}":
            challenge = f'Bearer realm="http://{host}/token",service="s",scope="{ACTIONS[verb]}"'
            # The header closes the connection here too; without it the client would use it again.
            return 401, {"WWW-Authenticate": challenge, "Connection": "close"}, b""
        self.asked[verb] += 1
        body = handler.rfile.read(length)
        if self.failures:
            return self.failures.pop(0), {}, b""
        if verb == "POST":
            return self.begin_upload(host)
        if verb == "DELETE":
            return self.remove(path)
        return self.store(path, query, body if verb == "PUT" else None)

    def begin_upload(self, host: str) -> tuple[int, dict[str, str], bytes]:
        """Say where to upload to."""
        if self.no_uploads:
            error = {"errors": [{"code": "NAME_UNKNOWN", "message": "Repository not found"}]}
            return 404, {}, json.dumps(error).encode()
        return 202, {"Location": f"http://{host}/v2/p/app/blobs/uploads/1"}, b""

    def store(self, path: str, query: str, body: bytes | None) -> tuple[int, dict[str, str], bytes]:
        """Keep a blob or a manifest, or say whether it is there."""
        key = query.partition("digest=")[2].replace("%3A", ":") or path.rpartition("/")[2]
        if body is not None:
            self.stored[key] = body
            if "/manifests/" in path:
                self.stored[f"sha256:{hashlib.sha256(body).hexdigest()}"] = body
            return 201, {}, b""
        if key not in self.stored:
            return 404, {}, b""
        kept = self.stored[key]
        return 200, {"Docker-Content-Digest": f"sha256:{hashlib.sha256(kept).hexdigest()}"}, kept

    def remove(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Remove a tag, or a manifest with its tags."""
        key = path.rpartition("/")[2]
        gone = self.stored.pop(key, None)
        if gone is not None and key.startswith("sha256:"):
            self.stored = {name: kept for name, kept in self.stored.items() if kept != gone}
        return (404 if gone is None else 202), {}, b""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """An empty registry."""
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "any")
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    found = Registry()
    found.stored[SIGNED["digest"]] = IMAGE

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Answer."""
            status, headers, body = found.answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the names are http.server's

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.name = f"127.0.0.1:{server.server_port}/p/app"
    yield found
    server.shutdown()
    server.server_close()


# More than the buffers between client and server hold.
BINARY = b"krustlet" * 2**20


def push(registry: Registry) -> str:
    """Push a big artifact."""
    return Client(registry.name).push_artifact(artifacts.agent_artifact(BINARY), "tag")


def test_a_big_blob_is_sent_once_and_with_a_token(registry: Registry) -> None:
    push(registry)
    assert registry.stored[f"sha256:{hashlib.sha256(BINARY).hexdigest()}"] == BINARY
    assert registry.asked["PUT"] == 3  # the binary, the config and the manifest
    assert registry.asked["token"] == 2  # one to look, one to push


def test_a_token_that_ended_is_replaced_by_a_new_one(registry: Registry) -> None:
    client = Client(registry.name)
    first = client.push_artifact(artifacts.agent_artifact(b"1"), "1")
    registry.expire()
    assert client.push_artifact(artifacts.agent_artifact(b"2"), "2") != first
    assert {"1", "2"} <= registry.stored.keys()


def test_a_registry_that_is_overloaded_for_a_while_is_asked_again(registry: Registry) -> None:
    registry.failures = [503, 429]
    push(registry)
    assert registry.stored[f"sha256:{hashlib.sha256(BINARY).hexdigest()}"] == BINARY


def test_what_the_registry_says_to_an_upload_is_the_error(registry: Registry) -> None:
    registry.no_uploads = True
    with pytest.raises(artifacts.OciError, match="404: NAME_UNKNOWN Repository not found"):
        push(registry)


def test_a_registry_that_does_not_answer_is_given_up_in_the_end(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()

    def answer(_handler: object) -> tuple[int, dict[str, str], bytes]:
        hung.wait(30)
        return 503, {}, b""

    monkeypatch.setattr(registry, "answer", answer)
    monkeypatch.setattr("components.providers.client.TIMEOUT", (1, 0.05))
    try:
        with pytest.raises(artifacts.OciError, match=r"registry 127.0.0.1:.* cannot be reached: .*timed out"):
            push(registry)
    finally:
        hung.set()


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry) -> dict[str, Any]:
    """Give the inputs of an artifact's push, in a process that did nothing yet."""
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())
    monkeypatch.setattr(attestation, "_predicates", lambda _props: {"https://a/1": b"{}", "https://b": b"{}"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sum_ = hashlib.sha256(b"krustlet").hexdigest()
    path = cache.place(sum_, "krustlet")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"krustlet")
    return {"repository": registry.name, "kind": "agent", "sha256": sum_}


IMAGE = b'{"schemaVersion": 2, "config": {}, "layers": []}'
SIGNED = {
    "private_key": generate_key().private_key,
    "signature": "c2ln",
    "bundle_signature": "c2ln",
    "digest": f"sha256:{hashlib.sha256(IMAGE).hexdigest()}",
}
Outputs = dict[str, Any]


def made_by(provider: ResourceProvider, inputs: Outputs) -> Outputs:
    """Check and create, and give the outputs."""
    made = provider.create(provider.check({}, inputs).inputs).outs
    assert made is not None
    return made


PUSHES = [oci.OciArtifactProvider, oci.OciSignatureProvider, attestation.OciAttestationProvider]


@pytest.mark.parametrize("kind", PUSHES)
def test_a_replacement_by_the_same_bytes_does_not_delete_what_took_its_place(
    kind: type[ResourceProvider], registry: Registry, binary: Outputs
) -> None:
    provider, inputs = kind(), {**binary, **SIGNED}
    old = made_by(provider, inputs)
    before = dict(registry.stored)
    new = made_by(provider, inputs)
    provider.delete("id", old)
    assert registry.stored == before
    assert provider.read("id", new).id == "id"


@pytest.mark.parametrize("kind", PUSHES)
def test_an_old_one_that_a_killed_run_left_is_not_deleted_from_under_the_new_one(
    kind: type[ResourceProvider], registry: Registry, binary: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, inputs = kind(), {**binary, **SIGNED}
    old, new = made_by(provider, inputs), made_by(provider, inputs)
    before = dict(registry.stored)
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())  # the next run's process
    assert provider.diff("id", new, inputs).changes is False
    provider.delete("id", old)
    assert registry.stored == before


@pytest.mark.parametrize("kind", PUSHES)
def test_what_nothing_else_stands_for_is_deleted(
    kind: type[ResourceProvider], registry: Registry, binary: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, inputs = kind(), {**binary, **SIGNED}
    made = made_by(provider, inputs)
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())  # the process of a destroy, which compares nothing
    provider.delete("id", made)
    assert not provider.read("id", made).id
    left = {kept for kept in registry.stored.values() if b"schemaVersion" in kept}
    assert left == {IMAGE}


@pytest.mark.parametrize("kind", PUSHES)
def test_a_refresh_sees_each_part_that_is_gone_and_a_push_brings_it_back(
    kind: type[ResourceProvider], registry: Registry, binary: Outputs
) -> None:
    provider, inputs = kind(), {**binary, **SIGNED}
    made = made_by(provider, inputs)
    # The index of referrers is what its tag says; the image is no part.
    parts = {
        part for part, kept in registry.stored.items() if part[:7] != "sha256:" or b"manifests" not in kept
    }
    for part in parts - {SIGNED["digest"]}:
        del registry.stored[part]
        assert not provider.read("id", made).id, part
        made = made_by(provider, inputs)
        assert provider.read("id", made).id == "id"


@pytest.mark.parametrize("kind", PUSHES)
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_registry_that_is_away_is_an_error_and_nothing_is_gone(
    kind: type[ResourceProvider], status: int, registry: Registry, binary: Outputs
) -> None:
    provider, inputs = kind(), {**binary, **SIGNED}
    made = made_by(provider, inputs)
    registry.failures = [status] * ATTEMPTS
    with pytest.raises(artifacts.OciError, match=str(status)):
        provider.read("id", made)


def test_a_preview_knows_the_image_before_it_is_pushed(binary: Outputs) -> None:
    provider = oci.OciArtifactProvider()
    checked = provider.check({}, binary).inputs
    assert checked["image"] == made_by(provider, binary)["image"]
    elsewhere = provider.check(checked, {**binary, "repository": UNKNOWN}).inputs
    assert (elsewhere["digest"], elsewhere["image"]) == (checked["digest"], UNKNOWN)
    assert "digest" not in provider.check(checked, {**binary, "sha256": UNKNOWN}).inputs


def test_where_the_file_lies_is_in_no_state_and_an_older_state_that_has_it_is_as_good(
    binary: Outputs, tmp_path: Path
) -> None:
    provider = oci.OciArtifactProvider()
    made = made_by(provider, binary)
    assert str(tmp_path) not in json.dumps(made)
    older = {**made, "path": "/elsewhere/krustlet"}
    assert provider.diff("id", older, provider.check(older, binary).inputs).changes is False


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_file_that_is_not_the_one_that_was_built_is_not_pushed(
    damage: str, registry: Registry, binary: Outputs
) -> None:
    path = cache.place(binary["sha256"], "krustlet")
    checked = oci.OciArtifactProvider().check({}, binary).inputs
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"another")
    before = dict(registry.stored)
    with pytest.raises(cache.CacheError, match="run `pulumi up` again"):
        oci.OciArtifactProvider().create(checked)
    assert registry.stored == before


def test_a_new_key_s_attestations_take_the_place_of_the_old_ones(
    registry: Registry, binary: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, inputs = attestation.OciAttestationProvider(), {**binary, **SIGNED}
    old = made_by(provider, inputs)
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())  # the next run's process
    news = {**inputs, "private_key": generate_key().private_key}
    result = provider.diff("id", old, news)
    assert (result.changes, result.replaces) == (True, [])
    new = provider.update("id", old, news).outs
    assert new
    assert provider.read("id", new).id == "id"
    assert not provider.read("id", old).id
    for gone in {old["attestation_digest"], *old["bundle_digests"]}:
        assert gone not in registry.stored
    assert provider.diff("id", new, {**news, "crate": "elsewhere", "sha256": "the same"}).changes is False


def test_what_is_signed_is_in_no_state_and_an_older_state_that_has_it_is_as_good(
    registry: Registry, binary: Outputs
) -> None:
    provider, inputs = oci.OciSignatureProvider(), {"repository": binary["repository"], **SIGNED}
    made = made_by(provider, inputs)
    document = payload(made["repository"], made["digest"])
    assert document.encode() in registry.stored.values()
    assert document not in made.values()
    assert provider.diff("id", {**made, "payload": document}, inputs).changes is False
