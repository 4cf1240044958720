"""The project's cache on this machine. A built file lies there under its sum, so that no state has a path."""

from __future__ import annotations

import hashlib
from pathlib import Path

from components.providers import ProviderError, cache_directory


class CacheError(ProviderError):
    """A built file is not in the cache, or is not what it was."""


def place(sha256: str, name: str) -> Path:
    """Give where the file with a sum (hex) is kept."""
    return cache_directory() / "builds" / sha256 / name


def read_built(sha256: str) -> bytes:
    """Read the built file with a sum. Raises CacheError when it is not there or is another."""
    found = sorted((cache_directory() / "builds" / sha256).glob("*"))
    for path in found:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
    if found:
        raise CacheError(f"{found[0]} is not the file that was built: remove it and run `pulumi up` again")
    raise CacheError(f"what was built with the sum {sha256[:12]} is not in the cache: run `pulumi up` again")
