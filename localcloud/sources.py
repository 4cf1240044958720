"""Where this checkout is, under a name that every list and URL can hold, and which state its code is in."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

TOOLS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd", "registry")
# PATH, PYTHONPATH and KUBECONFIG are split at `:`; `#`, `?` and `%` end or escape a part of a URL; quotes and
# `$` have a meaning in configuration files and scripts.
_PLAIN = re.compile(r"[\w /.,+@~=-]*")


def plain(path: Path, cache: Path) -> Path:
    """The path, or a link to it below `cache` where it has a character that somebody would take for syntax.

    Where the link cannot be made, it is the path itself.
    """
    if _PLAIN.fullmatch(str(path)):
        return path
    link = cache / "checkouts" / hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    with contextlib.suppress(OSError):
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(path)
        if link.samefile(path):
            return link
    return path


def xdg(variable: str, default: str) -> Path:
    """This project's directory below one of the XDG base directories."""
    value = os.environ.get(variable, "")
    # The XDG specification: a relative path in these variables is invalid and is to be ignored.
    base = Path(value) if Path(value).is_absolute() else Path.home() / default
    return base / "awesome-wasm"


CHECKOUT = plain(Path(__file__).resolve().parent.parent, xdg("XDG_CACHE_HOME", ".cache"))


def build() -> dict[str, str]:
    """What a localcloud that is started now consists of: a digest of its sources, its Python, its tools.

    A tool that is not on PATH is left out.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*")):
        # Not what Python and an editor leave there.
        if path.is_file() and "__pycache__" not in path.parts and path.suffix in ("", ".py"):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package)} {len(content)}\n".encode())
            digest.update(content)
    found = {tool: shutil.which(tool) for tool in TOOLS}
    tools = {tool: os.path.realpath(path) for tool, path in found.items() if path is not None}
    return {"sources": digest.hexdigest(), "python": sys.prefix, **tools}
