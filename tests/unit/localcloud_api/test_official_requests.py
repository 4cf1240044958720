"""What the official gcp plugin asked during up, refresh, an update and destroy of this very program.

The recording has the requests in their order, with the status that each got. Ids, fingerprints and addresses
are of that day: here they are those of today's answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.localcloud_api.client import COMPUTE, REGION, Client

RECORDING = Path(__file__).parent / "data/official-gcp-plugin-requests.jsonl"
_CURRENT = ("labelFingerprint", "fingerprint", "etag")


def _operation(path: str) -> tuple[str, str] | None:
    """The scope and the name of an operation's path."""
    scope, found, name = path.partition("/operations/")
    return (scope, name) if found else None


class Replay:
    """Sends recorded requests in terms of today."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.waiting: dict[str, list[str]] = {}
        self.known: dict[tuple[str, str], str] = {}

    def send(self, verb: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        status, answer = self.client.send(verb, self._path(path), self._body(path, body), query=query)
        if (
            verb != "GET"
            and status == 200
            and "/operations/" in answer.get("selfLink", answer.get("name", ""))
        ):
            # The plugin goes on when an operation is done.
            self.client.api.services.operations.settle(30)
            name = answer["name"].rpartition("/")[2]
            scope = path.partition(f"/{self._collection(path)}")[0]
            self.waiting.setdefault(scope, []).append(name)
        return status, answer

    @staticmethod
    def _collection(path: str) -> str:
        parts = path.split("/")
        return "global" if "global" in parts else parts[parts.index("projects") + 4]

    def _path(self, path: str) -> str:
        found = _operation(path)
        if found is None:
            return path
        scope, recorded = found
        key = scope.removesuffix("/global"), recorded
        if key not in self.known:
            self.known[key] = self.waiting[key[0]].pop(0)
        return f"{scope}/operations/{self.known[key]}"

    def _body(self, path: str, body: Any) -> Any:
        if body is None:
            return None
        text = json.dumps(body)
        if "ADDRESS" in text:
            address = self.client.ok("GET", f"{REGION}/addresses/krustlet-1-address")["address"]
            text = text.replace('"natIP": "ADDRESS"', f'"natIP": "{address}"')
        body = json.loads(text)
        for part in (body, body.get("policy", {})):
            for field in _CURRENT:
                if field in part:
                    target = path.replace(":setIamPolicy", ":getIamPolicy").removesuffix("/setLabels")
                    part[field] = self.client.ok("GET", target)[field]
        return body


def test_requests_of_the_official_plugin_are_answered_as_they_were(client: Client) -> None:
    replay = Replay(client)
    count, step = 0, ""
    seen: dict[str, Any] = {}
    for line in RECORDING.read_text().splitlines():
        recorded = json.loads(line)
        if "step" in recorded:
            step, seen = recorded["step"], {}
            continue
        path, _, query = recorded["path"].partition("?")
        status, answer = replay.send(recorded["method"], path, query, recorded["body"])
        assert status == recorded["status"], (step, recorded, answer)
        count += 1
        if recorded["method"] == "GET" and "/operations/" not in path and status == 200:
            # The plugin reads twice during a refresh, and nothing was changed between.
            assert step != "refresh" or answer == seen.setdefault(path, answer), path
        assert client.api.services.config.url not in json.dumps(answer), (path, answer)
    assert count == 108
    left = ("compute.instances", "container.clusters", "artifactregistry.repositories", "compute.addresses")
    assert not [record.key for kind in left for record in client.api.services.store.list(kind)]
    names = {item["name"] for item in client.ok("GET", f"{COMPUTE}/global/networks")["items"]}
    assert names == {"default"}


def test_the_boot_disk_shows_the_image_as_google_does(client: Client) -> None:
    """The link of the image is what every preview of the official plugin compares."""
    replay = Replay(client)
    for line in RECORDING.read_text().splitlines():
        recorded = json.loads(line)
        if recorded.get("step", "up") != "up":
            break
        if "method" in recorded:
            path, _, query = recorded["path"].partition("?")
            replay.send(recorded["method"], path, query, recorded["body"])
    zone = "/compute/beta/projects/localcloud-dev/zones/europe-west1-b"
    disk = client.ok("GET", f"{zone}/disks/krustlet-1")
    family = client.ok("GET", "/compute/beta/projects/debian-cloud/global/images/family/debian-12")
    assert disk["sourceImage"] == family["selfLink"]
    assert disk["sourceImage"].startswith("https://www.googleapis.com/compute/beta/projects/debian-cloud/")
