"""./scripts/test official never passes without an official plugin."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from scripts.lib import commands, official
from tests.unit.conftest import REPOSITORY


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any plugin; gives a directory on its PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path / "pulumi"))
    return directory


def _plugin(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.usefixtures("machine")
def test_without_an_official_plugin_nothing_is_run_and_nothing_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(official, "run", lambda _found: pytest.fail("it was run"))
    assert official.main() == official.NOT_RUN != 0
    output = capsys.readouterr()
    assert "NOT RUN" in output.err
    assert f"pulumi plugin install resource gcp v{official.wanted('gcp')}" in output.err


def test_a_stand_in_is_no_official_plugin(machine: Path) -> None:
    for name in official.PLUGINS:
        own = REPOSITORY / "localcloud" / "plugins" / name / f"pulumi-resource-{name}"
        _plugin(machine / own.name, own.read_text())
        assert official.find(name) is None
        # where `localcloud env` links it to
        place = Path(os.environ["PULUMI_HOME"], "plugins", f"resource-{name}-v{official.wanted(name)}")
        place.mkdir(parents=True)
        (place / own.name).symlink_to(own)
        assert official.find(name) is None


def test_only_the_version_that_the_sdk_asks_for_counts_among_those_installed(
    machine: Path, tmp_path: Path
) -> None:
    plugins = tmp_path / ".pulumi/plugins"
    _plugin(plugins / "resource-gcp-v7.0.0/pulumi-resource-gcp", "\x7fELF")
    assert official.find("gcp") is None
    right = _plugin(plugins / f"resource-gcp-v{official.wanted('gcp')}/pulumi-resource-gcp", "\x7fELF")
    assert official.find("gcp") == right
    other = _plugin(machine / "pulumi-resource-command", "\x7fELF")
    assert official.find("command") == other


def test_a_run_says_which_versions_it_used_and_fails_as_its_steps_do(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plugin(machine / "pulumi-resource-gcp", "\x7fELF")
    monkeypatch.setattr(official, "version", lambda _path: "9.35.0")
    for status in (0, 1):
        monkeypatch.setattr(official, "run", lambda _found, status=status: status)
        assert official.main() == status
        output = capsys.readouterr().out
        assert "gcp: official plugin 9.35.0" in output
        assert "kubernetes: no official plugin" in output
        assert ("passed with official plugins: gcp" in output) == (status == 0)


def test_it_runs_only_when_it_is_named() -> None:
    assert "official" not in commands.SUITES
    assert commands.ON_REQUEST["official"][0].command[-1] == "scripts.lib.official"
