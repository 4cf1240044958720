"""Pushes artifacts and their cosign signatures to an OCI registry, with the oras package.

Everything pushed is a function of the file's bytes: a push that was interrupted, or is repeated, ends the
same. Credentials are looked up when a request is made and are in no input, output or state.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import google.auth
import google.auth.exceptions
import google.auth.transport.requests
import oras.container
import oras.provider
import pulumi
import requests
import wasmtime
from pulumi.dynamic import CheckFailure, CheckResult, CreateResult, DiffResult, ResourceProvider, UpdateResult
from wasmtime import component

from components.providers import ProviderError, changed, is_unknown, operation

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
WASM_CONFIG = "application/vnd.wasm.config.v0+json"
WASM_LAYER = "application/wasm"
EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"
AGENT_ARTIFACT = "application/vnd.krustlet.agent.v1"
AGENT_LAYER = "application/vnd.krustlet.agent.v1.binary"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"

REPOSITORY = re.compile(r"[^/\s]+(/[a-z0-9]+([._-]+[a-z0-9]+)*)+")
ATTEMPTS = 4
# Seconds to connect, and between two pieces of an answer: a registry takes a while to store a big blob.
TIMEOUT = (10.0, 120.0)
# What may differ between two tokens.
ACTIONS = {"GET": "pull", "HEAD": "pull", "POST": "push", "PUT": "push", "DELETE": "delete"}

Kind = Literal["wasm", "agent"]


class OciError(ProviderError):
    """The registry refused something, could not be reached, or the file is not what it is said to be."""


@dataclass(frozen=True)
class Blob:
    """Bytes under their digest."""

    media_type: str
    content: bytes

    @property
    def digest(self) -> str:
        """Give `sha256:` and the hex sum."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    def descriptor(self, annotations: dict[str, str] | None = None) -> dict[str, Any]:
        """Give the blob's OCI descriptor."""
        described: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": len(self.content),
        }
        return {**described, "annotations": annotations} if annotations else described


@dataclass(frozen=True)
class Artifact:
    """A manifest and the blobs that it names."""

    manifest: Blob
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class Interface:
    """What a component imports and exports, sorted, and the world that it is for ("" when none is known)."""

    imports: tuple[str, ...]
    exports: tuple[str, ...]
    target: str


def canonical(document: dict[str, Any]) -> bytes:
    """Write JSON in one way only."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def interface(wasm: bytes) -> Interface:
    """Read what a component imports and exports. Raises OciError when it is no component."""
    engine = wasmtime.Engine()
    try:
        kind = component.Component(engine, wasm).type
    except wasmtime.WasmtimeError as error:
        raise OciError(f"this is no WebAssembly component: {str(error).splitlines()[0]}") from None
    imports, exports = sorted(kind.imports(engine)), sorted(kind.exports(engine))
    target = ""
    for name in exports:
        base, _, version = name.partition("@")
        if base == "wasi:http/incoming-handler":
            target = f"wasi:http/proxy@{version}"
        elif base == "wasi:cli/run" and not target:
            target = f"wasi:cli/command@{version}"
    return Interface(tuple(imports), tuple(exports), target)


def _manifest(
    config: Blob, layers: list[dict[str, Any]], blobs: list[Blob], artifact_type: str | None = None
) -> Artifact:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(),
        "layers": layers,
    }
    if artifact_type:
        document["artifactType"] = artifact_type
    return Artifact(Blob(MANIFEST, canonical(document)), (config, *blobs))


def wasm_artifact(wasm: bytes) -> Artifact:
    """Lay a component out as CNCF's Wasm OCI artifact. Nothing of the clock, the host or a path is in it."""
    layer = Blob(WASM_LAYER, wasm)
    described = interface(wasm)
    config = {
        "architecture": "wasm",
        "os": "wasip2",
        "layerDigests": [layer.digest],
        "component": {
            "exports": list(described.exports),
            "imports": list(described.imports),
            "target": described.target,
        },
    }
    return _manifest(Blob(WASM_CONFIG, canonical(config)), [layer.descriptor()], [layer])


def agent_artifact(binary: bytes) -> Artifact:
    """Lay the node agent out as an artifact of its own type; the layer's digest is the file's sha256."""
    layer = Blob(AGENT_LAYER, binary)
    return _manifest(Blob(EMPTY_CONFIG, b"{}"), [layer.descriptor()], [layer], AGENT_ARTIFACT)


def signature_artifact(payload: str, signature: str) -> Artifact:
    """Lay a signature out as cosign does: one layer, the payload, with the signature as an annotation."""
    layer = Blob(SIMPLE_SIGNING, payload.encode())
    config = {
        "architecture": "",
        "config": {},
        "os": "",
        "rootfs": {"diff_ids": [layer.digest], "type": "layers"},
    }
    described = layer.descriptor({SIGNATURE_ANNOTATION: signature})
    return _manifest(Blob(IMAGE_CONFIG, canonical(config)), [described], [layer])


def signature_tag(digest: str) -> str:
    """Give the tag at which cosign looks for the signature of an image."""
    return f"{digest.replace(':', '-')}.sig"


def is_loopback(registry: str) -> bool:
    """Say whether a registry (HOST or HOST:PORT) is on this machine, which means plain http."""
    host = registry.rsplit(":", 1)[0] if not registry.endswith("]") else registry
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def access_token() -> str:
    """Get a Google access token: GOOGLE_OAUTH_ACCESS_TOKEN, else the application default credentials."""
    if given := os.environ.get("GOOGLE_OAUTH_ACCESS_TOKEN"):
        return given
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        credentials.refresh(google.auth.transport.requests.Request())  # type: ignore[no-untyped-call]
    except google.auth.exceptions.GoogleAuthError as error:
        first_line = str(error).splitlines()[0]
        raise OciError(
            f"there are no Google credentials for the registry ({first_line}): "
            "run `gcloud auth application-default login` or set GOOGLE_OAUTH_ACCESS_TOKEN"
        ) from None
    return str(credentials.token)


class Client(oras.provider.Registry):  # type: ignore[misc]
    """An oras client for one repository, `HOST[:PORT]/PATH`."""

    def __init__(self, repository: str) -> None:
        self.container = oras.container.Container(repository)
        super().__init__(insecure=is_loopback(self.container.registry))
        self.auth.set_basic_auth("oauth2accesstoken", access_token())
        # oras waits for ever.
        self.session.request = functools.partial(self.session.request, timeout=TIMEOUT)
        self._tokens: dict[str, str | None] = {}

    def do_request(self, url: str, method: str = "GET", **kwargs: Any) -> requests.Response:
        """Make a request, again after a while when the registry is away or overloaded. Raises OciError.

        oras keeps one token for every later request, whatever its scope, and waits for two minutes on wrong
        credentials; so each kind of request has its own token and a refusal is final.
        """
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(0.5 * 2**attempt)
            try:
                response = self._request_with_token(url, method, **kwargs)
            except (
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,
            ) as error:
                failure = f"cannot be reached: {_reason(error)}"
                continue
            except ValueError:
                raise OciError(
                    f"{self.container.registry} takes no credentials for {self.container.api_prefix}: "
                    "is the access token still valid?"
                ) from None
            if response.status_code in (401, 403):
                raise OciError(f"{self.container.uri}: {method} is refused: {_said(response)}")
            if response.status_code == 429 or response.status_code >= 500:
                failure = f"answers {response.status_code}: {_said(response)}"
                continue
            return response
        raise OciError(f"the registry {self.container.registry} {failure}")

    def _request_with_token(self, url: str, method: str, **kwargs: Any) -> requests.Response:
        """Make one request with the token of an earlier one of its kind.

        Without one a blob would be sent twice, the first time to a registry that need not listen.
        """
        once = oras.provider.Registry.do_request.__wrapped__
        action = ACTIONS[method]
        kept = self.auth.token = self._tokens.pop(action, None)
        response: requests.Response = once(self, url, method, **kwargs)
        if kept and response.status_code in (401, 403):
            # It may have ended meanwhile.
            self.auth.token = None
            response = once(self, url, method, **kwargs)
        self._tokens[action] = self.auth.token
        return response

    def _get_location(self, r: requests.Response, container: oras.container.Container) -> str:
        """Give where to upload to; what the registry says instead is the error."""
        _expect(r, 202)
        return str(super()._get_location(r, container))

    def manifest_digest(self, reference: str) -> str | None:
        """Give the digest of a tag's or digest's manifest, None when there is none."""
        response = self._manifest_request(reference, "HEAD")
        if response.status_code == 404:
            return None
        _expect(response, 200)
        return response.headers.get("Docker-Content-Digest") or reference

    def push_artifact(self, artifact: Artifact, tag: str) -> str:
        """Push blobs that the registry lacks, then the manifest under a tag; give the manifest's digest."""
        for blob in artifact.blobs:
            descriptor = blob.descriptor()
            if self.blob_exists(descriptor, self.container):
                continue
            with tempfile.NamedTemporaryFile() as file:
                file.write(blob.content)
                file.flush()
                _expect(self.put_upload(file.name, self.container, descriptor), 201)
        digest = artifact.manifest.digest
        if self.manifest_digest(tag) != digest:
            response = self._manifest_request(tag, "PUT", artifact.manifest.content)
            _expect(response, 201, 200)
            said = response.headers.get("Docker-Content-Digest", digest)
            if said != digest:
                raise OciError(f"{self.container.uri}: the registry stored {said} where {digest} was pushed")
        return digest

    def delete_artifact(self, digest: str, tag: str) -> None:
        """Remove a tag that still points to the manifest, then the manifest, where the registry lets us."""
        if self.manifest_digest(tag) == digest:
            # Not every registry can remove a tag alone; removing the manifest takes its tags along there.
            _expect(self._manifest_request(tag, "DELETE"), 202, 200, 204, 400, 404, 405)
        _expect(self._manifest_request(digest, "DELETE"), 202, 200, 204, 400, 404, 405)

    def _manifest_request(
        self, reference: str, method: str, content: bytes | None = None
    ) -> requests.Response:
        url = f"{self.prefix}://{self.container.manifest_url(reference)}"
        headers = {"Content-Type": MANIFEST} if content is not None else {"Accept": MANIFEST}
        return self.do_request(url, method, data=content, headers=headers)


def _reason(error: requests.RequestException) -> str:
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause)).rsplit(": ", 1)[-1]


def _said(response: requests.Response) -> str:
    try:
        errors = response.json()["errors"]
        return "; ".join(f"{error['code']} {error.get('message', '')}".strip() for error in errors)
    except (ValueError, KeyError, TypeError):
        return response.reason or str(response.status_code)


def _expect(response: requests.Response, *allowed: int) -> None:
    if response.status_code not in allowed:
        raise OciError(f"{response.request.method} {response.url}: {response.status_code}: {_said(response)}")


def read_file(path: str, sha256: str) -> bytes:
    """Read a built file and check that it is the one that is meant. Raises OciError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise OciError(
            f"{path} cannot be read ({error.strerror}): it was built elsewhere, or the cache is gone; "
            "build it again with `pulumi up --replace` and the URN of its cargo build"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OciError(f"{path} is not the file that was built: remove it and run `pulumi up` again")
    return content


def push(repository: str, kind: Kind, path: str, sha256: str) -> str:
    """Push a built file as an artifact, under a tag made of its own sum; give the manifest's digest."""
    content = read_file(path, sha256)
    artifact = wasm_artifact(content) if kind == "wasm" else agent_artifact(content)
    return Client(repository).push_artifact(artifact, tag_for(sha256))


def tag_for(sha256: str) -> str:
    """Give the tag of a file: short, and never moved to another file."""
    return sha256[:12]


def push_signature(repository: str, digest: str, payload: str, signature: str) -> str:
    """Push the signature of an image to where cosign looks for it; give the signature manifest's digest."""
    return Client(repository).push_artifact(signature_artifact(payload, signature), signature_tag(digest))


def _check_repository(news: dict[str, Any]) -> CheckResult:
    repository = news["repository"]
    if not is_unknown(repository) and not REPOSITORY.fullmatch(repository):
        reason = f"{repository} is no repository: HOST[:PORT]/PATH in lower case is allowed"
        return CheckResult(news, [CheckFailure("repository", reason)])
    return CheckResult(news, [])


class OciArtifactProvider(ResourceProvider):
    """CRUD of an artifact in a registry."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Check the repository's name."""
        return _check_repository(news)

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Other bytes are another artifact; where they lie on this machine does not matter."""
        return changed(olds, news, replace={"repository", "kind", "sha256"}, update=set())

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Push."""
        digest = push(props["repository"], props["kind"], props["path"], props["sha256"])
        image = f"{props['repository']}@{digest}"
        return CreateResult(image, {**props, "digest": digest, "image": image})

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove tag and manifest."""
        Client(props["repository"]).delete_artifact(props["digest"], tag_for(props["sha256"]))


class OciArtifact(pulumi.dynamic.Resource, module="oci", name="Artifact"):
    """A built file as an artifact in a registry; `image` is REPOSITORY@DIGEST."""

    digest: pulumi.Output[str]
    image: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        *,
        repository: pulumi.Input[str],
        kind: Kind,
        path: pulumi.Input[str],
        sha256: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Push the file at `path`, whose sum is `sha256` (hex), to `repository` (HOST[:PORT]/PATH)."""
        super().__init__(
            OciArtifactProvider(),
            resource_name,
            {
                "repository": repository,
                "kind": kind,
                "path": path,
                "sha256": sha256,
                "digest": None,
                "image": None,
            },
            opts,
        )


class OciSignatureProvider(ResourceProvider):
    """CRUD of a cosign signature in a registry."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Check the repository's name."""
        return _check_repository(news)

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """A new signature of the same image takes the old one's place at its tag."""
        return changed(olds, news, replace={"repository", "digest"}, update={"payload", "signature"})

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Push."""
        signed = push_signature(props["repository"], props["digest"], props["payload"], props["signature"])
        return CreateResult(
            f"{props['repository']}:{signature_tag(props['digest'])}", {**props, "signature_digest": signed}
        )

    @operation
    def update(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Push the new one, which takes over the tag, and remove the old one."""
        signed = push_signature(news["repository"], news["digest"], news["payload"], news["signature"])
        if olds["signature_digest"] != signed:
            Client(news["repository"]).delete_artifact(
                olds["signature_digest"], signature_tag(news["digest"])
            )
        return UpdateResult({**news, "signature_digest": signed})

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove tag and manifest."""
        client = Client(props["repository"])
        client.delete_artifact(props["signature_digest"], signature_tag(props["digest"]))


class OciSignature(pulumi.dynamic.Resource, module="oci", name="Signature"):
    """A cosign signature in a registry; `image` is the signed image, known once its signature is there."""

    signature_digest: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        *,
        repository: pulumi.Input[str],
        digest: pulumi.Input[str],
        payload: pulumi.Input[str],
        signature: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Push the `signature` over `payload` for `repository`@`digest`."""
        super().__init__(
            OciSignatureProvider(),
            resource_name,
            {
                "repository": repository,
                "digest": digest,
                "payload": payload,
                "signature": signature,
                "signature_digest": None,
            },
            opts,
        )
