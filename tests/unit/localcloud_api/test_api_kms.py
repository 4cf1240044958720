"""Cloud KMS: key rings, keys and versions, what they sign, and who keeps what they are made of."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from typing import Any

import google_crc32c
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from localcloud.home import Home
from localcloud.tokens import mint_access_token
from tests.unit.localcloud_api.client import ACCOUNTS, LOCATION, Client

RINGS = f"/cloudkms/v1/{LOCATION}/keyRings"
RING = f"{RINGS}/signing"
KEY = f"{RING}/cryptoKeys/app"
FIRST = f"{KEY}/cryptoKeyVersions/1"
ASKED = {"purpose": "ASYMMETRIC_SIGN", "versionTemplate": {"algorithm": "EC_SIGN_P256_SHA256"}}
MESSAGE = b"what is signed"
DIGEST = hashlib.sha256(MESSAGE).digest()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def checksum(content: bytes) -> str:
    return str(google_crc32c.value(content))


@pytest.fixture
def key(client: Client) -> dict[str, Any]:
    """A key with its first version."""
    client.ok("POST", RINGS, {}, query="keyRingId=signing")
    return client.ok("POST", f"{RING}/cryptoKeys", ASKED, query="cryptoKeyId=app")


def verify(pem: str, answer: dict[str, Any]) -> None:
    """Check a signature of MESSAGE; raises InvalidSignature."""
    public = serialization.load_pem_public_key(pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(base64.b64decode(answer["signature"]), MESSAGE, ec.ECDSA(hashes.SHA256()))


def test_a_ring_a_key_and_a_version_are_found_and_listed(client: Client, key: dict[str, Any]) -> None:
    assert client.ok("GET", RING)["name"] == f"{LOCATION}/keyRings/signing"
    assert client.ok("GET", KEY) == key
    assert key["destroyScheduledDuration"] == "2592000s"
    version = client.ok("GET", FIRST)
    assert (version["state"], version["algorithm"]) == ("ENABLED", "EC_SIGN_P256_SHA256")
    client.ok("POST", f"{KEY}/cryptoKeyVersions", {})
    for path, collection, count in (
        (RINGS, "keyRings", 1),
        (f"{RING}/cryptoKeys", "cryptoKeys", 1),
        (f"{KEY}/cryptoKeyVersions", "cryptoKeyVersions", 2),
    ):
        listed = client.ok("GET", path)
        assert (len(listed[collection]), listed["totalSize"]) == (count, count)
    assert client.ok("GET", RINGS.replace("europe-west1", "global")) == {}


def test_what_is_there_or_is_not_is_named_as_google_does(client: Client, key: dict[str, Any]) -> None:
    again = client.error(409, "POST", f"{RING}/cryptoKeys", ASKED, query="cryptoKeyId=app")
    assert again == f"CryptoKey {key['name']} already exists."
    assert client.error(404, "GET", f"{KEY}/cryptoKeyVersions/2").startswith("CryptoKeyVersion projects/")
    assert "keyRings/none not found" in client.error(404, "GET", f"{RINGS}/none/cryptoKeys")
    assert "location 'moon'" in client.error(400, "GET", RINGS.replace("europe-west1", "moon"))
    assert "my key" in client.error(400, "POST", f"{RING}/cryptoKeys", ASKED, query="cryptoKeyId=my%20key")


@pytest.mark.parametrize(
    "asked",
    [
        {"purpose": "ENCRYPT_DECRYPT"},
        {"purpose": "ASYMMETRIC_SIGN", "versionTemplate": {"algorithm": "EC_SIGN_P384_SHA384"}},
        {**ASKED, "versionTemplate": {**ASKED["versionTemplate"], "protectionLevel": "HSM"}},  # type: ignore[dict-item]
        {},
    ],
)
@pytest.mark.usefixtures("key")
def test_a_key_of_another_kind_is_said_not_to_be_served(client: Client, asked: dict[str, Any]) -> None:
    message = client.error(501, "POST", f"{RING}/cryptoKeys", asked, query="cryptoKeyId=other")
    assert "EC_SIGN_P256_SHA256" in message


@pytest.mark.usefixtures("key")
def test_a_digest_or_data_is_signed_and_checksums_say_that_nothing_was_damaged(client: Client) -> None:
    public = client.ok("GET", f"{FIRST}/publicKey")
    assert public["pemCrc32c"] == checksum(public["pem"].encode())
    by_digest = client.ok(
        "POST",
        f"{FIRST}:asymmetricSign",
        {"digest": {"sha256": encoded(DIGEST)}, "digestCrc32c": checksum(DIGEST)},
    )
    by_data = client.ok("POST", f"{FIRST}:asymmetricSign", {"data": encoded(MESSAGE)})
    for answer in (by_digest, by_data):
        verify(public["pem"], answer)
        assert answer["signatureCrc32c"] == checksum(base64.b64decode(answer["signature"]))
        assert answer["name"] == public["name"]
    assert by_digest["verifiedDigestCrc32c"] is True
    assert "verifiedDataCrc32c" not in by_data
    assert by_digest["signature"] != by_data["signature"], "Google's signatures differ each time"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": encoded(MESSAGE), "digest": {"sha256": encoded(DIGEST)}},
        {"digest": {"sha384": encoded(hashlib.sha384(MESSAGE).digest())}},
        {"digest": {"sha256": encoded(DIGEST[:20])}},
        {"digest": {"sha256": encoded(DIGEST)}, "digestCrc32c": "1"},
        {"data": encoded(MESSAGE), "dataCrc32c": "1"},
    ],
)
@pytest.mark.usefixtures("key")
def test_what_cannot_be_signed_is_refused(client: Client, body: dict[str, Any]) -> None:
    client.error(400, "POST", f"{FIRST}:asymmetricSign", body)


@pytest.mark.usefixtures("key")
def test_a_version_that_is_not_enabled_signs_nothing_and_can_come_back(client: Client) -> None:
    before = client.ok("GET", f"{FIRST}/publicKey")

    def refused(state: str) -> None:
        for request in (("GET", f"{FIRST}/publicKey"), ("POST", f"{FIRST}:asymmetricSign", {"data": "eA=="})):
            status, answer = client.send(*request)
            error = answer["error"]
            assert (status, error["status"]) == (400, "FAILED_PRECONDITION")
            assert error["message"].endswith(f"is not enabled, current state is: {state}.")
            assert error["details"][0]["violations"][0]["type"] == f"KEY_{state}"

    assert client.ok("PATCH", FIRST, {"state": "DISABLED"}, query="updateMask=state")["state"] == "DISABLED"
    refused("DISABLED")
    client.ok("PATCH", FIRST, {"state": "ENABLED"}, query="updateMask=state")
    assert client.ok("GET", f"{FIRST}/publicKey") == before
    assert "destroyTime" in client.ok("POST", f"{FIRST}:destroy", {})
    refused("DESTROY_SCHEDULED")
    client.error(400, "PATCH", FIRST, {"state": "ENABLED"}, query="updateMask=state")
    client.error(400, "POST", f"{FIRST}:destroy", {})
    restored = client.ok("POST", f"{FIRST}:restore", {})
    assert restored["state"] == "DISABLED"
    assert "destroyTime" not in restored
    client.error(400, "POST", f"{FIRST}:restore", {})
    client.error(400, "PATCH", FIRST, {"state": "DESTROYED"}, query="updateMask=state")


@pytest.mark.usefixtures("key")
def test_versions_have_keys_of_their_own_and_a_restart_keeps_them(client: Client) -> None:
    client.ok("POST", f"{KEY}/cryptoKeyVersions", {})
    first, second = (client.ok("GET", f"{KEY}/cryptoKeyVersions/{n}/publicKey")["pem"] for n in (1, 2))
    assert first != second
    anew = Client(type(client.api)(client.api.services.home, client.backends), client.backends)
    try:
        verify(first, anew.ok("POST", f"{FIRST}:asymmetricSign", {"data": encoded(MESSAGE)}))
    finally:
        anew.api.services.operations.close()


@pytest.mark.usefixtures("key")
def test_a_private_key_is_its_owners_alone_and_in_no_answer_and_no_store(client: Client, home: Home) -> None:
    (path,) = home.keys.glob("kms-*.pem")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = path.read_bytes().splitlines()[1]
    answers = [
        client.ok("GET", FIRST),
        client.ok("GET", KEY),
        client.ok("GET", f"{FIRST}/publicKey"),
        client.ok("POST", f"{FIRST}:asymmetricSign", {"data": "eA=="}),
    ]
    assert secret not in json.dumps(answers).encode()
    assert not [file for file in home.root.rglob("*.db*") if secret in file.read_bytes()]
    path.unlink()
    assert "is gone" in client.error(503, "POST", f"{FIRST}:asymmetricSign", {"data": "eA=="})


@pytest.mark.usefixtures("key")
def test_a_service_account_is_told_which_permission_it_lacks(client: Client, home: Home) -> None:
    account = client.ok("POST", ACCOUNTS, {"accountId": "builder"})["email"]
    token = mint_access_token(home, account, ()).value
    for request, permission in (
        (("POST", f"{FIRST}:asymmetricSign", {"data": "eA=="}), "cryptoKeyVersions.useToSign"),
        (("GET", f"{FIRST}/publicKey"), "cryptoKeyVersions.viewPublicKey"),
    ):
        status, answer = client.send(*request, token=token)
        assert (status, answer["error"]["status"]) == (403, "PERMISSION_DENIED")
        assert f"cloudkms.{permission}" in answer["error"]["message"]
        assert "cryptoKeys/app/cryptoKeyVersions/1" in answer["error"]["message"]
