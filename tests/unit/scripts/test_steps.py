"""What a person sees of a step, and of a machine that lacks something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lib import paths, prerequisites
from scripts.lib.steps import Log, StepError, lock, step


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "LOGS", tmp_path / "logs")


def test_a_step_shows_its_name_and_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert step("add", lambda _log: 2, lambda sum_: f"it is {sum_}") == 2
    assert capsys.readouterr().out.startswith("  ✓ add  0.")


def test_a_step_that_fails_shows_the_end_of_its_own_log_and_where_the_rest_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "import sys; print(*range(100), 'the reason', sep='\\n'); sys.exit(7)"
    with pytest.raises(StepError) as caught:
        step("build it", lambda log: log.run([sys.executable, "-c", code]))
    message = str(caught.value)
    assert message.startswith(f"build it: {Path(sys.executable).name} exited with 7\n")
    assert "    the reason" in message
    assert "    50\n" not in message
    log = paths.LOGS / "build-it.log"
    assert message.endswith(f"the whole log: {log}")
    assert "\n50\n" in log.read_text()
    assert "✗ build it" in capsys.readouterr().out


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="cannot start no-such-program: No such file"):
        Log(tmp_path / "log").run(["no-such-program"])


def test_an_interrupted_step_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not started:
            started.append(process)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path / "log").run([sys.executable, "-c", "import time; time.sleep(60)"])
    # Killed at last where interrupts are ignored, as in a shell's background job.
    assert started[0].returncode in (-signal.SIGINT, 1, -signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(path)]
    with lock(path):
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_who_waits_is_told_and_is_not_fooled_by_a_lock_that_was_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from scripts.lib.steps import lock\n"
        "with lock(Path(sys.argv[1]), 'waiting'): print('held', Path(sys.argv[1]).exists(), flush=True)"
    )
    with lock(path, "waiting"):
        second = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=paths.REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert second.stdout
        assert second.stdout.readline() == "waiting\n"
        path.unlink()
    assert second.communicate()[0] == "held True\n"
    assert capsys.readouterr().out == ""


def _programs(directory: Path, **versions: str) -> None:
    for name, printed in versions.items():
        (directory / name).write_text(f"#!/bin/sh\necho '{printed}'\n")
        (directory / name).chmod(0o755)


def test_what_is_missing_or_too_old_is_named_at_once_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _programs(tmp_path, go="go version go1.21.5 linux/amd64", git="git version 2.43.0", cc="cc 12")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin-of-nobody")
    with pytest.raises(StepError) as caught:
        prerequisites.check()
    lines = str(caught.value).splitlines()
    assert lines[0] == "prerequisites:"
    assert [line.split()[0] for line in lines[1:]] == ["Go", "Rust", "curl"]
    assert "Go 1.21 is too old, 1.26 is needed; to install: " in lines[1]
    assert "Rust through rustup is missing; to install: " in lines[2]


def test_a_machine_that_has_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(
        tmp_path,
        go="go version go1.26.1 linux/amd64",
        git="git version 2.43.0",
        rustup="rustup 1.28.2 (e4f3ad6f8 2025-04-28)",
        curl="curl 8.5.0 (x86_64-pc-linux-gnu)",
        gcc="gcc",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin-of-nobody")
    prerequisites.check()
