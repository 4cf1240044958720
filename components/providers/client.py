"""A client of one repository in an OCI registry."""

from __future__ import annotations

import functools
import ipaddress
import tempfile
from typing import Any

import oras.container
import oras.provider
import requests

from components.providers import retries
from components.providers.artifacts import MANIFEST, Artifact, OciError
from components.providers.credentials import access_token

# Seconds to connect, and between two pieces of an answer: a registry takes a while to store a big blob.
TIMEOUT = (10.0, 120.0)
# What may differ between two tokens.
ACTIONS = {"GET": "pull", "HEAD": "pull", "POST": "push", "PUT": "push", "DELETE": "delete"}


def is_loopback(registry: str) -> bool:
    """Say whether a registry (HOST or HOST:PORT) is on this machine, which means plain http."""
    host = registry.rsplit(":", 1)[0] if not registry.endswith("]") else registry
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Client(oras.provider.Registry):  # type: ignore[misc]
    """An oras client for one repository, `HOST[:PORT]/PATH`."""

    def __init__(self, repository: str) -> None:
        self.container = oras.container.Container(repository)
        super().__init__(insecure=is_loopback(self.container.registry))
        self.auth.set_basic_auth("oauth2accesstoken", access_token())
        # oras waits for ever.
        self.session.request = functools.partial(self.session.request, timeout=TIMEOUT)
        self._tokens: dict[str, str | None] = {}

    def do_request(self, url: str, method: str = "GET", **kwargs: Any) -> requests.Response:
        """Make a request, again after a while when the registry is away or overloaded. Raises OciError.

        oras keeps one token for every later request, whatever its scope, and waits for two minutes on wrong
        credentials; so each kind of request has its own token and a refusal is final.
        """
        failure = ""
        for attempt in range(retries.ATTEMPTS):
            retries.wait_before(attempt)
            try:
                response = self._request_with_token(url, method, **kwargs)
            except retries.AWAY as error:
                failure = f"cannot be reached: {retries.reason(error)}"
                continue
            except ValueError:
                raise OciError(
                    f"{self.container.registry} takes no credentials for {self.container.api_prefix}: "
                    "is the access token still valid?"
                ) from None
            if response.status_code in (401, 403):
                raise OciError(f"{self.container.uri}: {method} is refused: {_said(response)}")
            if retries.is_away(response):
                failure = f"answers {response.status_code}: {_said(response)}"
                continue
            return response
        raise OciError(f"the registry {self.container.registry} {failure}")

    def _request_with_token(self, url: str, method: str, **kwargs: Any) -> requests.Response:
        """Make one request with the token of an earlier one of its kind.

        Without one a blob would be sent twice, the first time to a registry that need not listen.
        """
        once = oras.provider.Registry.do_request.__wrapped__
        action = ACTIONS[method]
        kept = self.auth.token = self._tokens.pop(action, None)
        response: requests.Response = once(self, url, method, **kwargs)
        if kept and response.status_code in (401, 403):
            # It may have ended meanwhile.
            self.auth.token = None
            response = once(self, url, method, **kwargs)
        self._tokens[action] = self.auth.token
        return response

    def _get_location(self, r: requests.Response, container: oras.container.Container) -> str:
        """Give where to upload to; what the registry says instead is the error."""
        self.expect(r, 202)
        return str(super()._get_location(r, container))

    def manifest_digest(self, reference: str, media_type: str = MANIFEST) -> str | None:
        """Give the digest of a tag's or digest's manifest, None when there is none."""
        response = self.manifest_request(reference, "HEAD", media_type=media_type)
        if response.status_code == 404:
            return None
        self.expect(response, 200)
        return response.headers.get("Docker-Content-Digest") or reference

    def push_artifact(self, artifact: Artifact, tag: str) -> str:
        """Push blobs that the registry lacks, then the manifest under a tag; give the manifest's digest."""
        for blob in artifact.blobs:
            descriptor = blob.descriptor()
            if self.blob_exists(descriptor, self.container):
                continue
            with tempfile.NamedTemporaryFile() as file:
                file.write(blob.content)
                file.flush()
                self.expect(self.put_upload(file.name, self.container, descriptor), 201)
        digest = artifact.manifest.digest
        if self.manifest_digest(tag) != digest or self.manifest_digest(digest) is None:
            response = self.manifest_request(tag, "PUT", artifact.manifest.content)
            self.expect(response, 201, 200)
            said = response.headers.get("Docker-Content-Digest", digest)
            if said != digest:
                raise OciError(f"{self.container.uri}: the registry stored {said} where {digest} was pushed")
        return digest

    def holds(self, digest: str, tag: str) -> bool:
        """Say whether a tag points to the manifest, and every blob that the manifest names is there."""
        if self.manifest_digest(tag) != digest:
            return False
        response = self.manifest_request(digest, "GET")
        if response.status_code == 404:
            return False
        self.expect(response, 200)
        manifest = response.json()
        blobs = [manifest["config"], *manifest["layers"]]
        return all(self.blob_exists(descriptor, self.container) for descriptor in blobs)

    def delete_artifact(self, digest: str, tag: str) -> None:
        """Remove a tag that still points to the manifest, then the manifest, where the registry lets us."""
        if self.manifest_digest(tag) == digest:
            # Not every registry can remove a tag alone; removing the manifest takes its tags along there.
            self.expect(self.manifest_request(tag, "DELETE"), 202, 200, 204, 400, 404, 405)
        self.expect(self.manifest_request(digest, "DELETE"), 202, 200, 204, 400, 404, 405)

    def manifest_request(
        self, reference: str, method: str, content: bytes | None = None, *, media_type: str = MANIFEST
    ) -> requests.Response:
        """Ask for, write or remove a manifest of this type."""
        url = f"{self.prefix}://{self.container.manifest_url(reference)}"
        headers = {"Content-Type" if content is not None else "Accept": media_type}
        return self.do_request(url, method, data=content, headers=headers)

    @staticmethod
    def expect(response: requests.Response, *allowed: int) -> None:
        """Raise OciError with the registry's words for any other status."""
        if response.status_code not in allowed:
            said = f"{response.status_code}: {_said(response)}"
            raise OciError(f"{response.request.method} {response.url}: {said}")


def _said(response: requests.Response) -> str:
    try:
        errors = response.json()["errors"]
        return "; ".join(f"{error['code']} {error.get('message', '')}".strip() for error in errors)
    except (ValueError, KeyError, TypeError):
        return response.reason or str(response.status_code)
