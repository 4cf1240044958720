"""Google's REST as the official plugin calls it: endpoints, credentials, long-running operations, errors."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from localcloud.plugins.patience import Patience, TransientError, retry_after
from localcloud.plugins.protocol import ProviderError

Json = dict[str, Any]
_TIMEOUT_SECONDS = 60
_TRANSIENT = (429, 500, 502, 503, 504)
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.05, 1.0
_SIGN_OF_LIFE_SECONDS = 10

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
    "cloudresourcemanager": (
        "resourceManagerCustomEndpoint",
        "GOOGLE_RESOURCE_MANAGER_CUSTOM_ENDPOINT",
        "https://cloudresourcemanager.googleapis.com/v1/",
    ),
    "serviceusage": (
        "serviceUsageCustomEndpoint",
        "GOOGLE_SERVICE_USAGE_CUSTOM_ENDPOINT",
        "https://serviceusage.googleapis.com/v1/",
    ),
}
ENDPOINT_RULE = re.compile(r".*/[^/]+/$")


class GoogleError(ProviderError):
    """Google's refusal: its own message with the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"googleapi: Error {status}: {message}")
        self.status = status


class AwayError(TransientError):
    """Nobody answers."""


class OverloadedError(GoogleError, TransientError):
    """Google's refusal for a passing reason."""

    answered = True


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
    tell: Callable[[str], None] = lambda _: None
    labels: Mapping[str, str] = field(default_factory=dict)
    """What everything that takes labels gets, besides its own (`gcp:defaultLabels`)."""

    def __post_init__(self) -> None:
        self.patience = Patience(self.cancelled, self.tell)

    def call(
        self,
        service: str,
        method: str,
        path: str,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Json:
        """One request, made again where that can do no harm.

        Raises `GoogleError` for a refusal, `AwayError` where nobody answers. Where the reason passes, it is a
        `TransientError`, which says whether the work may have been done.
        """
        repeatable = method in ("GET", "DELETE")  # what is gone is gone
        if service == "compute" and method != "GET":
            # Google does the work of a request once, however often it comes.
            query, repeatable = {**(query or {}), "requestId": str(uuid.uuid4())}, True
        return self.patience.through(
            lambda: self._once(service, method, path, body, query), repeatable=repeatable
        )

    def _once(
        self, service: str, method: str, path: str, body: Json | None, query: Mapping[str, str] | None
    ) -> Json:
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
            raise _refusal(error) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            away = AwayError(f"{url.partition('?')[0]} cannot be reached: {reason}")
            away.maybe_done = method != "GET" and not isinstance(reason, ConnectionRefusedError)
            raise away from error
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
        return self.follow(service, self.call(service, method, path, body, query), path, deadline)

    def follow(self, service: str, operation: Json, path: str, deadline: float) -> Json:
        """Waits for the end of an operation on what is at the path; raises as `operate`."""
        pause, trouble, shown, began = _FIRST_POLL_SECONDS, "", ("", 0.0), time.monotonic()
        while not (operation.get("done") or operation.get("status") == "DONE"):
            shown = self._sign_of_life(operation, time.monotonic() - began, shown)
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

    def _sign_of_life(self, operation: Json, seconds: float, shown: tuple[str, float]) -> tuple[str, float]:
        """Shows how an operation stands, when that changes and now and then; gives what was shown when."""
        text = _standing(operation)
        if seconds < 1 or (text == shown[0] and seconds - shown[1] < _SIGN_OF_LIFE_SECONDS):
            return shown
        self.tell(f"waiting for {text}, for {seconds:.0f} s now")
        return text, seconds

    def running(self, service: str, item: str) -> list[Json]:
        """The operations on a resource that have not ended."""
        parts = item.split("/")
        if service == "compute":
            scope = "/".join(parts[: 3 if parts[2] == "global" else 4])
            listed = self.call(service, "GET", f"{scope}/operations", query={"filter": 'status != "DONE"'})
            operations = listed.get("items", [])
        elif service == "container":
            operations = self.call(service, "GET", f"{'/'.join(parts[:4])}/operations").get("operations", [])
        else:
            return []  # the others' resources are there as soon as they can be read
        tail = f"/{'/'.join(parts[-2:])}"
        mine = [o for o in operations if str(o.get("targetLink", "")).endswith(tail)]
        return [o for o in mine if o.get("status") != "DONE"]


def _standing(operation: Json) -> str:
    """An operation in a line: what it does, its name, status and progress, and what it says."""
    progress = operation.get("progress")
    percent = f" {progress} %" if isinstance(progress, int) else ""
    said = operation.get("statusMessage") or operation.get("detail") or ""
    kind = operation.get("operationType") or (operation.get("metadata") or {}).get("verb") or "operation"
    status = operation.get("status") or "running"
    return f"{kind} {operation.get('name')}: {status}{percent}{f' ({said})' if said else ''}"


def _refusal(error: urllib.error.HTTPError) -> GoogleError:
    try:
        text = _message(error.read(), error.reason)
    except (http.client.HTTPException, OSError):
        text = str(error.reason)
    if error.code not in _TRANSIENT:
        return GoogleError(error.code, text)
    overloaded = OverloadedError(error.code, text)
    overloaded.maybe_done = error.code != 429
    overloaded.retry_after = retry_after(error.headers.get("Retry-After"))
    return overloaded


def _operation_path(operation: Json, path: str) -> str:
    """Where an operation is polled: its own name, or beside the resource (`…/zones/Z/operations/O`)."""
    name = str(operation["name"])
    if name.startswith(("projects/", "operations/")):
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
