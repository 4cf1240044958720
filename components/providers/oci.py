"""Pushes artifacts and their signatures in cosign's formats to an OCI registry, with the oras package.

Everything pushed is a function of the file's bytes: a push that was interrupted, or is repeated, ends the
same. Credentials are looked up when a request is made and are in no input, output or state.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import tempfile
import threading
import time
from typing import Any

import oras.container
import oras.provider
import pulumi
import requests
from pulumi.dynamic import (
    CheckFailure,
    CheckResult,
    CreateResult,
    DiffResult,
    ReadResult,
    ResourceProvider,
    UpdateResult,
)
from pulumi.runtime.rpc import UNKNOWN

from components.providers import changed, gone, is_unknown, operation
from components.providers.artifacts import (
    COSIGN_SIGN,
    MANIFEST,
    Artifact,
    Kind,
    OciError,
    artifact,
    attestation_artifact,
    attestation_tag,
    bundle_artifact,
    signature_artifact,
    signature_tag,
)
from components.providers.cache import read_built
from components.providers.referrers import Referrers, subject_descriptor
from components.providers.signature import bundle as signed_bundle
from components.providers.signature import payload as signed_document
from components.providers.signature import statement

REPOSITORY = re.compile(r"[^/\s]+(/[a-z0-9]+([._-]+[a-z0-9]+)*)+")
ATTEMPTS = 4
# Seconds to connect, and between two pieces of an answer: a registry takes a while to store a big blob.
TIMEOUT = (10.0, 120.0)
# What may differ between two tokens.
ACTIONS = {"GET": "pull", "HEAD": "pull", "POST": "push", "PUT": "push", "DELETE": "delete"}


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
    # Where the variable is set they are not needed, and are long to import.
    import google.auth.exceptions  # noqa: PLC0415
    import google.auth.transport.requests  # noqa: PLC0415

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
        self.expect(r, 202)
        return str(super()._get_location(r, container))

    def manifest_digest(self, reference: str, media_type: str = MANIFEST) -> str | None:
        """Give the digest of a tag's or digest's manifest, None when there is none."""
        response = self.manifest_request(reference, "HEAD", media_type=media_type)
        if response.status_code == 404:
            return None
        self.expect(response, 200)
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
                self.expect(self.put_upload(file.name, self.container, descriptor), 201)
        digest = artifact.manifest.digest
        if self.manifest_digest(tag) != digest or self.manifest_digest(digest) is None:
            response = self.manifest_request(tag, "PUT", artifact.manifest.content)
            self.expect(response, 201, 200)
            said = response.headers.get("Docker-Content-Digest", digest)
            if said != digest:
                raise OciError(f"{self.container.uri}: the registry stored {said} where {digest} was pushed")
        return digest

    def holds(self, digest: str, tag: str) -> bool:
        """Say whether a tag points to the manifest, and every blob that the manifest names is there."""
        if self.manifest_digest(tag) != digest:
            return False
        response = self.manifest_request(digest, "GET")
        if response.status_code == 404:
            return False
        self.expect(response, 200)
        manifest = response.json()
        blobs = [manifest["config"], *manifest["layers"]]
        return all(self.blob_exists(descriptor, self.container) for descriptor in blobs)

    def delete_artifact(self, digest: str, tag: str) -> None:
        """Remove a tag that still points to the manifest, then the manifest, where the registry lets us."""
        if self.manifest_digest(tag) == digest:
            # Not every registry can remove a tag alone; removing the manifest takes its tags along there.
            self.expect(self.manifest_request(tag, "DELETE"), 202, 200, 204, 400, 404, 405)
        self.expect(self.manifest_request(digest, "DELETE"), 202, 200, 204, 400, 404, 405)

    def manifest_request(
        self, reference: str, method: str, content: bytes | None = None, *, media_type: str = MANIFEST
    ) -> requests.Response:
        """Ask for, write or remove a manifest of this type."""
        url = f"{self.prefix}://{self.container.manifest_url(reference)}"
        headers = {"Content-Type" if content is not None else "Accept": media_type}
        return self.do_request(url, method, data=content, headers=headers)

    @staticmethod
    def expect(response: requests.Response, *allowed: int) -> None:
        """Raise OciError with the registry's words for any other status."""
        if response.status_code not in allowed:
            said = f"{response.status_code}: {_said(response)}"
            raise OciError(f"{response.request.method} {response.url}: {said}")


def _reason(error: requests.RequestException) -> str:
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause)).rsplit(": ", 1)[-1]


def _said(response: requests.Response) -> str:
    try:
        errors = response.json()["errors"]
        return "; ".join(f"{error['code']} {error.get('message', '')}".strip() for error in errors)
    except (ValueError, KeyError, TypeError):
        return response.reason or str(response.status_code)


def push(repository: str, kind: Kind, sha256: str, annotations: dict[str, str] | None = None) -> str:
    """Push a built file as an artifact, under a tag made of its own sum; give the manifest's digest."""
    made = artifact(kind, read_built(sha256), annotations)
    return Client(repository).push_artifact(made, tag_for(sha256))


def tag_for(sha256: str) -> str:
    """Give the tag of a file: short, and never moved to another file."""
    return sha256[:12]


def push_signature(repository: str, digest: str, payload: str, signature: str) -> str:
    """Push the signature of an image to where cosign 2 looks for it; give the signature manifest's digest."""
    return Client(repository).push_artifact(signature_artifact(payload, signature), signature_tag(digest))


def push_bundle(repository: str, digest: str, bundle: str, predicate_type: str = COSIGN_SIGN) -> str:
    """Push a Sigstore bundle as a referrer of an image in the registry; give the bundle manifest's digest."""
    client = Client(repository)
    made = bundle_artifact(bundle, subject_descriptor(client, digest), predicate_type)
    return Referrers(client, digest).push(made)


def push_attestations(repository: str, digest: str, envelopes: dict[str, bytes]) -> str:
    """Push attestations to where cosign 2 looks for them; give the digest of their manifest."""
    return Client(repository).push_artifact(attestation_artifact(envelopes), attestation_tag(digest))


class Needed:
    """What the state that a run of pulumi writes has in a registry.

    The same bytes have the same digest, so that the manifest of a resource which is replaced may be that of
    the one which took its place. Pulumi deletes the old one last, in the process where it compared and
    created every other: also the one that a killed run left to the next.
    """

    def __init__(self) -> None:
        self._manifests: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def keep(self, repository: str, digest: str) -> None:
        """Note what a resource of the new state stands for."""
        with self._lock:
            self._manifests.add((repository, digest))

    def has(self, repository: str, digest: str) -> bool:
        """Say whether a resource of the new state stands for this manifest."""
        with self._lock:
            return (repository, digest) in self._manifests


NEEDED = Needed()


def check_repository(news: dict[str, Any]) -> CheckResult:
    """Check a repository's name."""
    repository = news["repository"]
    if not is_unknown(repository) and not REPOSITORY.fullmatch(repository):
        reason = f"{repository} is no repository: HOST[:PORT]/PATH in lower case is allowed"
        return CheckResult(news, [CheckFailure("repository", reason)])
    return CheckResult(news, [])


LAID_OUT = ("kind", "sha256", "annotations")


def _laid_out(props: dict[str, Any]) -> Artifact:
    return artifact(props["kind"], read_built(props["sha256"]), props.get("annotations"))


class OciArtifactProvider(ResourceProvider):
    """CRUD of an artifact in a registry."""

    serialize_as_secret_always = False

    @operation
    def check(self, olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Check the repository's name, and tell the image's before it is pushed.

        So a preview knows it, and what names the image by digest does not change because the image has to be
        pushed again.
        """
        checked = check_repository(news)
        if checked.failures or is_unknown(news["sha256"]) or is_unknown(news.get("annotations")):
            return checked
        same = olds.get("digest") and all(olds.get(key) == news.get(key) for key in ("repository", *LAID_OUT))
        digest = olds["digest"] if same else _laid_out(news).manifest.digest
        image = UNKNOWN if is_unknown(news["repository"]) else f"{news['repository']}@{digest}"
        return CheckResult({**news, "digest": digest, "image": image}, [])

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Other bytes are another artifact."""
        result = changed(olds, news, replace={"repository", *LAID_OUT}, update=set())
        if not result.changes:
            NEEDED.keep(olds["repository"], olds["digest"])
        return result

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Push."""
        digest = push(props["repository"], props["kind"], props["sha256"], props.get("annotations"))
        NEEDED.keep(props["repository"], digest)
        image = f"{props['repository']}@{digest}"
        return CreateResult(image, {**props, "digest": digest, "image": image})

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Look whether tag, manifest and blobs are there; a registry that is away is an error."""
        there = Client(props["repository"]).holds(props["digest"], tag_for(props["sha256"]))
        return ReadResult(id_, props) if there else gone()

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove tag and manifest, unless another resource has the same."""
        if not NEEDED.has(props["repository"], props["digest"]):
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
        sha256: pulumi.Input[str],
        annotations: pulumi.Input[dict[str, str]] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Push the built file with the sum `sha256` (hex) to `repository` (HOST[:PORT]/PATH)."""
        super().__init__(
            OciArtifactProvider(),
            resource_name,
            {
                "repository": repository,
                "kind": kind,
                "sha256": sha256,
                "annotations": annotations,
                "digest": None,
                "image": None,
            },
            opts,
        )


def _push_signatures(props: dict[str, Any]) -> dict[str, str]:
    """Push a signature in both formats; give the digests of the manifests by the outputs that they are."""
    repository, digest = props["repository"], props["digest"]
    document = signed_document(repository, digest)
    pushed = {
        "signature_digest": push_signature(repository, digest, document, props["signature"]),
        "bundle_digest": push_bundle(
            repository, digest, signed_bundle(statement(digest), props["bundle_signature"])
        ),
    }
    for made in pushed.values():
        NEEDED.keep(repository, made)
    return pushed


def _remove_signatures(props: dict[str, Any]) -> None:
    """Remove what no resource of the new state stands for."""
    repository, digest, client = props["repository"], props["digest"], Client(props["repository"])
    if not NEEDED.has(repository, props["signature_digest"]):
        client.delete_artifact(props["signature_digest"], signature_tag(digest))
    # An older program's has none.
    bundle = props.get("bundle_digest")
    if bundle and not NEEDED.has(repository, bundle):
        Referrers(client, digest).remove(bundle)


class OciSignatureProvider(ResourceProvider):
    """CRUD of an image's signature in a registry, in both of cosign's formats."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Check the repository's name."""
        return check_repository(news)

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """A new signature of the same image takes the old one's place."""
        update = {"signature", "bundle_signature"}
        result = changed(olds, news, replace={"repository", "digest"}, update=update)
        if not result.changes:
            NEEDED.keep(olds["repository"], olds["signature_digest"])
            NEEDED.keep(olds["repository"], olds["bundle_digest"])
        return result

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Push."""
        pushed = _push_signatures(props)
        return CreateResult(f"{props['repository']}:{signature_tag(props['digest'])}", {**props, **pushed})

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Look whether both are where they are looked for; a registry that is away is an error."""
        client, digest = Client(props["repository"]), props["digest"]
        there = client.holds(props["signature_digest"], signature_tag(digest))
        if there and (bundle := props.get("bundle_digest")):
            there = Referrers(client, digest).has(bundle)
        return ReadResult(id_, props) if there else gone()

    @operation
    def update(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Push the new ones, then remove the old ones."""
        pushed = _push_signatures(news)
        _remove_signatures(olds)
        return UpdateResult({**news, **pushed})

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove both, unless another resource has the same."""
        _remove_signatures(props)


class OciSignature(pulumi.dynamic.Resource, module="oci", name="Signature"):
    """An image's signature in a registry."""

    signature_digest: pulumi.Output[str]
    bundle_digest: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        *,
        repository: pulumi.Input[str],
        digest: pulumi.Input[str],
        signature: pulumi.Input[str],
        bundle_signature: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Push the signatures over payload and bundle for `repository`@`digest`."""
        super().__init__(
            OciSignatureProvider(),
            resource_name,
            {
                "repository": repository,
                "digest": digest,
                "signature": signature,
                "bundle_signature": bundle_signature,
                "signature_digest": None,
                "bundle_digest": None,
            },
            opts,
        )
