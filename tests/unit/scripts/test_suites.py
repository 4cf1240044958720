"""The suites of ./scripts/test run in two lanes, and end at the first that fails."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

from scripts.lib import clean, commands, environment, paths, prerequisites
from scripts.lib.commands import Suite
from scripts.lib.steps import StepError


@pytest.fixture(autouse=True)
def _nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(commands, "_build", lambda **_: None)
    monkeypatch.setattr(prerequisites, "check_places", lambda: None)
    monkeypatch.setattr(clean, "in_use", contextlib.nullcontext)
    monkeypatch.setattr(environment, "before_localcloud", lambda **_: dict(os.environ))


def _suites(monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Each suite is a program in Python; those that are not named do nothing."""
    for name in commands.SUITES:
        suite = Suite((sys.executable, "-c", programs.get(name, "")))
        monkeypatch.setitem(commands.SUITES, name, [suite])


def _meet(mine: Path, other: Path) -> str:
    """A program that says that it is there, and ends when the other one does."""
    return (
        f"import pathlib, time; pathlib.Path({str(mine)!r}).touch()\n"
        f"while not pathlib.Path({str(other)!r}).exists(): time.sleep(0.02)\n"
        f"print('met', {other.name!r})"
    )


def test_every_suite_has_its_place_in_one_lane() -> None:
    assert sorted(name for lane in commands.LANES for name in lane) == sorted(commands.SUITES)


def test_the_lanes_run_beside_each_other_and_show_what_their_suites_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _suites(monkeypatch, integration=_meet(one, two), e2e=_meet(two, one))
    commands.test(list(commands.SUITES))
    shown = capsys.readouterr().out
    assert {"met one", "met two", "all green"} <= set(shown.splitlines())
    assert [shown.index(f"── {name} begins") for name in commands.LANES[0]] == sorted(
        shown.index(f"── {name} begins") for name in commands.LANES[0]
    )


def test_the_first_that_fails_is_named_and_ends_the_other_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = tmp_path / "pid"
    endless = f"""if True:
        import os, pathlib, time
        made = pathlib.Path({str(pid)!r}).with_suffix(".new")
        made.write_text(str(os.getpid()))
        made.rename({str(pid)!r})
        time.sleep(600)
    """
    fails = f"""if True:
        import pathlib, sys, time
        while not pathlib.Path({str(pid)!r}).exists():
            time.sleep(0.02)
        sys.exit("the reason")
    """
    _suites(monkeypatch, unit=fails, e2e=endless)
    with pytest.raises(StepError, match=r"(?s)^unit: .* exited with 1$"):
        commands.test(list(commands.SUITES))
    shown = capsys.readouterr().out
    assert "the reason" in shown
    assert "── integration begins" not in shown
    assert "all green" not in shown
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_suites_of_one_lane_print_as_they_go(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _suites(monkeypatch, app="print('of the app')")
    commands.test(["app"])
    shown = capfd.readouterr().out
    assert "of the app\n" in shown
    assert "begins" not in shown
