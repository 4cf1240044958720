"""WasmArtifact and AgentArtifact: a crate, built, pushed by digest, signed and attested."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi

from components.providers.attestation import OciAttestation
from components.providers.cargo import CargoBuild
from components.providers.compiler import WASM_TARGET
from components.providers.oci import OciArtifact, OciSignature
from components.providers.signature import Signature, SigningKey


@dataclass(frozen=True)
class WasmArtifactArgs:
    """`repository` is HOST[:PORT]/PATH; what is in it ends with `lifetime`: nobody has to delete it first."""

    crate: str
    repository: pulumi.Input[str]
    lifetime: pulumi.Resource
    key: SigningKey


@dataclass(frozen=True)
class AgentArtifactArgs:
    """`target` is a Rust target, "" for this machine's; `repository` and `lifetime` as the app's.

    `key` signs it, as it signs the app.
    """

    crate: str
    repository: pulumi.Input[str]
    lifetime: pulumi.Resource
    key: SigningKey
    target: str = ""


class WasmArtifact(pulumi.ComponentResource):
    """A WebAssembly component: compiled, pushed, signed and attested."""

    image: pulumi.Output[str]
    """REPOSITORY@DIGEST, known before it is pushed."""
    signed: pulumi.Resource
    """What a pod waits for: without its signature in the registry the node would refuse the image."""
    size: pulumi.Output[int]
    """Bytes of the component."""

    def __init__(self, name: str, args: WasmArtifactArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("awesome-wasm:artifact:WasmArtifact", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        stored = pulumi.ResourceOptions(parent=self, deleted_with=args.lifetime)
        build = CargoBuild(f"{name}-build", args.crate, WASM_TARGET, opts=child)
        artifact = OciArtifact(
            f"{name}-push",
            repository=args.repository,
            kind="wasm",
            sha256=build.sha256,
            annotations=build.annotations,
            # What cannot be signed is not pushed.
            opts=pulumi.ResourceOptions.merge(stored, pulumi.ResourceOptions(depends_on=[args.key])),
        )
        self.signed = _signed(self, name, args, (build, artifact))
        self.image = artifact.image
        self.size = build.size
        self.register_outputs({"image": self.image, "size": self.size})


class AgentArtifact(pulumi.ComponentResource):
    """The node agent: compiled, pushed, signed and attested. A VM fetches it by digest and checks all."""

    image: pulumi.Output[str]
    """REPOSITORY@DIGEST, known before it is pushed."""
    signed: pulumi.Resource
    """What a VM waits for."""
    sha256: pulumi.Output[str]
    """Sum of the binary, hex."""

    def __init__(
        self, name: str, args: AgentArtifactArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("awesome-wasm:artifact:AgentArtifact", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        stored = pulumi.ResourceOptions(parent=self, deleted_with=args.lifetime)
        build = CargoBuild(f"{name}-build", args.crate, args.target, opts=child)
        artifact = OciArtifact(
            f"{name}-push",
            repository=args.repository,
            kind="agent",
            sha256=build.sha256,
            opts=pulumi.ResourceOptions.merge(stored, pulumi.ResourceOptions(depends_on=[args.key])),
        )
        self.image = artifact.image
        self.signed = _signed(self, name, args, (build, artifact))
        self.sha256 = build.sha256
        self.register_outputs({"image": self.image, "sha256": self.sha256})


def _signed(
    parent: pulumi.Resource,
    name: str,
    args: WasmArtifactArgs | AgentArtifactArgs,
    pushed: tuple[CargoBuild, OciArtifact],
) -> pulumi.Resource:
    """Sign and attest what was built and pushed; give what is there once its signatures are."""
    build, artifact = pushed
    stored = pulumi.ResourceOptions(parent=parent, deleted_with=args.lifetime)
    signature = Signature(
        f"{name}-signature",
        args.repository,
        artifact.digest,
        args.key,
        opts=pulumi.ResourceOptions(parent=parent),
    )
    OciAttestation(
        f"{name}-attestation",
        repository=args.repository,
        digest=artifact.digest,
        build=build,
        key=args.key,
        opts=stored,
    )
    return OciSignature(
        f"{name}-signature-push",
        repository=args.repository,
        digest=artifact.digest,
        signature=signature.signature,
        bundle_signature=signature.bundle_signature,
        opts=stored,
    )
