"""What lies in the registry, as bytes: manifests and blobs of an app, of the node agent and of a signature.

Everything here is a function of the file's bytes: a digest is known before anything is pushed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from components.providers import Lazy, ProviderError

if TYPE_CHECKING:
    import wasmtime
    from wasmtime import component
else:
    wasmtime, component = Lazy("wasmtime"), Lazy("wasmtime.component")

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
WASM_CONFIG = "application/vnd.wasm.config.v0+json"
WASM_LAYER = "application/wasm"
EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"
AGENT_ARTIFACT = "application/vnd.krustlet.agent.v1"
AGENT_LAYER = "application/vnd.krustlet.agent.v1.binary"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
# Readers want a time (wkg does), and the same component has the same digest at any.
CREATED = "1970-01-01T00:00:00Z"
DSSE_ENVELOPE = "application/vnd.dsse.envelope.v1+json"
COSIGN_SIGN = "https://sigstore.dev/cosign/sign/v1"

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


@functools.lru_cache(maxsize=4)
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
    config: Blob,
    layers: list[dict[str, Any]],
    blobs: list[Blob],
    artifact_type: str | None = None,
    **more: Any,
) -> Artifact:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(),
        "layers": layers,
        **more,
    }
    if artifact_type:
        document["artifactType"] = artifact_type
    return Artifact(Blob(MANIFEST, canonical(document)), (config, *blobs))


def wasm_artifact(wasm: bytes, annotations: dict[str, str] | None = None) -> Artifact:
    """Lay a component out as CNCF's Wasm OCI artifact. Nothing of the clock, the host or a path is in it.

    The commit is not among its annotations either: one that leaves the bytes as they are leaves the pods too.
    """
    layer = Blob(WASM_LAYER, wasm)
    described = interface(wasm)
    config = {
        "architecture": "wasm",
        "os": "wasip2",
        "created": CREATED,
        "layerDigests": [layer.digest],
        "component": {
            "exports": list(described.exports),
            "imports": list(described.imports),
            "target": described.target,
        },
    }
    more: dict[str, Any] = {"annotations": annotations} if annotations else {}
    return _manifest(Blob(WASM_CONFIG, canonical(config)), [layer.descriptor()], [layer], **more)


def agent_artifact(binary: bytes) -> Artifact:
    """Lay the node agent out as an artifact of its own type; the layer's digest is the file's sha256."""
    layer = Blob(AGENT_LAYER, binary)
    return _manifest(Blob(EMPTY_CONFIG, b"{}"), [layer.descriptor()], [layer], AGENT_ARTIFACT)


def signature_artifact(payload: str, signature: str) -> Artifact:
    """Lay a signature out as cosign does: one layer, the payload, with the signature as an annotation."""
    return _cosign_image([(Blob(SIMPLE_SIGNING, payload.encode()), {SIGNATURE_ANNOTATION: signature})])


def attestation_artifact(envelopes: dict[str, bytes]) -> Artifact:
    """Lay attestations out as cosign 2 does: a layer for each DSSE envelope, by its predicate's type."""
    return _cosign_image(
        [
            (Blob(DSSE_ENVELOPE, envelope), {SIGNATURE_ANNOTATION: "", "predicateType": kind})
            for kind, envelope in sorted(envelopes.items())
        ]
    )


def _cosign_image(layers: list[tuple[Blob, dict[str, str]]]) -> Artifact:
    config = {
        "architecture": "",
        "config": {},
        "os": "",
        "rootfs": {"diff_ids": [layer.digest for layer, _ in layers], "type": "layers"},
    }
    described = [layer.descriptor(annotations) for layer, annotations in layers]
    return _manifest(Blob(IMAGE_CONFIG, canonical(config)), described, [layer for layer, _ in layers])


def bundle_artifact(bundle: str, subject: dict[str, Any], predicate_type: str = COSIGN_SIGN) -> Artifact:
    """Lay a Sigstore bundle out as cosign 3 does, but for the time: a referrer of what is described."""
    layer = Blob(BUNDLE, bundle.encode())
    annotations = {
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": predicate_type,
    }
    return _manifest(
        Blob(EMPTY_CONFIG, b"{}"),
        [layer.descriptor()],
        [layer],
        BUNDLE,
        subject=subject,
        annotations=annotations,
    )


def signature_tag(digest: str) -> str:
    """Give the tag at which cosign looks for the signature of an image."""
    return f"{digest.replace(':', '-')}.sig"


def attestation_tag(digest: str) -> str:
    """Give the tag at which cosign 2 looks for the attestations of an image."""
    return f"{digest.replace(':', '-')}.att"


def artifact(kind: Kind, content: bytes, annotations: dict[str, str] | None = None) -> Artifact:
    """Lay a built file out as what it is."""
    return wasm_artifact(content, annotations) if kind == "wasm" else agent_artifact(content)
