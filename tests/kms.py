"""Keys in localcloud's Cloud KMS, by the requests of docs/supply-chain.md."""

import uuid
from dataclasses import dataclass
from typing import Any

import requests

RING = "projects/localcloud-dev/locations/europe-west1/keyRings/signing"


@dataclass(frozen=True)
class Kms:
    """`endpoint` ends with the version of the API, as GOOGLE_KMS_CUSTOM_ENDPOINT does."""

    endpoint: str
    token: str

    def ask(self, method: str, path: str, body: object = None) -> requests.Response:
        """A request as the developer."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return requests.request(method, self.endpoint + path, json=body, headers=headers, timeout=60)

    def new_key(self) -> str:
        """Makes a key that signs, in a ring that may be there; gives its first version as cosign names it."""
        ring, _, ring_id = RING.rpartition("/")
        made = self.ask("POST", f"{ring}?keyRingId={ring_id}", {})
        assert made.status_code in (200, 409), made.text
        template = {"algorithm": "EC_SIGN_P256_SHA256"}
        body = {"purpose": "ASYMMETRIC_SIGN", "versionTemplate": template}
        made = self.ask("POST", f"{RING}/cryptoKeys?cryptoKeyId={uuid.uuid4()}", body)
        assert made.ok, made.text
        return f"gcpkms://{made.json()['name']}/cryptoKeyVersions/1"

    def set_state(self, reference: str, state: str) -> dict[str, Any]:
        """Makes a version ENABLED or DISABLED."""
        version = reference.partition("://")[2]
        changed = self.ask("PATCH", f"{version}?updateMask=state", {"state": state})
        assert changed.ok, changed.text
        body: dict[str, Any] = changed.json()
        return body
