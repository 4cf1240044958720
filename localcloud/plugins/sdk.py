"""Pulumi's generated messages without the SDK around them, whose import is most of a plugin's start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_run() -> Iterator[None]:
    """Have the packages above `pulumi.runtime.proto` found and not run while that is imported.

    Whoever imports the SDK afterwards gets the whole of it.
    """
    bare = [name for name in ("pulumi", "pulumi.runtime") if name not in sys.modules]
    try:
        for name in bare:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules[name] = importlib.util.module_from_spec(spec)
        yield
    finally:
        for name in bare:
            sys.modules.pop(name, None)
