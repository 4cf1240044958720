"""What is attested of an image: SLSA provenance and an SBOM, signed, in both of cosign's formats.

An attestation says how these bytes came to be. It is made when they are, and again with another key; sources
that give the same bytes need no new one.
Sources: cosign's `specs/ATTESTATION_SPEC.md` and its `WriteAttestationNewBundleFormat`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pulumi
from pulumi.dynamic import CheckResult, CreateResult, DiffResult, ReadResult, ResourceProvider, UpdateResult

from components.providers import ProviderError, cargo, changed, gone, oci, operation, origin
from components.providers.artifacts import attestation_tag, canonical
from components.providers.referrers import Referrers, client_of
from components.providers.signature import SigningKey, bundle, envelope, key_of, sign_statement, statement


class AttestationError(ProviderError):
    """What is to be attested is not what was pushed."""


def _predicates(props: dict[str, Any]) -> dict[str, bytes]:
    job = cargo.job_for(Path(props["crate"]), props["target"], props["profile"])
    built = job.built()
    if built.sha256 != props["sha256"]:
        raise AttestationError(f"{props['crate']} was changed while it was pushed: run `pulumi up` again")
    return origin.predicates(job, built)


def push(repository: str, digest: str, predicates: dict[str, bytes], key: str) -> dict[str, Any]:
    """Sign predicates about an image, by their types, and push them; give the manifests' digests."""
    bodies = {kind: statement(digest, kind, predicate) for kind, predicate in sorted(predicates.items())}
    signed = {kind: sign_statement(key, body) for kind, body in bodies.items()}
    envelopes = {kind: canonical(envelope(body, signed[kind])) for kind, body in bodies.items()}
    pushed: dict[str, Any] = {
        "attestation_digest": oci.push_attestations(repository, digest, envelopes),
        "bundle_digests": [
            oci.push_bundle(repository, digest, bundle(body, signed[kind]), kind)
            for kind, body in bodies.items()
        ],
    }
    _keep({"repository": repository, **pushed})
    return pushed


def _keep(props: dict[str, Any]) -> None:
    for made in (props["attestation_digest"], *props["bundle_digests"]):
        oci.NEEDED.keep(props["repository"], made)


def _remove(props: dict[str, Any]) -> None:
    """Remove what no resource of the new state stands for."""
    repository, digest, client = props["repository"], props["digest"], client_of(props["repository"])
    if not oci.NEEDED.has(repository, props["attestation_digest"]):
        client.delete_artifact(props["attestation_digest"], attestation_tag(digest))
    for made in props["bundle_digests"]:
        if not oci.NEEDED.has(repository, made):
            Referrers(client, digest).remove(made)


class OciAttestationProvider(ResourceProvider):
    """CRUD of an image's attestations in a registry."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Check the repository's name."""
        return oci.check_repository(news)

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Other bytes have another origin; another key signs what is attested anew."""
        result = changed(olds, news, replace={"repository", "digest"}, update={"private_key", "kms_key"})
        if not result.changes:
            _keep(olds)
        return result

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Say of what the image was made, sign that and push it."""
        pushed = push(props["repository"], props["digest"], _predicates(props), key_of(props))
        tag = attestation_tag(props["digest"])
        return CreateResult(f"{props['repository']}:{tag}", {**props, **pushed})

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Look whether all are where they are looked for; a registry that is away is an error."""
        client, digest = client_of(props["repository"]), props["digest"]
        referrers = Referrers(client, digest)
        there = client.holds(props["attestation_digest"], attestation_tag(digest))
        there = there and all(referrers.has(made) for made in props["bundle_digests"])
        return ReadResult(id_, props) if there else gone()

    @operation
    def update(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Push the new ones, then remove the old ones."""
        pushed = push(news["repository"], news["digest"], _predicates(news), key_of(news))
        _remove(olds)
        return UpdateResult({**news, **pushed})

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove all, unless another resource has the same."""
        _remove(props)


class OciAttestation(pulumi.dynamic.Resource, module="oci", name="Attestation"):
    """An image's attestations in a registry."""

    attestation_digest: pulumi.Output[str]
    bundle_digests: pulumi.Output[list[str]]

    def __init__(
        self,
        resource_name: str,
        *,
        repository: pulumi.Input[str],
        digest: pulumi.Input[str],
        build: cargo.CargoBuild,
        key: SigningKey,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Attest of what `repository`@`digest` was made (`build`), signed with `key`."""
        super().__init__(
            OciAttestationProvider(),
            resource_name,
            {
                "repository": repository,
                "digest": digest,
                "crate": build.crate,
                "target": build.target,
                "profile": build.profile,
                "sha256": build.sha256,
                **key.inputs(),
                "attestation_digest": None,
                "bundle_digests": None,
            },
            opts,
        )
