"""The signing key and signatures in cosign's formats, so that `cosign verify --key` accepts what is pushed.

Sources: cosign's `specs/SIGNATURE_SPEC.md` (payload, tag, annotation), its `signDigestBundle` (statement and
bundle of cosign 3) and `pkg/cosign/keys.go` (encrypted keys), and DSSE's `protocol.md` (what is signed).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

import nacl.exceptions
import nacl.secret
import pulumi
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
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

from components.providers import ProviderError, changed, is_unknown, operation
from components.providers.artifacts import BUNDLE, COSIGN_SIGN, canonical
from components.providers.kms import KmsKey, is_reference

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
IN_TOTO = "application/vnd.in-toto+json"
COSIGN_LABELS = ("ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY")


class SignatureError(ProviderError):
    """A key cannot be read or is of the wrong kind."""


@dataclass(frozen=True)
class KeyPair:
    """An ECDSA P-256 key: PKCS#8 and SubjectPublicKeyInfo, both PEM."""

    private_key: str
    public_key: str


@dataclass(frozen=True)
class Signed:
    """An image's signatures in both of cosign's formats (ASN.1 DER in base64, as cosign writes them).

    `signature` is over `payload`, exactly as it stands; `bundle_signature` is for a Sigstore bundle.
    """

    payload: str
    signature: str
    bundle_signature: str

    def outputs(self) -> dict[str, str]:
        """Give what a state keeps: payload and bundle are functions of the image's name."""
        return {"signature": self.signature, "bundle_signature": self.bundle_signature}


def generate_key() -> KeyPair:
    """Make a new key."""
    return _pair(ec.generate_private_key(ec.SECP256R1()))


def read_key(pem: str, password: str = "") -> KeyPair:
    """Read a private key: PKCS#8 or SEC1 PEM, plain or encrypted, or what `cosign generate-key-pair` writes.

    Raises SignatureError when it cannot be read with this password or is no ECDSA P-256 key.
    """
    secret = password.encode() or None
    try:
        if any(label in pem for label in COSIGN_LABELS):
            key = serialization.load_der_private_key(_decrypt_cosign(pem, password), None)
        else:
            key = serialization.load_pem_private_key(pem.encode(), secret)
    except (ValueError, TypeError, KeyError, UnsupportedAlgorithm, nacl.exceptions.CryptoError):
        # The library's own words may quote the key.
        raise SignatureError(
            "a PEM private key (PKCS#8, SEC1 or cosign's form) and, if it is encrypted, its password; "
            "this one cannot be read"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SignatureError("an ECDSA P-256 key, the kind that cosign makes; this one is another kind")
    return _pair(key)


def _decrypt_cosign(pem: str, password: str) -> bytes:
    body = "".join(line for line in pem.strip().splitlines() if not line.startswith("-----"))
    box = json.loads(base64.b64decode(body))
    if (box["kdf"]["name"], box["cipher"]["name"]) != ("scrypt", "nacl/secretbox"):
        raise ValueError("unknown cipher")
    cost = box["kdf"]["params"]
    salt = base64.b64decode(box["kdf"]["salt"])
    key = Scrypt(salt=salt, length=32, n=cost["N"], r=cost["r"], p=cost["p"]).derive(password.encode())
    nonce = base64.b64decode(box["cipher"]["nonce"])
    return nacl.secret.SecretBox(key).decrypt(base64.b64decode(box["ciphertext"]), nonce)


def _pair(key: ec.EllipticCurvePrivateKey) -> KeyPair:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return KeyPair(private.decode(), public.decode())


def payload(repository: str, digest: str) -> str:
    """Give the simple-signing document for an image; the same image gives the same bytes."""
    document = {
        "critical": {
            "identity": {"docker-reference": repository},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    return json.dumps(document, separators=(",", ":"), sort_keys=True)


def statement(digest: str, predicate_type: str = COSIGN_SIGN, predicate: bytes = b"{}") -> bytes:
    """Give the in-toto statement about an image; without a predicate it is cosign 3's signature."""
    document = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicateType": predicate_type,
        "predicate": json.loads(predicate),
    }
    return canonical(document)


def pre_authentication_encoding(payload_type: str, body: bytes) -> bytes:
    """Give what DSSE signs of an envelope."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(body), body)


class Signer(Protocol):
    """What signs: a key that is at hand, or one that is kept elsewhere."""

    def sign(self, message: bytes) -> str:
        """Sign the message's SHA-256 with ECDSA: ASN.1 DER in base64."""
        ...


@dataclass(frozen=True)
class LocalKey:
    """A private key, PEM."""

    private_key: str

    def sign(self, message: bytes) -> str:
        """Sign; the nonce is derived from key and message (RFC 6979): signing twice is signing once."""
        key = serialization.load_pem_private_key(self.private_key.encode(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SignatureError("the signing key is no ECDSA key")
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        return base64.b64encode(key.sign(message, algorithm)).decode()


def signer(key: str) -> Signer:
    """Give what signs with a key: a private one (PEM), or the reference of one in Cloud KMS (`gcpkms://…`)."""
    return KmsKey(key) if is_reference(key) else LocalKey(key)


def sign_statement(key: str, body: bytes) -> str:
    """Sign an in-toto statement for its DSSE envelope."""
    return signer(key).sign(pre_authentication_encoding(IN_TOTO, body))


def sign(key: str, repository: str, digest: str) -> Signed:
    """Sign an image."""
    document = payload(repository, digest)
    return Signed(
        document,
        signer(key).sign(document.encode()),
        sign_statement(key, statement(digest)),
    )


def key_of(props: dict[str, Any]) -> str:
    """Give the key among a resource's inputs."""
    key: str = props.get("kms_key") or props["private_key"]
    return key


def envelope(body: bytes, signature: str) -> dict[str, Any]:
    """Give the DSSE envelope of a statement and its signature."""
    return {
        "payload": base64.b64encode(body).decode(),
        "payloadType": IN_TOTO,
        "signatures": [{"sig": signature}],
    }


def bundle(body: bytes, signature: str) -> str:
    """Give the Sigstore bundle of a statement; the same statement and signature give the same bytes.

    It hints at no key: who verifies has the key, and a hint proves nothing.
    """
    document = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {}},
        "dsseEnvelope": envelope(body, signature),
    }
    return canonical(document).decode()


def key_id(public_key: str) -> str:
    """Give a short name for a public key: the start of the sha256 of its DER form."""
    der = serialization.load_pem_public_key(public_key.encode()).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()[:16]


class SigningKeyProvider(ResourceProvider):
    """CRUD of the key: generated once and kept in the state, read from what the user gave, or in Cloud KMS.

    Of a key in Cloud KMS there is the public half alone, which each preview asks for: a version that does not
    sign any more is an error before anything is pushed.
    """

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Refuse a key that cannot be used, before anything is signed with it."""
        if reference := news.get("kms_key"):
            try:
                return CheckResult({**news, "public_key": KmsKey(reference).public_key()}, [])
            except ProviderError as error:
                return CheckResult(news, [CheckFailure("kms_key", str(error))])
        given = news.get("given") or ""
        if given and not is_unknown(given) and not is_unknown(news.get("password")):
            try:
                read_key(given, news.get("password") or "")
            except SignatureError as error:
                return CheckResult(news, [CheckFailure("given", str(error))])
        return CheckResult(news, [])

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Another given key is another key; another password for the same key is not."""
        differs = [key for key in ("given", "kms_key") if (olds.get(key) or "") != (news.get(key) or "")]
        return DiffResult(changes=bool(differs), replaces=differs)

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Generate or read the key, or take what the check was told of the one in Cloud KMS."""
        if props.get("kms_key"):
            return CreateResult(key_id(props["public_key"]), props)
        given = props.get("given") or ""
        pair = read_key(given, props.get("password") or "") if given else generate_key()
        outputs = {**props, "private_key": pair.private_key, "public_key": pair.public_key}
        return CreateResult(key_id(pair.public_key), outputs)

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Nothing outside of the state can change it."""
        return ReadResult(id_, props)


class SigningKey(pulumi.dynamic.Resource, module="signature", name="Key"):
    """An ECDSA P-256 key; `private_key` is a secret, and there is none of a key in Cloud KMS."""

    private_key: pulumi.Output[str]
    public_key: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        given: pulumi.Input[str] | None = None,
        password: pulumi.Input[str] | None = None,
        kms_key: str | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Use the key version in Cloud KMS, the `given` PEM private key, or generate one."""
        secrets = pulumi.ResourceOptions(additional_secret_outputs=["private_key", "given", "password"])
        super().__init__(
            SigningKeyProvider(),
            resource_name,
            {
                "given": None if given is None else pulumi.Output.secret(given),
                "password": None if password is None else pulumi.Output.secret(password),
                "kms_key": kms_key,
                "private_key": None,
                "public_key": None,
            },
            pulumi.ResourceOptions.merge(opts, secrets),
        )
        self._kms_key = kms_key

    def inputs(self) -> dict[str, pulumi.Input[str]]:
        """Give what a resource that signs with it is told."""
        if self._kms_key:
            return {"kms_key": self._kms_key}
        return {"private_key": pulumi.Output.secret(self.private_key)}


def _signed(props: dict[str, Any]) -> dict[str, Any]:
    if props.get("kms_key"):
        return {**props, **sign(key_of(props), props["repository"], props["digest"]).outputs()}
    return props


class SignatureProvider(ResourceProvider):
    """CRUD of one signature: a value, computed from key and digest, or what Cloud KMS gave for them."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Only a digest can be signed: a tag may point elsewhere tomorrow.

        The signatures are a function of image and private key: a preview which knows these knows them.
        Cloud KMS signs differently each time, and is asked when the signature is made.
        """
        digest = news["digest"]
        if not is_unknown(digest) and not DIGEST.fullmatch(digest):
            return CheckResult(news, [CheckFailure("digest", f"{digest} is no sha256 digest")])
        if news.get("kms_key"):
            return CheckResult(news, [])
        if any(is_unknown(news[key]) for key in ("repository", "digest", "private_key")):
            return CheckResult({**news, "signature": UNKNOWN, "bundle_signature": UNKNOWN}, [])
        signed = sign(news["private_key"], news["repository"], digest)
        return CheckResult({**news, **signed.outputs()}, [])

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Another image or another key is another signature; an older program's has no bundle yet."""
        replace = {"repository", "digest", "private_key", "kms_key"}
        result = changed(olds, news, replace=replace, update=set())
        return result if result.changes or olds.get("bundle_signature") else DiffResult(changes=True)

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Take what the check has signed, or have it signed."""
        return CreateResult(props["digest"], _signed(props))

    @operation
    def update(self, _id: str, _olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Sign again what an older program signed in one format; every input that matters is replaced."""
        return UpdateResult(_signed(news))

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Nothing outside of the state can change it."""
        return ReadResult(id_, props)


class Signature(pulumi.dynamic.Resource, module="signature", name="Signature"):
    """The signatures of an image by digest; what is signed (`payload`, `bundle`) follows from its name."""

    signature: pulumi.Output[str]
    bundle_signature: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        repository: pulumi.Input[str],
        digest: pulumi.Input[str],
        key: SigningKey,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Sign `repository`@`digest`."""
        super().__init__(
            SignatureProvider(),
            resource_name,
            {
                "repository": repository,
                "digest": digest,
                **key.inputs(),
                "signature": None,
                "bundle_signature": None,
            },
            opts,
        )
