"""Google's REST as the official plugin calls it: endpoints, credentials, long-running operations, errors."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localcloud.plugins.protocol import ProviderError

Json = dict[str, Any]
_TIMEOUT_SECONDS = 60
_TRANSIENT = (429, 500, 502, 503, 504)
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.05, 1.0

# service: (its configuration key, its environment variable, where it is on Google)
SERVICES = {
    "compute": (
        "computeCustomEndpoint",
        "GOOGLE_COMPUTE_CUSTOM_ENDPOINT",
        "https://compute.googleapis.com/compute/beta/",
    ),
    "container": (
        "containerCustomEndpoint",
        "GOOGLE_CONTAINER_CUSTOM_ENDPOINT",
        "https://container.googleapis.com/v1beta1/",
    ),
    "artifactregistry": (
        "artifactRegistryCustomEndpoint",
        "GOOGLE_ARTIFACT_REGISTRY_CUSTOM_ENDPOINT",
        "https://artifactregistry.googleapis.com/v1/",
    ),
    "iam": ("iamCustomEndpoint", "GOOGLE_IAM_CUSTOM_ENDPOINT", "https://iam.googleapis.com/v1/"),
}
ENDPOINT_RULE = re.compile(r".*/[^/]+/$")


class GoogleError(ProviderError):
    """Google's refusal: its own message with the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"googleapi: Error {status}: {message}")
        self.status = status


class FailedOperationError(GoogleError):
    """An operation that Google took and that ended with an error: what it began may be there."""


class StillRunningError(ProviderError):
    """An operation whose end we did not see: what it makes may come to be."""


@dataclass
class Google:
    """Calls, with the user's token. Paths are relative to a service's endpoint."""

    endpoints: Mapping[str, str] = field(default_factory=dict)
    token: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def call(
        self,
        service: str,
        method: str,
        path: str,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Json:
        """One request. Raises `GoogleError` for a refusal, `ProviderError` where nobody answers."""
        token = self.token or os.environ.get("GOOGLE_OAUTH_ACCESS_TOKEN")
        if not token:
            raise ProviderError(
                "no Google credentials: set GOOGLE_OAUTH_ACCESS_TOKEN or gcp:accessToken (the stand-in for "
                "'gcp' takes an access token only)"
            )
        url = self.endpoints[service] + urllib.parse.quote(path, safe="/:@~.-_")
        if query:
            url += "?" + urllib.parse.urlencode(query)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
                answer: Json = json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise GoogleError(error.code, _message(error.read(), error.reason)) from error
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ProviderError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
        return answer

    def get(self, service: str, path: str, query: Mapping[str, str] | None = None) -> Json | None:
        """The resource, or None when there is none."""
        try:
            return self.call(service, "GET", path, query=query)
        except GoogleError as error:
            if error.status == 404:
                return None
            raise

    def operate(  # noqa: PLR0917
        self,
        service: str,
        method: str,
        path: str,
        deadline: float,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Json:
        """A request whose answer is an operation; waits for its end.

        Raises `GoogleError` when it is refused, `FailedOperationError` when it failed, `StillRunningError`
        when it was not waited for to the end.
        """
        operation = self.call(service, method, path, body, query)
        pause, trouble = _FIRST_POLL_SECONDS, ""
        while not (operation.get("done") or operation.get("status") == "DONE"):
            if self.cancelled.wait(pause):
                raise StillRunningError(f"the wait for {operation.get('name')} was interrupted; it goes on")
            if time.monotonic() > deadline:
                raise StillRunningError(
                    f"{operation.get('name')} did not end in the time allowed for it{trouble}"
                )
            pause = min(pause * 1.5, _LAST_POLL_SECONDS)
            try:
                operation = self.call(service, "GET", _operation_path(operation, path))
                trouble = ""
            except ProviderError as unanswered:
                # The operation goes on, whatever became of a question about it.
                trouble = f"; {unanswered}"
                if isinstance(unanswered, GoogleError) and unanswered.status not in _TRANSIENT:
                    name = operation.get("name")
                    raise StillRunningError(f"{name} cannot be followed{trouble}") from unanswered
        error = operation.get("error")
        if error:
            errors = error.get("errors") or [error]
            text = "; ".join(str(e.get("message") or e.get("code")) for e in errors)
            status = operation.get("httpErrorStatusCode") or error.get("code") or 500
            raise FailedOperationError(status, text)
        return operation


def _operation_path(operation: Json, path: str) -> str:
    """Where an operation is polled: its own name, or beside the resource (`…/zones/Z/operations/O`)."""
    name = str(operation["name"])
    if name.startswith("projects/"):
        return name
    parts = path.split("/")
    scope = 3 if parts[2] == "global" else 4
    return "/".join([*parts[:scope], "operations", name])


def _message(body: bytes, reason: str) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:500] or reason
    text = str(error.get("message", reason))
    reasons = [e.get("reason") for e in error.get("errors", []) if e.get("reason")]
    return f"{text}, {reasons[0]}" if reasons else text
