"""Keys and signatures, checked with the cryptography library alone."""

from __future__ import annotations

import base64
import json

import nacl.secret
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pulumi.runtime.rpc import UNKNOWN

from components.providers import signature

REPOSITORY = "127.0.0.1:5000/p/r/app"
DIGEST = "sha256:" + "ab" * 32


def public(pem: str) -> ec.EllipticCurvePublicKey:
    """Read a public key."""
    key = serialization.load_pem_public_key(pem.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def encrypted_as_cosign_does(pem: str, password: str) -> str:
    """Encrypt a key as `cosign generate-key-pair` does, with a cost that a test can pay."""
    der = serialization.load_pem_private_key(pem.encode(), None).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    salt, nonce = b"s" * 32, b"n" * 24
    key = Scrypt(salt=salt, length=32, n=1024, r=8, p=1).derive(password.encode())
    box = nacl.secret.SecretBox(key).encrypt(der, nonce).ciphertext
    document = {
        "kdf": {
            "name": "scrypt",
            "params": {"N": 1024, "r": 8, "p": 1},
            "salt": base64.b64encode(salt).decode(),
        },
        "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
        "ciphertext": base64.b64encode(box).decode(),
    }
    body = base64.b64encode(json.dumps(document).encode()).decode()
    label = "ENCRYPTED SIGSTORE PRIVATE KEY"
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"


def test_a_signature_is_valid_for_its_payload_and_key_and_for_nothing_else() -> None:
    pair, other = signature.generate_key(), signature.generate_key()
    signed = signature.sign(pair.private_key, REPOSITORY, DIGEST)
    raw = base64.b64decode(signed.signature)
    public(pair.public_key).verify(raw, signed.payload.encode(), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        public(other.public_key).verify(raw, signed.payload.encode(), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        public(pair.public_key).verify(raw, signed.payload.encode() + b" ", ec.ECDSA(hashes.SHA256()))


def test_the_payload_is_cosign_s_simple_signing_document() -> None:
    critical = json.loads(signature.payload(REPOSITORY, DIGEST))["critical"]
    assert critical == {
        "identity": {"docker-reference": REPOSITORY},
        "image": {"docker-manifest-digest": DIGEST},
        "type": "cosign container image signature",
    }


def test_signing_twice_is_signing_once() -> None:
    key = signature.generate_key().private_key
    assert signature.sign(key, REPOSITORY, DIGEST) == signature.sign(key, REPOSITORY, DIGEST)


def test_a_given_key_is_read_plain_encrypted_and_in_cosign_s_form() -> None:
    pair = signature.generate_key()
    key = serialization.load_pem_private_key(pair.private_key.encode(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    ).decode()
    assert signature.read_key(pair.private_key) == pair
    assert signature.read_key(encrypted, "secret") == pair
    assert signature.read_key(encrypted_as_cosign_does(pair.private_key, "secret"), "secret") == pair
    for wrong in (encrypted, encrypted_as_cosign_does(pair.private_key, "secret")):
        with pytest.raises(signature.SignatureError, match="cannot be read"):
            signature.read_key(wrong, "wrong")


def test_a_key_of_another_kind_is_refused() -> None:
    keys = (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048))
    for key in keys:
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        with pytest.raises(signature.SignatureError, match="ECDSA P-256"):
            signature.read_key(pem)


def test_a_key_is_generated_once_and_another_given_key_replaces_it() -> None:
    provider = signature.SigningKeyProvider()
    made = provider.create({})
    assert made.outs is not None
    assert provider.diff(made.id, made.outs, {}).changes is False
    given = {"given": signature.generate_key().private_key}
    assert provider.diff(made.id, made.outs, given).replaces == ["given"]
    assert provider.create(given).outs == {**given, **vars(signature.read_key(given["given"]))}


def test_check_refuses_a_bad_key_without_showing_it() -> None:
    result = signature.SigningKeyProvider().check({}, {"given": "-----BEGIN PRIVATE KEY-----\nsecret\n"})
    assert len(result.failures) == 1
    assert "secret" not in result.failures[0].reason


PROPS = {"repository": REPOSITORY, "digest": DIGEST}


def test_only_a_digest_is_signed() -> None:
    provider, key = signature.SignatureProvider(), signature.generate_key().private_key
    props = {**PROPS, "private_key": key}
    assert provider.check({}, {**props, "digest": "latest"}).failures
    assert not provider.check({}, props).failures
    assert not provider.check({}, {**props, "digest": UNKNOWN}).failures


def test_a_preview_that_knows_key_and_digest_knows_what_is_signed() -> None:
    provider, key = signature.SignatureProvider(), signature.generate_key().private_key
    props = {**PROPS, "private_key": key}
    checked = provider.check({}, props).inputs
    assert checked == {**props, **signature.sign(key, REPOSITORY, DIGEST).outputs()}
    assert provider.create(checked).outs == checked
    assert provider.diff("id", checked, provider.check(checked, props).inputs).changes is False
    for unknown in props:
        told = provider.check(checked, {**props, unknown: UNKNOWN}).inputs
        assert (told["signature"], told["bundle_signature"]) == (UNKNOWN, UNKNOWN)
