"""Modules that are imported when they are first used, in a host that works in several threads."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.providers import Lazy

# Long enough for another thread to begin as well, if it may.
PATIENCE = 0.5
MODULE = """
import meeting
meeting.BEGUN["{own}"].set()
met = meeting.BEGUN["{other}"].wait({patience})
"""


def test_two_threads_import_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two clients that stand on one library, as requests, could each find it half made."""
    names = ("lazily_one", "lazily_two")
    (tmp_path / "meeting.py").write_text(
        f"import threading\nBEGUN = {{name: threading.Event() for name in {names!r}}}\n"
    )
    for own, other in (names, names[::-1]):
        (tmp_path / f"{own}.py").write_text(MODULE.format(own=own, other=other, patience=PATIENCE))
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        met = list(pool.map(lambda name: Lazy(name).met, names))
    for name in (*names, "meeting"):
        sys.modules.pop(name)
    assert sorted(met) == [False, True], "the second one finds that the first has been"
