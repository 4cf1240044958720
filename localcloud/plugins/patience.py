"""How long a plugin goes on asking a server that is away or asks for a pause.

A server that answered before comes back: it was restarted, or is busy. One that never answered in this run
may not exist, and waiting for it would only hide that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from localcloud.plugins.protocol import ProviderError

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 2.0

Result = TypeVar("Result")


class TransientError(ProviderError):
    """A fault that goes away by itself.

    `answered`: the server said it, so it is there. `maybe_done`: the request may have done its work all the
    same. `retry_after`: the pause that the server asks for, in seconds.
    """

    answered = False
    maybe_done = False
    retry_after = 0.0


def retry_after(header: str | None) -> float:
    """The seconds of a Retry-After header; its other form, a date, is for longer than we would wait."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


@dataclass
class Patience:
    """Repeats what failed for a passing reason; `tell` shows at the resource what is waited for."""

    cancelled: threading.Event
    tell: Callable[[str], None] = lambda _: None
    seconds: float = 60
    reached: bool = field(default=False, init=False)

    def through(self, attempt: Callable[[], Result], *, repeatable: bool = True) -> Result:
        """The result of the first attempt that succeeds.

        What is not `repeatable` is tried again only after a fault that says that nothing was done. Raises the
        last `TransientError`, whose `maybe_done` then speaks for all attempts.
        """
        began, pause, maybe_done = time.monotonic(), _FIRST_PAUSE_SECONDS, False
        while True:
            try:
                result = attempt()
            except TransientError as error:
                self.reached = self.reached or error.answered
                error.maybe_done = maybe_done = maybe_done or error.maybe_done
                wait = max(pause, error.retry_after)
                waited = time.monotonic() - began
                if not self.reached or (maybe_done and not repeatable) or waited + wait > self.seconds:
                    raise
                self.tell(f"{error}; trying again, for {waited:.0f} s now")
                if self.cancelled.wait(wait):
                    raise
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)
            else:
                self.reached = True
                return result
