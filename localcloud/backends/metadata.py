"""Google's metadata server for one instance, on a port of the instance's own address.

    python -m localcloud.backends.metadata NAME

Paths, headers, redirects and error pages are those of https://cloud.google.com/compute/docs/metadata.
Attributes, tags and scopes are read from localcloud's store at each request, so a change is seen at once,
also by a request that waits for it (`wait_for_change`). Tokens are minted by localcloud/tokens.py.

All instances share this machine's loopback network, so that the caller is looked up: one that is no process
of the instance gets nothing.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from localcloud.backends.callers import is_call_of
from localcloud.backends.processes import mark
from localcloud.backends.rootfs import Rootfs
from localcloud.home import Home
from localcloud.identity import mint_identity_token
from localcloud.specs import PROJECT_NUMBER, InstanceSpec
from localcloud.store import Store, instance_key
from localcloud.tokens import AccessToken, mint_access_token

_FLAVOR = "Metadata-Flavor"
_UNIVERSE = "googleapis.com"
# Google's server gives out a cached token until five minutes before its end.
_TOKEN_MARGIN_SECONDS = 300
_POLL_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 3600


@dataclass(frozen=True)
class Lines:
    """A list that is one item a line as text."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Numbered:
    """A directory of values that are numbered from 0; a list in JSON."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Hidden:
    """A value that is made when it is asked for, of the question's parameters, and left out of recursive
    answers.
    """

    make: Callable[[dict[str, list[str]]], Answer]


@dataclass(frozen=True)
class Keyed:
    """A directory whose keys are data (attributes, accounts): their spelling is kept in JSON."""

    entries: dict[str, Any]


Node = Any  # str | int | list | dict | Lines | Numbered | Hidden | Keyed


@dataclass(frozen=True)
class Answer:
    """What a request gets; `etag` names its content."""

    status: int
    body: str
    content_type: str = "application/text"
    location: str = ""

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.body.encode()).hexdigest()[:16]


class Metadata:
    """The values of one instance."""

    def __init__(self, home: Home, spec: InstanceSpec) -> None:
        self._home = home
        self._spec = spec
        self._store = Store(home.store_path, read_only=True)
        self._token: AccessToken | None = None
        self._lock = threading.Lock()

    def tree(self) -> dict[str, Node]:
        """Every value, as nested directories."""
        spec = self._spec
        record = None
        if self._home.store_path.exists():
            record = self._store.get(instance_key(spec.project, spec.zone, spec.name))
        body = record.body if record is not None else {}
        items = body.get("metadata", {}).get("items", []) if record is not None else None
        attributes = (
            dict(spec.metadata) if items is None else {item["key"]: item.get("value", "") for item in items}
        )
        project = f"projects/{PROJECT_NUMBER}"
        return {
            "instance": {
                "attributes": Keyed(attributes),
                "cpu-platform": "Unknown CPU Platform",
                "description": body.get("description", ""),
                "disks": [
                    {
                        "device-name": "persistent-disk-0",
                        "index": 0,
                        "interface": "SCSI",
                        "mode": "READ_WRITE",
                        "type": "PERSISTENT-BALANCED",
                    }
                ],
                "hostname": spec.hostname,
                "id": int(spec.id),
                "image": "",
                "machine-type": f"{project}/machineTypes/{spec.machine_type}",
                "maintenance-event": "NONE",
                "name": spec.name,
                "network-interfaces": [self._interface(body)],
                "preempted": "FALSE",
                "scheduling": {
                    "automatic-restart": "TRUE",
                    "on-host-maintenance": "MIGRATE",
                    "preemptible": "FALSE",
                },
                "service-accounts": Keyed(self._accounts(body)),
                "tags": list(body.get("tags", {}).get("items", [])),
                "zone": f"{project}/zones/{spec.zone}",
            },
            "project": {
                "attributes": Keyed({}),
                "numeric-project-id": int(PROJECT_NUMBER),
                "project-id": spec.project,
            },
            "universe": {"universe-domain": _UNIVERSE},
        }

    def _interface(self, body: dict[str, Any]) -> dict[str, Node]:
        ip = self._spec.ip
        ranges = self._spec.alias_ranges
        for interface in body.get("networkInterfaces", []):
            ranges = tuple(alias["ipCidrRange"] for alias in interface.get("aliasIpRanges", []))
        octets = ":".join(f"{int(part):02x}" for part in ip.split("."))
        return {
            "access-configs": [{"external-ip": ip, "type": "ONE_TO_ONE_NAT"}],
            "dns-servers": Lines(()),
            "forwarded-ips": Numbered(()),
            "gateway": ip,
            "ip": ip,
            "ip-aliases": Numbered(ranges),
            "mac": f"42:01:{octets}",
            "mtu": 1460,
            "network": f"projects/{PROJECT_NUMBER}/networks/default",
            "subnetmask": "255.255.255.255",
            "target-instance-ips": Numbered(()),
        }

    def _accounts(self, body: dict[str, Any]) -> dict[str, Node]:
        listed = body.get("serviceAccounts", [])
        email = listed[0].get("email", "") if listed else self._spec.service_account_email
        scopes = tuple(listed[0].get("scopes", [])) if listed else self._spec.scopes
        if not email:
            return {}
        account = {
            "aliases": Lines(("default",)),
            "email": email,
            "scopes": Lines(scopes),
            "token": Hidden(lambda _query: self._access_token(email, scopes)),
            "identity": Hidden(lambda query: self._identity(email, body, query)),
        }
        return {email: account, "default": account}

    def _identity(self, email: str, body: dict[str, Any], query: dict[str, list[str]]) -> Answer:
        """An identity token for an audience; `format=full` says of which instance."""
        audience = query.get("audience", [""])[-1]
        if not audience:
            return _page(400, "Bad Request", "non-empty audience parameter required")
        form = query.get("format", ["standard"])[-1].lower()
        if form not in ("standard", "full"):
            return _page(400, "Bad Request", "The value of format must be standard or full.")
        account = self._store.get(f"projects/{self._spec.project}/serviceAccounts/{email}")
        subject = account.body["uniqueId"] if account is not None else email
        claims: dict[str, Any] = {"aud": audience, "azp": subject, "sub": subject}
        claims |= {"email": email, "email_verified": True}
        if form == "full":
            claims["google"] = {
                "compute_engine": {
                    "instance_creation_timestamp": _seconds(body.get("creationTimestamp", "")),
                    "instance_id": self._spec.id,
                    "instance_name": self._spec.name,
                    "project_id": self._spec.project,
                    "project_number": int(PROJECT_NUMBER),
                    "zone": self._spec.zone,
                }
            }
        return Answer(200, mint_identity_token(self._home, claims), "text/html")

    def _access_token(self, email: str, scopes: tuple[str, ...]) -> Answer:
        with self._lock:
            token = self._token
            known = token is not None and (token.email, token.scopes) == (email, scopes)
            if token is None or not known or token.expires_in <= _TOKEN_MARGIN_SECONDS:
                token = self._token = mint_access_token(self._home, email, scopes)
        body = {"access_token": token.value, "expires_in": token.expires_in, "token_type": "Bearer"}
        return Answer(200, json.dumps(body), "application/json")


def answer(tree: dict[str, Node], path: str, query: dict[str, list[str]]) -> Answer:
    """The answer for a path below the server's root, before any waiting.

    `tree` is what stands under computeMetadata/v1.
    """
    node: Node = {"computeMetadata": {"v1": tree}}
    for part in (unquote(part) for part in path.split("/") if part):
        node = _child(node, part)
        if node is None:
            return not_found()
    alternative = query.get("alt", [""])[-1]
    if alternative not in ("", "json", "text"):
        return _page(400, "Bad Request", "The value of alt must be json or text.")
    if _is_directory(node):
        recursive = query.get("recursive", ["false"])[-1].lower() == "true"
        return _directory_answer(node, path, alternative, recursive=recursive)
    if isinstance(node, Hidden):
        return node.make(query)
    if alternative == "json":
        return Answer(200, json.dumps(_plain(node)), "application/json")
    return Answer(200, _text(node))


def _directory_answer(node: Node, path: str, alternative: str, *, recursive: bool) -> Answer:
    if not path.endswith("/"):
        return Answer(301, "", "text/html", location=f"{path}/")
    if not recursive:
        return Answer(200, "".join(_listing(node)))
    if alternative == "text":
        return Answer(200, "".join(f"{name} {value}\n" for name, value in _flat(node, "")))
    return Answer(200, json.dumps(_plain(node), separators=(",", ":")), "application/json")


def _is_directory(node: Node) -> bool:
    # A list of plain words (tags) is a value; a list of directories is one itself.
    return isinstance(node, dict | Keyed | Numbered) or (
        isinstance(node, list) and bool(node) and isinstance(node[0], dict)
    )


def _entries(node: Node) -> dict[str, Node]:
    if isinstance(node, Keyed):
        return node.entries
    if isinstance(node, Numbered):
        node = list(node.items)
    if isinstance(node, list):
        return {str(index): item for index, item in enumerate(node)}
    return dict(node)


def _child(node: Node, name: str) -> Node | None:
    return _entries(node).get(name) if _is_directory(node) else None


def _listing(node: Node) -> Iterator[str]:
    for name, child in sorted(_entries(node).items()):
        yield f"{name}/\n" if _is_directory(child) else f"{name}\n"


def _plain(node: Node) -> Any:
    """As JSON: names in camel case, values that are made on demand left out."""
    if isinstance(node, Lines | Numbered):
        return list(node.items)
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not _is_directory(node):
        return node
    visible = {name: child for name, child in _entries(node).items() if not isinstance(child, Hidden)}
    if isinstance(node, Keyed):
        return {name: _plain(child) for name, child in visible.items()}
    return {_camel(name): _plain(child) for name, child in visible.items()}


def _flat(node: Node, prefix: str) -> Iterator[tuple[str, str]]:
    for name, child in sorted(_entries(node).items()):
        if _is_directory(child):
            yield from _flat(child, f"{prefix}{name}/")
        elif not isinstance(child, Hidden):
            yield f"{prefix}{name}", _text(child).rstrip("\n")


def _text(node: Node) -> str:
    if isinstance(node, Lines):
        return "".join(f"{item}\n" for item in node.items)
    return json.dumps(node) if isinstance(node, list) else str(node)


def _camel(name: str) -> str:
    return re.sub(r"-(.)", lambda match: match.group(1).upper(), name)


def not_found() -> Answer:
    return _page(404, "Not Found", "The requested URL was not found on this server.")


def forbidden(reason: str) -> Answer:
    return _page(403, "Forbidden", f"Your client does not have permission to get this URL: {reason}.")


def _seconds(time_stamp: str) -> int:
    try:
        return int(datetime.fromisoformat(time_stamp).timestamp())
    except ValueError:
        return 0


def _page(status: int, title: str, text: str) -> Answer:
    body = (
        f"<!DOCTYPE html>\n<html lang=en>\n<title>Error {status} ({title})</title>\n"
        f"<p><b>{status}.</b> <ins>{html.escape(text)}</ins>\n"
    )
    return Answer(status, body, "text/html; charset=UTF-8")


def waited_answer(
    tree: Callable[[], dict[str, Node]], path: str, query: dict[str, list[str]], alive: Callable[[], bool]
) -> Answer:
    """Like `answer`; with `wait_for_change=true` not before the content differs from `last_etag` (without it,
    from the content now), or `timeout_sec` is over.
    """
    first = answer(tree(), path, query)
    if query.get("wait_for_change", ["false"])[-1].lower() != "true" or first.status != 200:
        return first
    etag = query.get("last_etag", [first.etag])[-1]
    try:
        seconds = float(query.get("timeout_sec", [str(_LONGEST_WAIT_SECONDS)])[-1])
    except ValueError:
        return _page(400, "Bad Request", "The value of timeout_sec must be a number of seconds.")
    deadline = time.monotonic() + min(seconds, _LONGEST_WAIT_SECONDS)
    current = first
    while current.etag == etag and time.monotonic() < deadline and alive():
        time.sleep(_POLL_SECONDS)
        current = answer(tree(), path, query)
    return current


class Handler(BaseHTTPRequestHandler):
    """One request; `server` carries the values."""

    server: MetadataServer
    protocol_version = "HTTP/1.1"
    timeout = 3700

    def do_GET(self) -> None:
        try:
            url = urlsplit(self.path)
        except ValueError:
            self._send(_page(400, "Bad Request", "The request's path is no path."))
            return
        query = parse_qs(url.query, keep_blank_values=True)
        if url.path == "/":
            # How client libraries find out that they run on Google: any answer with the header will do.
            self._send(Answer(200, "computeMetadata/\n"))
        elif self.headers.get(_FLAVOR) != "Google" or "X-Forwarded-For" in self.headers:
            self._send(forbidden(f"missing {_FLAVOR}: Google header"))
        elif not self._is_own:
            self._send(forbidden("it is not a process of this instance"))
        else:
            self._send(waited_answer(self.server.metadata.tree, url.path, query, self._is_connected))

    @cached_property
    def _is_own(self) -> bool:
        return self.server.is_own(self.connection)

    do_HEAD = do_GET  # noqa: N815  http.server's name

    def _is_connected(self) -> bool:
        """Whether the client still waits: a closed connection can be read from, to no effect."""
        self.connection.setblocking(False)
        try:
            return len(self.connection.recv(1, socket.MSG_PEEK)) > 0
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self.connection.settimeout(self.timeout)

    def _send(self, reply: Answer) -> None:
        data = reply.body.encode()
        self.send_response(reply.status)
        self.send_header(_FLAVOR, "Google")
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-XSS-Protection", "0")
        self.send_header("X-Frame-Options", "SAMEORIGIN")
        if reply.location:
            self.send_header("Location", f"http://{self.headers.get('Host', '')}{reply.location}")
        if reply.status == 200:
            self.send_header("ETag", reply.etag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def version_string(self) -> str:
        return "Metadata Server for VM"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  http.server's name
        """Nothing: a request may carry what is nobody else's."""


class MetadataServer(ThreadingHTTPServer):
    """Listens on the instance's address. `is_own` says whether a connection comes from the instance."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, address: tuple[str, int], metadata: Metadata, is_own: Callable[[socket.socket], bool]
    ) -> None:
        super().__init__(address, Handler)
        self.metadata = metadata
        self.is_own = is_own


def main() -> None:
    home = Home.locate()
    rootfs = Rootfs(home, sys.argv[1])
    spec = rootfs.load()
    host, _, port = rootfs.metadata_host(spec).rpartition(":")
    own = partial(is_call_of, mark(home.root, rootfs.scope))
    with MetadataServer((host, int(port)), Metadata(home, spec), own) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
