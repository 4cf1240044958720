"""What refers to a manifest in a registry (OCI 1.1): listed by the registry or, where it does not, at a tag.

Source: the distribution specification, "Pushing Manifests with Subject" and "Referrers Tag Schema".
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from components.providers import Lazy
from components.providers.artifacts import MANIFEST, Artifact, OciError, canonical

if TYPE_CHECKING:
    from components.providers.client import Client

_CLIENTS = Lazy("components.providers.client")

INDEX = "application/vnd.oci.image.index.v1+json"
# What registries without a list of their own answer; some have a page for people there.
NO_LIST = (400, 404, 405, 406, 501)
PAGES = 20
ATTEMPTS = 5
_REWRITING = threading.Lock()


def client_of(repository: str) -> Client:
    """Give a client of a repository, `HOST[:PORT]/PATH`."""
    made: Client = _CLIENTS.Client(repository)
    return made


class Referrers:
    """The manifests that refer to `subject`, a digest."""

    def __init__(self, client: Client, subject: str) -> None:
        self._client = client
        self._subject = subject
        self._tag = subject.replace(":", "-")

    def push(self, artifact: Artifact) -> str:
        """Push an artifact that refers to the subject, and have it listed; give its digest."""
        digest = self._client.push_artifact(artifact, artifact.manifest.digest)
        manifest = json.loads(artifact.manifest.content)
        described = {
            **artifact.manifest.descriptor(manifest.get("annotations")),
            "artifactType": manifest["artifactType"],
        }
        self._rewrite(lambda listed: [*(item for item in listed if _digest(item) != digest), described])
        return digest

    def has(self, digest: str) -> bool:
        """Say whether a referrer is there with all its parts, and listed."""
        listed = self._by_registry()
        found = self._at_tag()[0] if listed is None else listed
        return digest in map(_digest, found) and self._client.holds(digest, digest)

    def remove(self, digest: str) -> None:
        """Remove a referrer, and it alone."""
        self._rewrite(lambda listed: [item for item in listed if _digest(item) != digest])
        self._client.delete_artifact(digest, digest)

    def _by_registry(self) -> list[Any] | None:
        """Give what the registry lists, None where it keeps no list."""
        container, listed = self._client.container, list[Any]()
        url = f"{self._client.prefix}://{container.registry}/v2/{container.api_prefix}/referrers/{self._subject}"
        for _ in range(PAGES):
            response = self._client.do_request(url, "GET", headers={"Accept": INDEX})
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            if response.status_code in NO_LIST or (response.ok and kind != INDEX):
                return None
            self._client.expect(response, 200)
            listed += response.json().get("manifests") or []
            following = urllib.parse.urljoin(url, response.links.get("next", {}).get("url", url))
            if following == url or urllib.parse.urlsplit(following)[:2] != urllib.parse.urlsplit(url)[:2]:
                break
            url = following
        return listed

    def _at_tag(self) -> tuple[list[Any], str | None]:
        """Give what the index at the tag lists, and the index's digest.

        The specification keeps the tag for it: what is no index there counts for nothing.
        """
        response = self._client.manifest_request(self._tag, "GET", media_type=INDEX)
        if response.status_code == 404:
            return [], None
        self._client.expect(response, 200)
        try:
            listed = response.json()["manifests"]
        except (ValueError, KeyError, TypeError):
            listed = []
        return (listed if isinstance(listed, list) else []), self._client.manifest_digest(self._tag, INDEX)

    def _rewrite(self, change: Callable[[list[Any]], list[Any]]) -> None:
        """Change the index at the tag, where the registry keeps no list; again if others did meanwhile."""
        if self._by_registry() is not None:
            return
        # No registry can compare and swap; our own threads at least do not take each other's entries away.
        with _REWRITING:
            self._rewrite_alone(change)

    def _rewrite_alone(self, change: Callable[[list[Any]], list[Any]]) -> None:
        for _ in range(ATTEMPTS):
            listed, old = self._at_tag()
            wanted = change(listed)
            if wanted == listed:
                return
            if not wanted and old:
                self._client.delete_artifact(old, self._tag)
                return
            # Some registries take no index that lists what is gone.
            wanted = [item for item in wanted if self._client.manifest_digest(str(_digest(item)))]
            index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": wanted})
            self._client.expect(
                self._client.manifest_request(self._tag, "PUT", index, media_type=INDEX), 201, 200
            )
            if old and old != self._client.manifest_digest(self._tag, INDEX):
                self._client.delete_artifact(old, old)
        raise OciError(f"{self._client.container.uri}: other clients keep changing the tag {self._tag}")


def _digest(item: Any) -> Any:
    return item.get("digest") if isinstance(item, dict) else None


def subject_descriptor(client: Client, digest: str) -> dict[str, Any]:
    """Describe a manifest that is in the registry. Raises OciError when it is not."""
    response = client.manifest_request(digest, "GET")
    if response.status_code == 404:
        raise OciError(f"{client.container.uri}@{digest} cannot be signed: it is not in the registry")
    client.expect(response, 200)
    kind = response.json().get("mediaType", MANIFEST)
    return {"mediaType": kind, "digest": digest, "size": len(response.content)}
