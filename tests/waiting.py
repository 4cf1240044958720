"""Waiting for a condition: the one place of the tests where time passes."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_PAUSE = threading.Event()


def until(condition: Callable[[], T | None], what: str, *, timeout: float = 60, every: float = 0.2) -> T:
    """Calls the condition until it gives something true, and gives that.

    timeout and every are in seconds. Raises AssertionError that names what was waited for, caused by the
    condition's last exception if it raised one.
    """
    deadline = time.monotonic() + timeout
    last: Exception | None = None
    while True:
        try:
            found = condition()
        except Exception as error:
            found, last = None, error
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s in vain for {what}") from last
        _PAUSE.wait(every)


def remove(directory: Path) -> None:
    """Deletes a directory that others still write to."""

    def is_gone() -> bool:
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    until(is_gone, f"{directory} to be gone")
