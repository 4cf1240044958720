"""Pushes artifacts and their signatures in cosign's formats to an OCI registry, with the oras package.

Everything pushed is a function of the file's bytes: a push that was interrupted, or is repeated, ends the
same. Credentials are looked up when a request is made and are in no input, output or state.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import pulumi
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
    Artifact,
    Kind,
    artifact,
    attestation_artifact,
    attestation_tag,
    bundle_artifact,
    signature_artifact,
    signature_tag,
)
from components.providers.cache import read_built
from components.providers.referrers import Referrers, client_of, subject_descriptor
from components.providers.signature import bundle as signed_bundle
from components.providers.signature import payload as signed_document
from components.providers.signature import statement

REPOSITORY = re.compile(r"[^/\s]+(/[a-z0-9]+([._-]+[a-z0-9]+)*)+")


def push(repository: str, kind: Kind, sha256: str, annotations: dict[str, str] | None = None) -> str:
    """Push a built file as an artifact, under a tag made of its own sum; give the manifest's digest."""
    made = artifact(kind, read_built(sha256), annotations)
    return client_of(repository).push_artifact(made, tag_for(sha256))


def tag_for(sha256: str) -> str:
    """Give the tag of a file: short, and never moved to another file."""
    return sha256[:12]


def push_signature(repository: str, digest: str, payload: str, signature: str) -> str:
    """Push the signature of an image to where cosign 2 looks for it; give the signature manifest's digest."""
    return client_of(repository).push_artifact(signature_artifact(payload, signature), signature_tag(digest))


def push_bundle(repository: str, digest: str, bundle: str, predicate_type: str = COSIGN_SIGN) -> str:
    """Push a Sigstore bundle as a referrer of an image in the registry; give the bundle manifest's digest."""
    client = client_of(repository)
    made = bundle_artifact(bundle, subject_descriptor(client, digest), predicate_type)
    return Referrers(client, digest).push(made)


def push_attestations(repository: str, digest: str, envelopes: dict[str, bytes]) -> str:
    """Push attestations to where cosign 2 looks for them; give the digest of their manifest."""
    return client_of(repository).push_artifact(attestation_artifact(envelopes), attestation_tag(digest))


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
        there = client_of(props["repository"]).holds(props["digest"], tag_for(props["sha256"]))
        return ReadResult(id_, props) if there else gone()

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove tag and manifest, unless another resource has the same."""
        if not NEEDED.has(props["repository"], props["digest"]):
            client_of(props["repository"]).delete_artifact(props["digest"], tag_for(props["sha256"]))


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
    repository, digest, client = props["repository"], props["digest"], client_of(props["repository"])
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
        client, digest = client_of(props["repository"]), props["digest"]
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
