"""A key in Cloud KMS: it signs there, and nobody has it.

Sources: sigstore's `pkg/signature/kms/gcp` (the form of a reference, which cosign's `--key` takes as well),
Cloud KMS's REST reference, and its "Verify end-to-end data integrity" (what is looked at in each answer).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import serialization

from components.providers import Lazy, ProviderError, credentials

if TYPE_CHECKING:
    import requests

SCHEME = "gcpkms"
FORM = f"{SCHEME}://projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V"
ALGORITHM = "EC_SIGN_P256_SHA256"
# What the official gcp plugin reads as well.
ENDPOINT = "GOOGLE_KMS_CUSTOM_ENDPOINT"
# Seconds to connect, and for an answer.
TIMEOUT = (10.0, 30.0)

# What few previews need.
_REQUESTS, _RETRIES = Lazy("requests"), Lazy("components.providers.retries")
_CRC32C = Lazy("google_crc32c")
_ID = re.compile(r"[a-zA-Z0-9_-]{1,63}")
_PARTS = {
    # By its id: answers have it and not the number, and are held to the name that was asked for.
    "projects": re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"),
    "locations": re.compile(r"[a-z0-9-]+"),
    "keyRings": _ID,
    "cryptoKeys": _ID,
    "cryptoKeyVersions": re.compile(r"[1-9][0-9]*"),
}

Json = dict[str, Any]


class KmsError(ProviderError):
    """A key is named in a wrong way, or Cloud KMS does not sign with it."""


def is_reference(key: str) -> bool:
    """Say whether a key is one that is kept elsewhere, in the form in which cosign names these."""
    return re.match(r"[a-z]+://", key) is not None


def version_name(reference: str) -> str:
    """Give the resource name of the key version that a reference names.

    Raises KmsError that says which part is wrong. Unlike cosign it does not look for a version by itself: the
    nodes would be told another key from one day to the next.
    """
    scheme, _, path = reference.partition("://")
    if scheme != SCHEME:
        raise KmsError(f"{FORM}; {scheme}:// is none that is known")
    given = path.split("/")
    for place, (collection, pattern) in enumerate(_PARTS.items()):
        name, value = [*given[2 * place : 2 * place + 2], "", ""][:2]
        if name != collection:
            raise KmsError(f"{FORM}; {name or 'nothing'} is where {collection} has to be")
        if not pattern.fullmatch(value):
            raise KmsError(f"{FORM}; {value or 'nothing'} is no value for {collection}")
    if rest := given[2 * len(_PARTS) :]:
        raise KmsError(f"{FORM}; /{'/'.join(rest)} at its end is too much")
    return path


class KmsKey:
    """A key version of the kind EC_SIGN_P256_SHA256."""

    def __init__(self, reference: str) -> None:
        self._name = version_name(reference)

    def public_key(self) -> str:
        """Get the public key (PEM). Raises KmsError when it cannot be had, or the version cannot sign."""
        answer = self._ask("GET", "/publicKey", None, lambda found: _is_intact(found, "pem"))
        if answer.get("algorithm") != ALGORITHM:
            raise KmsError(
                f"{self._name} is of the kind {answer.get('algorithm')}; what signs is {ALGORITHM}"
            )
        key = serialization.load_pem_public_key(answer["pem"].encode())
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_bytes(serialization.Encoding.PEM, form).decode()

    def sign(self, message: bytes) -> str:
        """Have the message signed; only its sum leaves this machine."""
        digest = hashlib.sha256(message).digest()
        body = {
            "digest": {"sha256": base64.b64encode(digest).decode()},
            "digestCrc32c": str(_CRC32C.value(digest)),
        }
        answer = self._ask(
            "POST",
            ":asymmetricSign",
            body,
            lambda found: found.get("verifiedDigestCrc32c") is True and _is_intact(found, "signature"),
        )
        return str(answer["signature"])

    def _ask(self, method: str, action: str, body: Json | None, is_intact: Callable[[Json], bool]) -> Json:
        """Make a request, again after a while when Cloud KMS is away or an answer is damaged."""
        base = os.environ.get(ENDPOINT) or "https://cloudkms.googleapis.com/v1/"
        failure = ""
        for attempt in range(_RETRIES.ATTEMPTS):
            _RETRIES.wait_before(attempt)
            try:
                response = _REQUESTS.request(
                    method,
                    f"{base}{self._name}{action}",
                    json=body,
                    headers=credentials.authorization(),
                    timeout=TIMEOUT,
                )
            except _RETRIES.AWAY as error:
                failure = f"cannot be reached: {_RETRIES.reason(error)}"
                continue
            if _RETRIES.is_away(response):
                failure = f"answers {response.status_code}: {_said(response)}"
                continue
            if not response.ok:
                said = _said(response)
                is_off = said.startswith("FAILED_PRECONDITION")
                hint = "; enable it, or name another version in signingKey" if is_off else ""
                raise KmsError(f"{self._name} signs nothing: {said}{hint}")
            answer = _parsed(response)
            if answer.get("name") == self._name and is_intact(answer):
                return answer
            failure = "gives answers that do not pass their checks"
        raise KmsError(f"Cloud KMS {failure} ({self._name})")


def _parsed(response: requests.Response) -> Json:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _is_intact(answer: Json, field: str) -> bool:
    """Say whether a field of an answer (`pem` as it is, `signature` in base64) is as it was sent."""
    try:
        content = str(answer.get(field, "")).encode()
        content = base64.b64decode(content, validate=True) if field == "signature" else content
    except ValueError:
        return False
    return bool(content) and answer.get(f"{field}Crc32c") == str(_CRC32C.value(content))


def _said(response: requests.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['status']}: {error['message']}".rstrip(".")
    except (ValueError, KeyError, TypeError):
        return response.reason or str(response.status_code)
