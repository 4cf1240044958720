"""Pushes to a real registry; what lies there is looked at with a plain HTTP client, and with cosign."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import wasmtime

from components.providers import (
    artifacts,
    attestation,
    cache,
    cargo,
    compiler,
    oci,
    origin,
    referrers,
    signature,
)
from components.providers.client import Client
from components.providers.kms import KmsKey
from tests.integration.conftest import REPOSITORY
from tests.kms import Kms
from tests.unit.localcloud_api.client import TOKEN
from tests.unit.localcloud_api.conftest import backends, home, server

__all__ = ["backends", "home", "server"]

REGISTRY = shutil.which("registry")
pytestmark = pytest.mark.skipif(
    REGISTRY is None, reason="the registry is not on PATH: ./scripts/test brings it"
)

# Exports nothing, imports nothing; the smallest component there is.
COMPONENT = bytes(wasmtime.wat2wasm("(component)"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a registry on loopback and give the name of a repository in it."""
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "any")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = tmp_path / "registry.yml"
    configuration.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}}}\n"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([str(REGISTRY), "serve", str(configuration)], stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/v2/")
            yield f"127.0.0.1:{port}/p/r/app"
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(url: str) -> None:
    adapter = requests.adapters.HTTPAdapter(
        max_retries=requests.adapters.Retry(total=50, connect=50, backoff_factor=0.05, backoff_max=0.2)
    )
    with requests.Session() as session:
        session.mount("http://", adapter)
        session.get(url, timeout=10).raise_for_status()


def cached(content: bytes) -> str:
    """Put a file into the cache, as a build does; give its sum."""
    sum_ = hashlib.sha256(content).hexdigest()
    path = cache.place(sum_, "app.wasm")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return sum_


@pytest.fixture
def component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the sum of the component, which is in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cached(COMPONENT)


def get(repository: str, path: str, accept: str = artifacts.MANIFEST) -> requests.Response:
    """Ask the registry as any client would."""
    host, _, name = repository.partition("/")
    return requests.get(f"http://{host}/v2/{name}/{path}", headers={"Accept": accept}, timeout=10)


def test_what_is_pushed_is_the_wasm_artifact_layout_under_its_digest(repository: str, component: str) -> None:
    digest = oci.push(repository, "wasm", component)
    answer = get(repository, f"manifests/{digest}")
    assert f"sha256:{hashlib.sha256(answer.content).hexdigest()}" == digest
    manifest = answer.json()
    assert manifest["mediaType"] == artifacts.MANIFEST
    assert manifest["config"]["mediaType"] == "application/vnd.wasm.config.v0+json"
    [layer] = manifest["layers"]
    assert (layer["mediaType"], layer["digest"]) == ("application/wasm", f"sha256:{component}")
    assert get(repository, f"blobs/{layer['digest']}").content == COMPONENT
    assert get(repository, f"blobs/{manifest['config']['digest']}").json() == {
        "architecture": "wasm",
        "os": "wasip2",
        "created": "1970-01-01T00:00:00Z",
        "layerDigests": [layer["digest"]],
        "component": {"exports": [], "imports": [], "target": ""},
    }


def test_a_push_that_is_repeated_ends_the_same(repository: str, component: str) -> None:
    first = oci.push(repository, "wasm", component)
    assert oci.push(repository, "wasm", component) == first
    assert get(repository, "tags/list").json()["tags"] == [oci.tag_for(component)]


def test_a_push_that_was_interrupted_between_blob_and_manifest_is_completed(
    repository: str, component: str
) -> None:
    artifact = artifacts.wasm_artifact(COMPONENT)
    half = artifacts.Artifact(artifact.manifest, artifact.blobs[:1])
    with pytest.raises(artifacts.OciError, match="MANIFEST_BLOB_UNKNOWN"):
        Client(repository).push_artifact(half, "half")
    digest = oci.push(repository, "wasm", component)
    assert get(repository, f"manifests/{digest}").ok


def test_delete_removes_tag_and_manifest_and_a_second_delete_is_fine(repository: str, component: str) -> None:
    digest = oci.push(repository, "wasm", component)
    props = {"repository": repository, "digest": digest, "sha256": component}
    for _ in range(2):
        oci.OciArtifactProvider().delete("id", props)
        assert get(repository, f"manifests/{digest}").status_code == 404
        assert get(repository, f"manifests/{oci.tag_for(component)}").status_code == 404


def test_delete_leaves_a_tag_that_points_elsewhere_by_now(repository: str, component: str) -> None:
    digest = oci.push(repository, "wasm", component)
    tag = oci.tag_for(component)
    newer = Client(repository).push_artifact(artifacts.agent_artifact(b"newer"), tag)
    Client(repository).delete_artifact(digest, tag)
    assert get(repository, f"manifests/{tag}").headers["Docker-Content-Digest"] == newer


def test_the_agent_travels_as_an_artifact_of_its_own_type(repository: str) -> None:
    sum_ = cached(b"ELF")
    digest = oci.push(repository, "agent", sum_)
    manifest = get(repository, f"manifests/{digest}").json()
    assert manifest["artifactType"] == "application/vnd.krustlet.agent.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert [layer["digest"] for layer in manifest["layers"]] == [f"sha256:{sum_}"]


COSIGN = pytest.mark.skipif(
    shutil.which("cosign3") is None, reason="no cosign on PATH: ./scripts/test brings it"
)


@COSIGN
@pytest.mark.parametrize("program", ["cosign", "cosign3"])
@pytest.mark.parametrize("formats", [("tag",), ("bundle",), ("tag", "bundle")])
def test_cosign_verifies_what_was_signed_and_refuses_another_key(
    repository: str, component: str, tmp_path: Path, program: str, formats: tuple[str, ...]
) -> None:
    digest = oci.push(repository, "wasm", component)
    pair, other = signature.generate_key(), signature.generate_key()
    signed = signature.sign(pair.private_key, repository, digest)
    if "tag" in formats:
        oci.push_signature(repository, digest, signed.payload, signed.signature)
    if "bundle" in formats:
        oci.push_bundle(
            repository, digest, signature.bundle(signature.statement(digest), signed.bundle_signature)
        )
    assert _cosign(program, tmp_path, pair.public_key, f"{repository}@{digest}")
    assert not _cosign(program, tmp_path, other.public_key, f"{repository}@{digest}")


@pytest.fixture(scope="module")
def predicates() -> dict[str, bytes]:
    """Give what is attested of the app in this repository."""
    job = cargo.job_for(REPOSITORY / "wasm_app", compiler.WASM_TARGET, "release")
    return origin.predicates(job, job.built())


@pytest.fixture
def attested(
    predicates: dict[str, bytes], repository: str, component: str
) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """Give what pushes the component and attests it with a key: its digest and what was pushed."""

    def attest(key: str) -> tuple[str, dict[str, Any]]:
        digest = oci.push(repository, "wasm", component)
        return digest, attestation.push(repository, digest, predicates, key)

    return attest


@COSIGN
@pytest.mark.parametrize("program", ["cosign", "cosign3"])
@pytest.mark.parametrize("left_out", ["", "tag", "bundle"])
def test_cosign_verifies_what_is_attested_and_refuses_another_key(
    attested: Callable[[str], tuple[str, dict[str, Any]]],
    repository: str,
    tmp_path: Path,
    program: str,
    left_out: str,
) -> None:
    pair, other = signature.generate_key(), signature.generate_key()
    digest, pushed = attested(pair.private_key)
    image, client = f"{repository}@{digest}", Client(repository)
    if left_out == "tag":
        client.delete_artifact(pushed["attestation_digest"], artifacts.attestation_tag(digest))
    for bundle in pushed["bundle_digests"] if left_out == "bundle" else ():
        referrers.Referrers(client, digest).remove(bundle)
    for kind in ("slsaprovenance1", "cyclonedx"):
        verify = ("verify-attestation", "--type", kind)
        assert _cosign(program, tmp_path, pair.public_key, image, *verify)
        assert not _cosign(program, tmp_path, other.public_key, image, *verify)
    assert not _cosign(program, tmp_path, pair.public_key, image, "verify-attestation", "--type", "vuln")


@pytest.fixture
def kms(server: str, monkeypatch: pytest.MonkeyPatch) -> Kms:
    """Give a Cloud KMS that the program's clients reach; the registry takes any token."""
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("GOOGLE_KMS_CUSTOM_ENDPOINT", f"{server}/cloudkms/v1/")
    return Kms(f"{server}/cloudkms/v1/", TOKEN)


@COSIGN
@pytest.mark.parametrize("program", ["cosign", "cosign3"])
def test_cosign_verifies_what_a_key_in_cloud_kms_has_signed_and_attested_and_refuses_another(
    attested: Callable[[str], tuple[str, dict[str, Any]]],
    repository: str,
    kms: Kms,
    tmp_path: Path,
    program: str,
) -> None:
    key, other = kms.new_key(), KmsKey(kms.new_key()).public_key()
    digest, _ = attested(key)
    image, pem = f"{repository}@{digest}", KmsKey(key).public_key()
    signed = {"repository": repository, "digest": digest, **signature.sign(key, repository, digest).outputs()}
    assert oci.OciSignatureProvider().create(signed).outs
    kinds = (("verify-attestation", "--type", kind) for kind in ("slsaprovenance1", "cyclonedx"))
    for verify in (("verify",), *kinds):
        assert _cosign(program, tmp_path, pem, image, *verify)
        assert not _cosign(program, tmp_path, other, image, *verify)


@COSIGN
@pytest.mark.parametrize("program", ["cosign", "cosign3"])
def test_signatures_and_attestations_stand_beside_each_other_and_go_one_by_one(
    repository: str, component: str, tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = oci.push(repository, "wasm", component)
    image = f"{repository}@{digest}"
    pair = signature.generate_key()
    signed = {"repository": repository, "digest": digest}
    signed |= signature.sign(pair.private_key, repository, digest).outputs()
    attested = {"repository": repository, "digest": digest, "private_key": pair.private_key}
    monkeypatch.setattr(attestation, "_predicates", lambda _props: {origin.SBOM: b"{}"})
    with ThreadPoolExecutor(2) as pool:
        pushes = [
            pool.submit(oci.OciSignatureProvider().create, signed),
            pool.submit(attestation.OciAttestationProvider().create, attested),
        ]
        _, made = (push.result().outs for push in pushes)
    assert made
    assert _cosign(program, tmp_path, pair.public_key, image)
    assert _cosign(program, tmp_path, pair.public_key, image, "verify-attestation", "--type", "cyclonedx")
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())  # the next run's process
    attestation.OciAttestationProvider().delete("id", made)
    assert _cosign(program, tmp_path, pair.public_key, image)
    assert not _cosign(program, tmp_path, pair.public_key, image, "verify-attestation", "--type", "cyclonedx")
    assert not attestation.OciAttestationProvider().read("id", made).id


def test_a_new_signature_of_an_image_leaves_nothing_of_the_old_one(
    repository: str, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = oci.push(repository, "wasm", component)
    provider = oci.OciSignatureProvider()
    made: list[dict[str, Any]] = []
    for _ in range(2):
        monkeypatch.setattr(oci, "NEEDED", oci.Needed())  # each run is a process of its own
        signed = signature.sign(signature.generate_key().private_key, repository, digest)
        props = {
            "repository": repository,
            "digest": digest,
            "signature": signed.signature,
            "bundle_signature": signed.bundle_signature,
        }
        outs = provider.update("id", made[-1], props).outs if made else provider.create(props).outs
        assert outs
        made.append(outs)
    for part in ("signature_digest", "bundle_digest"):
        assert get(repository, f"manifests/{made[0][part]}").status_code == 404
    tagged = get(repository, f"manifests/{artifacts.signature_tag(digest)}")
    assert tagged.headers["Docker-Content-Digest"] == made[1]["signature_digest"]
    assert _referrers(repository, digest) == [made[1]["bundle_digest"]]
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())
    provider.delete("id", made[1])
    assert get(repository, f"manifests/{digest.replace(':', '-')}").status_code == 404
    assert get(repository, "tags/list").json()["tags"] == [oci.tag_for(component)]


def test_what_others_have_refer_to_an_image_stays_when_its_signature_goes(
    repository: str, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = oci.push(repository, "wasm", component)
    client = Client(repository)
    subject = referrers.subject_descriptor(client, digest)
    others = referrers.Referrers(client, digest).push(artifacts.bundle_artifact("{}", subject))
    signed = signature.sign(signature.generate_key().private_key, repository, digest)
    provider = oci.OciSignatureProvider()
    props = {"repository": repository, "digest": digest, **signed.outputs()}
    made = provider.create(props).outs
    assert made
    assert provider.create(props).outs == made
    assert _referrers(repository, digest) == [others, made["bundle_digest"]]
    provider.delete("id", made)
    assert provider.read("id", made).id == "id"
    monkeypatch.setattr(oci, "NEEDED", oci.Needed())  # the next run's process
    provider.delete("id", made)
    assert _referrers(repository, digest) == [others]
    assert get(repository, f"manifests/{others}").ok
    assert not provider.read("id", made).id


def _referrers(repository: str, digest: str) -> list[str]:
    answer = get(repository, f"manifests/{digest.replace(':', '-')}", referrers.INDEX)
    return [item["digest"] for item in answer.json()["manifests"]]


def _cosign(program: str, directory: Path, public_key: str, image: str, *verify: str) -> bool:
    # cosign 2 wants Sigstore's root before it looks at a bundle, also for a key, and would ask the internet.
    root = directory / "trusted_root.json"
    root.write_text('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}')
    key = directory / "key.pub"
    key.write_text(public_key)
    command = [
        program,
        *(verify or ("verify",)),
        "--insecure-ignore-tlog",
        "--allow-http-registry",
        f"--trusted-root={root}",
        "--key",
        str(key),
        image,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_a_file_that_is_no_component_is_not_pushed(repository: str) -> None:
    with pytest.raises(artifacts.OciError, match="no WebAssembly component"):
        oci.push(repository, "wasm", cached(bytes(wasmtime.wat2wasm("(module)"))))


class _Refusing(BaseHTTPRequestHandler):
    """A registry that takes no token that it gave."""

    def do_GET(self) -> None:
        """Give a token, and refuse it everywhere."""
        host = self.headers["Host"]
        token = self.path.startswith("/token")
        body = json.dumps({"token": "t"} if token else {"errors": [{"code": "DENIED", "message": "no"}]})
        self.send_response(200 if token else 401)
        self.send_header("WWW-Authenticate", f'Bearer realm="http://{host}/token",service="s",scope="x"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the names are http.server's

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Say nothing."""


def test_refused_credentials_are_an_error_at_once(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "expired")
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("a refusal is final"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(artifacts.OciError, match="refused"):
            oci.push(f"127.0.0.1:{server.server_port}/p/app", "wasm", component)
    finally:
        server.shutdown()
        server.server_close()
