"""A key in Cloud KMS: how it is named, what it signs, and what is said when it does not."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.providers import attestation, kms, retries, signature
from localcloud.api import cloudkms
from tests.kms import Kms
from tests.unit.localcloud_api.client import TOKEN

REPOSITORY = "127.0.0.1:5000/p/r/app"
DIGEST = "sha256:" + "ab" * 32
IMAGE = {"repository": REPOSITORY, "digest": DIGEST}
NAME = "projects/a-project/locations/europe-west1/keyRings/r/cryptoKeys/k_1/cryptoKeyVersions/12"


def test_a_reference_has_the_form_that_cosign_takes() -> None:
    assert kms.version_name(f"gcpkms://{NAME}") == NAME
    assert kms.is_reference(f"gcpkms://{NAME}")
    assert not kms.is_reference(signature.generate_key().private_key)


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        (f"awskms://{NAME}", "awskms:// is none"),
        (f"gcpkms:///{NAME}", "nothing is where projects"),
        ("gcpkms://", "nothing is where projects"),
        (f"gcpkms://{NAME.replace('keyRings', 'keyrings')}", "keyrings is where keyRings"),
        (f"gcpkms://{NAME.replace('europe-west1', '')}", "nothing is no value for locations"),
        (f"gcpkms://{NAME.replace('a-project', '1234')}", "1234 is no value for projects"),
        (f"gcpkms://{NAME.rpartition('/crypto')[0]}", "nothing is where cryptoKeyVersions"),
        (f"gcpkms://{NAME.replace('/12', '/latest')}", "latest is no value for cryptoKeyVersions"),
        (f"gcpkms://{NAME.replace('/12', '/0')}", "0 is no value for cryptoKeyVersions"),
        (f"gcpkms://{NAME.replace('k_1', 'k 1')}", "k 1 is no value for cryptoKeys"),
        (f"gcpkms://{NAME}/publicKey", "/publicKey at its end"),
        (f"gcpkms://{NAME}/", "/ at its end"),
    ],
)
def test_a_wrong_reference_is_one_line_that_names_the_part(reference: str, wrong: str) -> None:
    with pytest.raises(kms.KmsError) as caught:
        kms.version_name(reference)
    assert wrong in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cloud(server: str, monkeypatch: pytest.MonkeyPatch) -> Kms:
    """A Cloud KMS whose key the program's clients reach, without a wait between two attempts."""
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("GOOGLE_KMS_CUSTOM_ENDPOINT", f"{server}/cloudkms/v1/")
    monkeypatch.setattr(retries, "wait_before", lambda _attempt: None)
    return Kms(f"{server}/cloudkms/v1/", TOKEN)


@pytest.fixture
def reference(cloud: Kms) -> str:
    return cloud.new_key()


def verify(pem: str, signed: str, message: bytes) -> None:
    """Check a signature; raises InvalidSignature."""
    public = serialization.load_pem_public_key(pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(base64.b64decode(signed), message, ec.ECDSA(hashes.SHA256()))


def test_what_it_signs_is_good_under_its_public_key(reference: str) -> None:
    key = kms.KmsKey(reference)
    signed = {key.sign(b"message") for _ in range(2)}
    assert len(signed) == 2
    for each in signed:
        verify(key.public_key(), each, b"message")


def test_both_formats_and_statements_are_signed_by_it(reference: str) -> None:
    pem = kms.KmsKey(reference).public_key()
    made = signature.sign(reference, REPOSITORY, DIGEST)
    verify(pem, made.signature, made.payload.encode())
    body = signature.statement(DIGEST)
    for signed in (made.bundle_signature, signature.sign_statement(reference, body)):
        verify(pem, signed, signature.pre_authentication_encoding(signature.IN_TOTO, body))


@pytest.mark.parametrize("state", ["DISABLED", "DESTROY_SCHEDULED"])
def test_a_version_that_is_not_enabled_is_one_line_that_says_what_to_do(
    cloud: Kms, reference: str, state: str
) -> None:
    if state == "DISABLED":
        cloud.set_state(reference, state)
    else:
        assert cloud.ask("POST", f"{kms.version_name(reference)}:destroy", {}).ok
    for asked in (kms.KmsKey(reference).public_key, lambda: kms.KmsKey(reference).sign(b"message")):
        with pytest.raises(kms.KmsError, match=f"current state is: {state}; enable it, or name") as caught:
            asked()
        assert "\n" not in str(caught.value)


def test_what_is_not_there_and_whom_it_is_refused_to_is_said(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kms.KmsError, match="NOT_FOUND: CryptoKeyVersion"):
        kms.KmsKey(reference.replace("/1", "/2")).public_key()
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "expired")
    with pytest.raises(kms.KmsError, match="UNAUTHENTICATED"):
        kms.KmsKey(reference).sign(b"message")


def fault(server: str, **settings: Any) -> None:
    """Have requests of Cloud KMS go wrong."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {"method": "cloudkms.*", **settings}
    assert requests.post(f"{server}/localcloud/faults", json=body, headers=headers, timeout=30).ok


@pytest.mark.parametrize(
    "kind", [{"kind": "error"}, {"kind": "error", "status": 429}, {"kind": "lost-answer"}]
)
def test_it_is_asked_again_when_it_is_away_and_not_for_ever(
    server: str, reference: str, kind: dict[str, Any]
) -> None:
    key = kms.KmsKey(reference)
    pem = key.public_key()
    fault(server, **kind, times=retries.ATTEMPTS - 1)
    verify(pem, key.sign(b"message"), b"message")
    fault(server, **kind, times=0)
    with pytest.raises(kms.KmsError, match=r"^Cloud KMS (answers|cannot be reached)"):
        key.sign(b"message")


@pytest.mark.parametrize("damage", ["public key", "signature", "digest"])
def test_an_answer_that_is_damaged_is_not_taken(
    reference: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = kms.KmsKey(reference)
    pem = key.public_key()
    asked = itertools.count()
    function = "_verified" if damage == "digest" else "_checksum"
    right: Any = getattr(cloudkms, function)
    wrong: Any = {} if damage == "digest" else "1"
    monkeypatch.setattr(cloudkms, "_verified", lambda _body: {"verifiedDigestCrc32c": True})
    monkeypatch.setattr(cloudkms, function, lambda given: right(given) if next(asked) else wrong)
    if damage == "public key":
        assert key.public_key() == pem
    else:
        verify(pem, key.sign(b"message"), b"message")
    assert next(asked) == 2, "the second answer is good"
    monkeypatch.setattr(cloudkms, function, lambda _given: wrong)
    with pytest.raises(kms.KmsError, match="do not pass their checks"):
        key.public_key() if damage == "public key" else key.sign(b"message")


def test_a_key_of_another_kind_is_refused(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloudkms, "_ALGORITHM", "EC_SIGN_P384_SHA384")
    with pytest.raises(kms.KmsError, match="P384_SHA384; what signs is EC_SIGN_P256_SHA256"):
        kms.KmsKey(reference).public_key()


def test_a_preview_knows_the_public_key_and_no_state_has_another(reference: str, cloud: Kms) -> None:
    provider = signature.SigningKeyProvider()
    checked = provider.check({}, {"kms_key": reference})
    assert not checked.failures
    assert checked.inputs["public_key"] == kms.KmsKey(reference).public_key()
    made = provider.create(checked.inputs)
    assert made.outs == {"kms_key": reference, "public_key": checked.inputs["public_key"]}
    assert "PRIVATE" not in json.dumps(made.outs)
    assert provider.diff(made.id, made.outs, checked.inputs).changes is False
    assert provider.diff(made.id, made.outs, {}).replaces == ["kms_key"]
    generated = provider.create({}).outs
    assert provider.diff(made.id, generated or {}, checked.inputs).replaces == ["kms_key"]
    cloud.set_state(reference, "DISABLED")
    (failure,) = provider.check(checked.inputs, {"kms_key": reference}).failures
    assert "DISABLED" in failure.reason


def test_a_preview_signs_nothing_and_the_signature_of_the_same_image_stays(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, props = signature.SignatureProvider(), {**IMAGE, "kms_key": reference}
    with monkeypatch.context() as preview:
        preview.setattr(kms.KmsKey, "sign", lambda *_: pytest.fail("a preview has something signed"))
        checked = provider.check({}, props).inputs
        assert "signature" not in checked, "what is not known is shown as unknown"
    made = provider.create(checked).outs
    assert made
    verify(kms.KmsKey(reference).public_key(), made["signature"], signature.payload(**IMAGE).encode())
    monkeypatch.setattr(kms.KmsKey, "sign", lambda *_: pytest.fail("it is signed already"))
    assert provider.diff("id", made, provider.check(checked, props).inputs).changes is False
    for other in ({"digest": "sha256:" + "cd" * 32}, {"kms_key": reference.replace("/1", "/2")}):
        assert provider.diff("id", made, {**props, **other}).replaces == list(other)


def test_a_version_that_signs_nothing_leaves_nothing_pushed(cloud: Kms, reference: str) -> None:
    cloud.set_state(reference, "DISABLED")
    with pytest.raises(kms.KmsError, match="DISABLED"):
        # No registry is there to be asked.
        attestation.push("127.0.0.1:1/p/app", DIGEST, {"https://a/1": b"{}"}, reference)
