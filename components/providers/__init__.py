"""Dynamic providers, one a file, and the little that they share.

A provider class is pickled into the state by reference: it lives in an importable module and its instances
hold no data, so an edit inside it is no change of a resource. The work is in plain functions that know no
Pulumi.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pulumi
from pulumi.dynamic import DiffResult, ReadResult
from pulumi.output import Unknown

P = ParamSpec("P")
R = TypeVar("R")


class ProviderError(Exception):
    """What went wrong with a resource and what to do next, in a line or two; no traceback is shown for it."""


def is_unknown(value: object) -> bool:
    """Say whether an input is not known yet, which is how a preview hands over another resource's output."""
    return isinstance(value, Unknown) or value == pulumi.runtime.rpc.UNKNOWN


def operation(function: Callable[P, R]) -> Callable[P, R]:
    """Let a ProviderError reach the user as its message alone; any other exception keeps its traceback.

    Pulumi's host for dynamic providers formats every exception with its traceback, and `sys.tracebacklimit`
    is the one thing it listens to.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if hasattr(sys, "tracebacklimit"):
            del sys.tracebacklimit
        try:
            return function(*args, **kwargs)
        except ProviderError as error:
            sys.tracebacklimit = 0
            raise error from None

    return wrapper


def changed(olds: dict[str, Any], news: dict[str, Any], *, replace: set[str], update: set[str]) -> DiffResult:
    """Compare the named inputs only: a change in `replace` needs a new resource, in `update` an update.

    Everything else in the bags (outputs, where a file happens to lie) cannot matter and is not looked at.
    """
    differs = {key for key in replace | update if olds.get(key) != news.get(key)}
    return DiffResult(changes=bool(differs), replaces=sorted(differs & replace))


class Lazy:
    """A module that is imported when something of it is first asked for.

    The program and the providers' host import every provider at each preview, which seldom needs the clients
    of what lies outside. The host works in several threads. Two that import what needs each other would wait
    for one another, and Python then hands out a module that is half made: so it is one after the other.
    """

    _importing = threading.RLock()

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        with Lazy._importing:
            module = importlib.import_module(self._name)
        return getattr(module, attribute)


def cache_directory() -> Path:
    """Give the project's cache, `${XDG_CACHE_HOME:-~/.cache}/awesome-wasm`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path in this variable is invalid and is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "awesome-wasm"


def gone() -> ReadResult:
    """Say to a refresh that the thing is not there any more: the next update makes it again."""
    return ReadResult("", {})
