"""The private halves of Cloud KMS's key versions: each a file of its own that its owner alone can read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from localcloud.home import Home, write_private
from localcloud.specs import BackendError


def generate(home: Home, version: str) -> None:
    """Make the ECDSA P-256 key of a version."""
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(_path(home, version), pem)


def public_key(home: Home, version: str) -> str:
    """The public key of a version, PEM.

    Raises:
        BackendError: its file is gone.
    """
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return _key(home, version).public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def sign(home: Home, version: str, digest: bytes) -> bytes:
    """An ECDSA signature (ASN.1 DER) of a SHA-256 digest.

    Raises:
        BackendError: the file of the version's key is gone.
    """
    return _key(home, version).sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


def _key(home: Home, version: str) -> ec.EllipticCurvePrivateKey:
    path = _path(home, version)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise BackendError(f"the key of {version} is gone: there is no {path}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{path} is not an EC key")
    return key


def _path(home: Home, version: str) -> Path:
    return home.keys / f"kms-{hashlib.sha256(version.encode()).hexdigest()[:32]}.pem"
