"""A read-only page for the browser: what runs, what is stored, operations, last requests, VM consoles.

It needs a key, which `localcloud status` prints with the address: other users of this machine reach the port
too, and a console may show what is not for them. The key opens this page and nothing else. The page is one
document without a script, a font or a picture from elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from localcloud.home import Config
from localcloud.specs import Part
from localcloud.store import Json, Record, Store

PATH = "/status"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
SHOWN = {
    "artifactregistry.repositories": "repository",
    "cloudkms.cryptoKeys": "key",
    "compute.addresses": "address",
    "compute.disks": "disk",
    "compute.firewalls": "firewall",
    "compute.instances": "instance",
    "compute.networks": "network",
    "compute.routers": "router",
    "compute.subnetworks": "subnetwork",
    "container.clusters": "cluster",
    "iam.serviceAccounts": "service account",
}
_OPERATIONS = 20
_CONSOLE_LINES = 40
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; max-width: 75em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 0 0 2em } th, td { text-align: left; padding: .15em 1.2em .15em 0 }
th { color: #666; font-weight: normal } td { border-top: 1px solid #ddd; vertical-align: top }
pre { background: #f4f4f4; padding: .8em; overflow: auto; max-height: 30em }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } pre { background: #222 }
  td { border-color: #333 } th { color: #999 }
}
"""


@dataclass(frozen=True)
class Seen:
    """A request that was answered: `at` is seconds since the epoch, `took` milliseconds."""

    at: float
    verb: str
    path: str
    status: int
    took: float


@dataclass(frozen=True)
class Status:
    """What the page shows; `consoles` has the text of each instance's serial port."""

    config: Config
    parts: Sequence[Part]
    resources: Sequence[tuple[str, Record]]
    operations: Sequence[Record]
    requests: Sequence[Seen]
    consoles: dict[str, str]


def key(config: Config) -> str:
    """What opens the page: derived from the developer's token, which it does not give away."""
    return hmac.new(config.token.encode(), b"status page", hashlib.sha256).hexdigest()[:32]


def url(config: Config) -> str:
    return f"{config.url}{PATH}?key={key(config)}"


def resources(store: Store) -> list[tuple[str, Record]]:
    """The user's resources by their kind; what every project has from the first is left out."""
    return [
        (name, record) for kind, name in SHOWN.items() for record in store.list(kind) if not record.is_seed
    ]


def latest(operations: Iterable[Record]) -> list[Record]:
    """The last operations, the newest first."""
    return sorted(operations, key=lambda record: int(record.private["order"]), reverse=True)[:_OPERATIONS]


def render(status: Status) -> str:
    """The page, as HTML."""
    sections = [
        _table(
            "Parts",
            ["name", "state", "pid"],
            [[part.name, part.state, part.pid or ""] for part in status.parts],
        ),
        _table(
            "Resources",
            ["type", "name", "status"],
            [
                [kind, record.name, record.body.get("statusMessage") or record.body.get("status", "")]
                for kind, record in status.resources
            ],
        ),
        _table(
            "Operations",
            ["operation", "on", "state"],
            [
                [
                    record.body.get("operationType", record.private["task"]),
                    record.private["target"],
                    _state(record.body, done=record.private["done"]),
                ]
                for record in status.operations
            ],
        ),
        _table(
            "Last requests",
            ["at", "request", "status", "ms"],
            [
                [
                    time.strftime("%H:%M:%S", time.localtime(item.at)),
                    f"{item.verb} {item.path}",
                    item.status,
                    f"{item.took:.0f}",
                ]
                for item in reversed(status.requests)
            ],
        ),
        *(
            f"<h2>Console of {escape(name)}</h2><pre>{escape(_last_lines(text))}</pre>"
            for name, text in status.consoles.items()
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>localcloud</title>'
        f'<meta http-equiv="refresh" content="5"><style>{_STYLE}</style></head>'
        f"<body><h1>localcloud</h1><p>{escape(status.config.url)}, project "
        f"{escape(status.config.project)}</p>{''.join(sections)}</body></html>"
    )


def _state(body: Json, *, done: bool) -> str:
    error = body.get("error")
    if error:
        return f"failed: {error.get('message') or error.get('errors') or error}"
    return "done" if done else "running"


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-_CONSOLE_LINES:])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return (
        f"<h2>{escape(title)}</h2><table><tr>{heads}</tr>"
        f"{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    )
