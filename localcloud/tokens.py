"""Every token that localcloud gives out or accepts.

- the developer's access token: in config.json, made at the first start;
- service accounts' access tokens: signed with a key of this home, so that a metadata server mints one without
  writing to the store; they live one hour, as Google's do;
- registry tokens: ES256 JWTs of the distribution token specification, checked by the registry with our JWKS;
- the secret path under which the Kubernetes API servers ask for TokenReviews.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from localcloud.home import Home, write_private

ACCESS_TOKEN_SECONDS = 3600
REGISTRY_TOKEN_SECONDS = 300
REGISTRY_SERVICE = "localcloud-registry"
REGISTRY_ISSUER = "localcloud"
_PREFIX = "ya29.lc-"


@dataclass(frozen=True)
class AccessToken:
    """A minted token. `expires_at` is in seconds since 1970."""

    value: str
    email: str
    scopes: tuple[str, ...]
    expires_at: int

    @property
    def expires_in(self) -> int:
        return max(0, self.expires_at - int(time.time()))


@dataclass(frozen=True)
class RegistryAuth:
    """The `auth.token` section of the registry's configuration. `jwks_path` is a JWKS file for its `jwks`."""

    realm: str
    service: str
    issuer: str
    jwks_path: Path


@dataclass(frozen=True)
class RegistryAccess:
    """One granted scope: `name` is the repository, `actions` like `pull`, `push`, `delete`."""

    name: str
    actions: tuple[str, ...]
    type: str = "repository"


def mint_access_token(
    home: Home, email: str, scopes: Sequence[str], lifetime: int = ACCESS_TOKEN_SECONDS
) -> AccessToken:
    """A new access token for a service account. Its holder is checked at each use."""
    expires_at = int(time.time()) + lifetime
    claims = {"email": email, "scopes": list(scopes), "exp": expires_at, "jti": secrets.token_hex(8)}
    payload = _encode(json.dumps(claims).encode())
    value = f"{_PREFIX}{payload}.{_encode(_mac(home, payload))}"
    return AccessToken(value, email, tuple(scopes), expires_at)


def read_access_token(home: Home, value: str) -> AccessToken | None:
    """The token if this home minted it and it has not expired."""
    payload, _, signature = value.removeprefix(_PREFIX).partition(".")
    if not value.startswith(_PREFIX):
        return None
    if not hmac.compare_digest(signature.encode(), _encode(_mac(home, payload)).encode()):
        return None
    claims = json.loads(_decode(payload))
    if claims["exp"] <= time.time():
        return None
    return AccessToken(value, claims["email"], tuple(claims["scopes"]), claims["exp"])


def is_developer_token(home: Home, value: str) -> bool:
    return hmac.compare_digest(value.encode(), home.require_config().token.encode())


def registry_auth(home: Home) -> RegistryAuth:
    """What the registry must be configured with; makes the signing key if there is none yet."""
    public = _registry_key(home).public_key().public_numbers()
    key = {
        "kty": "EC",
        "crv": "P-256",
        "use": "sig",
        "alg": "ES256",
        "kid": _key_id(home),
        "x": _encode(public.x.to_bytes(32, "big")),
        "y": _encode(public.y.to_bytes(32, "big")),
    }
    path = home.keys / "registry-jwks.json"
    content = json.dumps({"keys": [key]})
    if not path.exists() or path.read_text() != content:
        write_private(path, content)
    # By name: some clients (crane, cosign) follow no challenge to a private address of another port.
    realm = f"http://localhost:{home.require_config().port}/v2/token"
    return RegistryAuth(realm, REGISTRY_SERVICE, REGISTRY_ISSUER, path)


def mint_registry_token(home: Home, subject: str, access: Sequence[RegistryAccess]) -> str:
    """A JWT with which the registry lets `subject` do what `access` lists."""
    now = int(time.time())
    claims = {
        "iss": REGISTRY_ISSUER,
        "sub": subject,
        "aud": REGISTRY_SERVICE,
        "iat": now,
        "nbf": now - 5,
        "exp": now + REGISTRY_TOKEN_SECONDS,
        "jti": secrets.token_hex(16),
        "access": [{"type": item.type, "name": item.name, "actions": list(item.actions)} for item in access],
    }
    header = {"typ": "JWT", "alg": "ES256", "kid": _key_id(home)}
    signed = f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"
    r, s = decode_dss_signature(_registry_key(home).sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def webhook_secret(home: Home) -> str:
    """The part of the TokenReview path that only this home's API servers know."""
    return hmac.new(_secret(home), b"kubernetes token webhook", hashlib.sha256).hexdigest()


def webhook_url(home: Home) -> str:
    """Where a cluster's API server sends TokenReviews."""
    return f"{home.require_config().url}/kubernetes/tokenreview/{webhook_secret(home)}"


def _mac(home: Home, payload: str) -> bytes:
    return hmac.new(_secret(home), b"access token:" + payload.encode(), hashlib.sha256).digest()


def _secret(home: Home) -> bytes:
    return made_once(home, "secret.key", lambda: secrets.token_bytes(32))


def _key_id(home: Home) -> str:
    der = (
        _registry_key(home)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return hashlib.sha256(der).hexdigest()[:32]


def _registry_key(home: Home) -> ec.EllipticCurvePrivateKey:
    pem = made_once(home, "registry.pem", _new_registry_key)
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{home.keys / 'registry.pem'} is not an EC key")
    return key


def _new_registry_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def made_once(home: Home, name: str, make: Callable[[], bytes]) -> bytes:
    """The content of a key file; the first caller of all processes makes it."""
    path = home.keys / name
    if not path.exists():
        with home.lock("keys"):
            if not path.exists():
                write_private(path, make())
    return path.read_bytes()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
