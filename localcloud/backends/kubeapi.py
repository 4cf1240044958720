"""The little of a Kubernetes client that the backends need: JSON requests with a client certificate.

Not the official client: it takes a second to import, and 25 MB for as long as the cluster runs. The
Kubernetes plugin sends any object over that one's connection, and the program, which knows no localcloud, has
its types.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote


class KubeError(Exception):
    """The API server did not answer, or not with success; `status` is 0 if it did not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class KubeApi:
    """One control plane as one identity: `pki` holds `ca.crt`, `IDENTITY.crt` and `IDENTITY.key`."""

    endpoint: str
    pki: Path
    identity: str

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        """The decoded answer (text if it is not JSON).

        Raises:
            KubeError: no answer, or no 2xx.
        """
        connection = self._connect(timeout=30)
        try:
            reply = self._send(connection, method, path, body, content_type)
            data = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise KubeError(0, f"{method} {path}: {error}") from error
        finally:
            connection.close()
        is_json = reply.headers.get_content_type() == "application/json"
        decoded = json.loads(data) if is_json else data.decode(errors="replace")
        if not 200 <= reply.status < 300:
            reason = decoded.get("message", "") if isinstance(decoded, dict) else decoded
            raise KubeError(reply.status, f"{method} {path}: {reply.status} {reason}")
        return decoded

    def apply(self, path: str, document: dict[str, Any]) -> Any:
        """Server-side apply of an object at its own path."""
        return self.request(
            "PATCH", f"{path}?fieldManager=localcloud&force=true", document, "application/apply-patch+yaml"
        )

    def watch(
        self, path: str, version: str, seconds: int, field_selector: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Events after a resource version, for so many seconds at most.

        Raises:
            KubeError: the watch cannot be had, or breaks off.
        """
        query = f"?watch=true&resourceVersion={version}&timeoutSeconds={seconds}"
        query += f"&fieldSelector={quote(field_selector)}" if field_selector else ""
        connection = self._connect(timeout=seconds + 10)
        try:
            reply = self._send(connection, "GET", path + query, None, "application/json")
            if reply.status != 200:
                raise KubeError(reply.status, f"watch {path}: {reply.status}")
            while line := reply.readline():
                yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise KubeError(0, f"watch {path}: {error}") from error
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            return bool(self.request("GET", "/readyz") == "ok")
        except KubeError:
            return False

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(self.pki / f"{self.identity}.crt", self.pki / f"{self.identity}.key")
        host, _, port = self.endpoint.rpartition(":")
        return http.client.HTTPSConnection(host, int(port), timeout=timeout, context=context)

    def _send(
        self, connection: http.client.HTTPSConnection, method: str, path: str, body: Any, content_type: str
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "Content-Type": content_type}
        connection.request(method, path, data, headers)
        return connection.getresponse()
