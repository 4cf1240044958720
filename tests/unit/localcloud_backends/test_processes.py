"""Ending what is ours and nothing else."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localcloud.backends import processes
from localcloud.backends.processes import MARK, end, mark, marked, start_time, wait_until

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
)


@pytest.fixture
def launched() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def launch(code: str, value: str = "") -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, MARK: value}, stdout=subprocess.PIPE
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.wait()


def test_a_start_time_stays_the_same_and_is_gone_with_the_process(
    launched: Callable[..., subprocess.Popen[bytes]],
) -> None:
    process = launched("import time; time.sleep(99)")
    first = start_time(process.pid)
    assert first is not None
    assert start_time(process.pid) == first
    process.kill()
    assert wait_until(lambda: start_time(process.pid) is None, 5), "a zombie counts as ended"


def test_a_start_time_can_be_had_where_there_is_no_proc(
    launched: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_HAS_PROC", False)
    process = launched("import time; time.sleep(99)")
    first = start_time(process.pid)
    assert first is not None
    assert start_time(process.pid) == first
    process.kill()
    process.wait()
    assert start_time(process.pid) is None


def test_only_processes_with_the_mark_are_found(
    launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    mine = launched("import time; time.sleep(99)", mark(tmp_path, "instances/a", "x"))
    other = launched("import time; time.sleep(99)", mark(tmp_path, "instances/a-b", "x"))
    assert wait_until(lambda: len(marked(f"{tmp_path}#")) == 2, 5)
    assert marked(f"{tmp_path}#instances/a#") == [mine.pid]
    assert set(marked(f"{tmp_path}#")) == {mine.pid, other.pid}


def test_what_ignores_sigterm_is_killed(
    launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = launched(STUBBORN, mark(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    assert end(lambda: marked(f"{tmp_path}#"), grace=0.2) == []
    assert process.wait() == -signal.SIGKILL


def test_ending_nothing_is_quick() -> None:
    assert end(list) == []
