"""What a preview says of a built file that becomes another: its digest, what it reaches, its origin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

BUILD = "pulumi-python:dynamic/cargo:Build"
NOTHING = "(none)"
# By the start of an import's name. What is not among them is called by its whole name.
CAPABILITIES = {
    "wasi:http/outgoing-handler": "HTTP requests",
    "wasi:http/client": "HTTP requests",
    "wasi:sockets/": "sockets",
    "wasi:tls/": "TLS",
    "wasi:filesystem/": "files",
    "wasi:cli/environment": "environment",
    "wasi:config/": "configuration",
    "wasi:cli/std": "standard streams",
    "wasi:cli/terminal-": "standard streams",
    "wasi:clocks/": "clocks",
    "wasi:random/": "random numbers",
    "wasi:keyvalue/": "key-value store",
    # Reach nothing by themselves.
    "wasi:io/": "",
    "wasi:http/types": "",
    "wasi:cli/exit": "",
}


@dataclass
class Change:
    """One built file: rows of a table (what, before, after), and which parts of its origin are others."""

    name: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    because: list[str] = field(default_factory=list)


def capabilities(imports: Iterable[str]) -> list[str]:
    """Say what a component reaches by its imports."""
    found = set()
    for name in imports:
        known = [word for start, word in CAPABILITIES.items() if name.startswith(start)]
        found.add(known[0] if known else name)
    return sorted(found - {""})


def _inputs(metadata: dict[str, Any] | None, which: str) -> dict[str, Any]:
    return ((metadata or {}).get(which) or {}).get("inputs") or {}


def _described(build: dict[str, Any], push: dict[str, Any]) -> dict[str, str]:
    """Give the rows of one side."""
    rows = {"digest": push.get("digest"), "bytes": f"{build['size']:,}" if "size" in build else None}
    if "imports" in build:
        rows["capabilities"] = ", ".join(capabilities(build["imports"])) or "none"
        rows["imports"] = ", ".join(build["imports"]) or "none"
        rows["exports"] = ", ".join(build.get("exports") or []) or "none"
    return {name: str(value) for name, value in rows.items() if value}


def read(changing: dict[str, dict[str, Any]]) -> list[Change]:
    """Tell of every build among the resources that change, given by name as the engine tells of them."""
    found = []
    for name, metadata in changing.items():
        before, after = _inputs(metadata, "old"), _inputs(metadata, "new")
        if metadata["type"] != BUILD or not after or before.get("sha256") == after.get("sha256"):
            continue
        change = Change(name.removesuffix("-build"))
        push = changing.get(f"{change.name}-push")
        old, new = (
            _described(build, _inputs(push, which)) for which, build in (("old", before), ("new", after))
        )
        made_of, makes = before.get("origin") or {}, after.get("origin") or {}
        if before:
            change.because = [part for part in makes if made_of.get(part) != makes[part]] if made_of else []
        # What people can read of the origin; the rest are sums.
        parts = [part for part in ("toolchain", "profile") if part in change.because]
        old |= {part: str(made_of[part]) for part in parts if part in made_of}
        new |= {part: str(makes[part]) for part in parts}
        change.rows = [
            (row, old.get(row, NOTHING), new.get(row, NOTHING)) for row in dict.fromkeys([*new, *old])
        ]
        found.append(change)
    return found
