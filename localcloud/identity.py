"""OpenID identity tokens of service accounts, as Google signs them, and the keys to check them with."""

from __future__ import annotations

import base64
import hashlib
import json
import time

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from localcloud.home import Home
from localcloud.store import Json
from localcloud.tokens import made_once

ISSUER = "https://accounts.google.com"
_SECONDS = 3600


def mint_identity_token(home: Home, claims: Json) -> str:
    """A JWT (RS256) with these claims, of Google's issuer, for one hour."""
    now = int(time.time())
    header = {"alg": "RS256", "kid": _key_id(home), "typ": "JWT"}
    payload = claims | {"iss": ISSUER, "iat": now, "exp": now + _SECONDS}
    signed = ".".join(_encode(json.dumps(part).encode()) for part in (header, payload))
    signature = _key(home).sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{signed}.{_encode(signature)}"


def certificates(home: Home) -> Json:
    """The JWKS that Google has at https://www.googleapis.com/oauth2/v3/certs."""
    public = _key(home).public_key().public_numbers()
    key = {
        "kty": "RSA",
        "use": "sig",
        "alg": "RS256",
        "kid": _key_id(home),
        "n": _encode(public.n.to_bytes((public.n.bit_length() + 7) // 8, "big")),
        "e": _encode(public.e.to_bytes(3, "big")),
    }
    return {"keys": [key]}


def _key_id(home: Home) -> str:
    der = (
        _key(home)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return hashlib.sha256(der).hexdigest()[:40]


def _key(home: Home) -> rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key(made_once(home, "identity.pem", _new_key), password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError(f"{home.keys / 'identity.pem'} is not an RSA key")
    return key


def _new_key() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
