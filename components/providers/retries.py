"""How a client goes on when the other side is away: what is tried again, when, and how it is told."""

from __future__ import annotations

import time

import requests

ATTEMPTS = 4
AWAY = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def is_away(response: requests.Response) -> bool:
    """Say whether an answer may be another one in a while."""
    return response.status_code == 429 or response.status_code >= 500


def wait_before(attempt: int) -> None:
    """Wait before an attempt, the first of which is number 0; longer before each."""
    if attempt:
        time.sleep(0.5 * 2**attempt)


def reason(error: requests.RequestException) -> str:
    """Give what failed, without the layers that it came through."""
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause)).rsplit(": ", 1)[-1]
