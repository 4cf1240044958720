"""Cloud KMS v1: key rings, keys that sign (EC_SIGN_P256_SHA256) and their versions.

What a key is made of is in localcloud/signing.py; no answer has it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime, timedelta

import google_crc32c

from localcloud import signing
from localcloud.api.compute.catalog import ZONES
from localcloud.api.errors import ApiError
from localcloud.api.listing import listing
from localcloud.api.masks import update
from localcloud.api.service import TABLE, Call
from localcloud.store import Json, Record

KEY_RING = "cloudkms.keyRings"
KEY = "cloudkms.cryptoKeys"
VERSION = "cloudkms.cryptoKeyVersions"
_LOCATIONS = (*ZONES, "global", "europe", "us", "asia")
_ID = re.compile(r"[a-zA-Z0-9_-]{1,63}")
_PURPOSE = "ASYMMETRIC_SIGN"
_ALGORITHM = "EC_SIGN_P256_SHA256"
_PROTECTION = "SOFTWARE"
_ENABLED, _DISABLED, _SCHEDULED = "ENABLED", "DISABLED", "DESTROY_SCHEDULED"
_KEPT = timedelta(days=30)
"""How long a destroyed version can be restored. localcloud keeps it until it is reset."""
_NAMES = {"keyRings": "KeyRing", "cryptoKeys": "CryptoKey", "cryptoKeyVersions": "CryptoKeyVersion"}


def _time(after: timedelta = timedelta()) -> str:
    return (datetime.now(UTC) + after).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _key(call: Call) -> str:
    """The resource name that a request's path begins with, as far as it names resources."""
    location = call.path["location"]
    if location not in _LOCATIONS:
        raise ApiError(
            400,
            f"The request concerns location '{location}' but was sent to location 'global'. Either Cloud KMS "
            f"is not available in '{location}' or the request was misrouted.",
        )
    key = f"projects/{call.project}/locations/{location}"
    for collection, name in (
        ("keyRings", "keyRing"),
        ("cryptoKeys", "cryptoKey"),
        ("cryptoKeyVersions", "cryptoKeyVersion"),
    ):
        if name in call.path:
            key += f"/{collection}/{call.path[name]}"
    return key


def _find(call: Call) -> Record:
    """
    Raises:
        ApiError: 404, no such key ring, key or version.
    """
    key = _key(call)
    record = call.store.get(key)
    if record is None:
        raise ApiError(404, f"{_NAMES[key.split('/')[-2]]} {key} not found.")
    return record


def _add(call: Call, parent: str, kind: str, name: str, body: Json) -> Record:
    collection = kind.partition(".")[2]
    if not _ID.fullmatch(name):
        raise ApiError(
            400, f"The {_NAMES[collection]} ID '{name}' does not match the regular expression {_ID.pattern}."
        )
    key = f"{parent}/{collection}/{name}"
    if call.store.get(key) is not None:
        raise ApiError(409, f"{_NAMES[collection]} {key} already exists.")
    return call.store.put(Record(key, kind, body | {"name": key, "createTime": _time()}))


def _list(call: Call, parent: str, kind: str) -> Json:
    collection = kind.partition(".")[2]
    items = [record.body for record in call.store.list(kind, f"{parent}/{collection}/")]
    return listing(call, collection, items) | ({"totalSize": len(items)} if items else {})


@TABLE.serves("cloudkms.projects.locations.keyRings.create")
def _create_ring(call: Call) -> Json:
    return _add(call, _key(call), KEY_RING, call.query.get("keyRingId", ""), {}).body


@TABLE.serves("cloudkms.projects.locations.keyRings.list")
def _list_rings(call: Call) -> Json:
    return _list(call, _key(call), KEY_RING)


@TABLE.serves(
    "cloudkms.projects.locations.keyRings.get",
    "cloudkms.projects.locations.keyRings.cryptoKeys.get",
    "cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.get",
)
def _get(call: Call) -> Json:
    return _find(call).body


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.create")
def _create_key(call: Call) -> Json:
    ring = _find(call)
    template = call.body.get("versionTemplate", {})
    asked = (
        call.body.get("purpose", ""),
        template.get("algorithm", ""),
        template.get("protectionLevel", _PROTECTION),
    )
    if asked != (_PURPOSE, _ALGORITHM, _PROTECTION):
        raise ApiError(
            501,
            f"localcloud serves keys of purpose {_PURPOSE}, algorithm {_ALGORITHM} and protection level "
            f"{_PROTECTION} only, not {', '.join(filter(None, asked)) or 'one of no purpose'}",
        )
    body = call.body | {
        "versionTemplate": {"algorithm": _ALGORITHM, "protectionLevel": _PROTECTION},
        "destroyScheduledDuration": f"{_KEPT.total_seconds():.0f}s",
    }
    key = _add(call, ring.key, KEY, call.query.get("cryptoKeyId", ""), body)
    if not call.query.get("skipInitialVersionCreation"):
        _add_version(call, key)
    return key.body


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.list")
def _list_keys(call: Call) -> Json:
    return _list(call, _find(call).key, KEY)


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.create")
def _create_version(call: Call) -> Json:
    return _add_version(call, _find(call)).body


def _add_version(call: Call, key: Record) -> Record:
    number = len(call.store.list(VERSION, f"{key.key}/cryptoKeyVersions/")) + 1
    body = {
        "state": _ENABLED,
        "protectionLevel": _PROTECTION,
        "algorithm": _ALGORITHM,
        "generateTime": _time(),
    }
    record = _add(call, key.key, VERSION, str(number), body)
    signing.generate(call.services.home, record.key)
    return record


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.list")
def _list_versions(call: Call) -> Json:
    return _list(call, _find(call).key, VERSION)


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.patch")
def _patch_version(call: Call) -> Json:
    record = _find(call)
    _require(record, _ENABLED, _DISABLED)
    changed = dict(record.body)
    update(changed, call.body, call.query.get("updateMask", ""), {"state"})
    if changed.get("state") not in (_ENABLED, _DISABLED):
        raise ApiError(400, "A version's state can be set to ENABLED or DISABLED.")
    record.body = changed
    return call.store.put(record).body


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.destroy")
def _destroy_version(call: Call) -> Json:
    record = _find(call)
    _require(record, _ENABLED, _DISABLED)
    record.body |= {"state": _SCHEDULED, "destroyTime": _time(_KEPT)}
    return call.store.put(record).body


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.restore")
def _restore_version(call: Call) -> Json:
    record = _find(call)
    _require(record, _SCHEDULED)
    del record.body["destroyTime"]
    record.body["state"] = _DISABLED
    return call.store.put(record).body


def _require(version: Record, *states: str) -> None:
    """
    Raises:
        ApiError: 400, the version is in none of these states.
    """
    state = version.body["state"]
    if state not in states:
        violation = {"type": f"KEY_{state}", "subject": version.key}
        detail = {"@type": "type.googleapis.com/google.rpc.PreconditionFailure", "violations": [violation]}
        wanted = " or ".join(name.lower().replace("_", " ") for name in states)
        message = f"{version.key} is not {wanted}, current state is: {state}."
        raise ApiError(400, message, status="FAILED_PRECONDITION", details=(detail,))


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.getPublicKey")
def _get_public_key(call: Call) -> Json:
    record = _find(call)
    _require(record, _ENABLED)
    if call.query.get("publicKeyFormat", "PEM") not in ("PEM", "PUBLIC_KEY_FORMAT_UNSPECIFIED"):
        raise ApiError(501, "localcloud gives public keys in PEM only")
    pem = signing.public_key(call.services.home, record.key)
    return {
        "name": record.key,
        "pem": pem,
        "pemCrc32c": _checksum(pem.encode()),
        "algorithm": _ALGORITHM,
        "protectionLevel": _PROTECTION,
    }


@TABLE.serves("cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.asymmetricSign")
def _sign(call: Call) -> Json:
    record = _find(call)
    _require(record, _ENABLED)
    if ("data" in call.body) == ("digest" in call.body):
        raise ApiError(400, "Exactly one of data and digest must be given.")
    verified = _verified(call.body)
    digest = (
        hashlib.sha256(_bytes(call.body["data"])).digest()
        if "data" in call.body
        else _bytes(call.body["digest"].get("sha256", ""))
    )
    if len(digest) != hashlib.sha256().digest_size:
        raise ApiError(400, f"{_ALGORITHM} signs a sha256 digest of 32 bytes; {len(digest)} were given.")
    signature = signing.sign(call.services.home, record.key, digest)
    return verified | {
        "name": record.key,
        "signature": base64.b64encode(signature).decode(),
        "signatureCrc32c": _checksum(signature),
        "protectionLevel": _PROTECTION,
    }


def _verified(body: Json) -> Json:
    """Which checksums of a request were there.

    Raises:
        ApiError: 400, one is another than that of what came.
    """
    verified: Json = {}
    for field, content in (
        ("data", body.get("data", "")),
        ("digest", next(iter(body.get("digest", {}).values()), "")),
    ):
        given = body.get(f"{field}Crc32c")
        if given is None:
            continue
        if given != _checksum(_bytes(content)):
            raise ApiError(
                400, f"The checksum in field {field}_crc32c did not match the data in field {field}."
            )
        verified[f"verified{field.capitalize()}Crc32c"] = True
    return verified


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4))


def _checksum(content: bytes) -> str:
    return str(google_crc32c.value(content))
