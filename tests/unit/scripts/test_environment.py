"""The environment for working by hand leads to localcloud, or there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localcloud import endpoints
from localcloud.home import Config, Home
from scripts.lib import environment, paths, toolchain, venv
from scripts.lib.steps import StepError
from tests.unit.conftest import REPOSITORY


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A checkout that nothing was started in, on a machine where all is built."""
    found = Home(tmp_path / ".localcloud")
    monkeypatch.setattr(paths, "LOCALCLOUD_HOME", found.root)
    monkeypatch.setattr(paths, "PASSPHRASE", tmp_path / "passphrase")
    monkeypatch.setattr(toolchain, "directories", lambda **_: [])
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path / "pulumi"))
    for name in ("GOOGLE_COMPUTE_CUSTOM_ENDPOINT", "GOOGLE_OAUTH_ACCESS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_where_localcloud_was_never_started_there_is_no_environment_that_would_lead_to_google(
    home: Home,
) -> None:
    with pytest.raises(StepError, match="nothing was started yet"):
        environment.complete()
    home.save(Config(port=1234, token="t"))
    found = environment.complete()
    assert found["GOOGLE_COMPUTE_CUSTOM_ENDPOINT"] == "http://127.0.0.1:1234/compute/beta/"
    assert found["LOCALCLOUD_HOME"] == str(home.root)


def test_the_environment_for_google_takes_out_what_would_lead_to_localcloud(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.save(Config(port=1234, token="t"))
    local = environment.complete()
    for key, value in local.items():
        monkeypatch.setenv(key, value)
    # This is asked by a Python that does not have the packages of the one that localcloud runs on.
    monkeypatch.setattr(endpoints, "_products", set)
    monkeypatch.setattr(endpoints, "_apis", set)
    found = environment.for_google()
    assert not [key for key, value in found.items() if "1234" in value and key in local]
    assert not {"GOOGLE_OAUTH_ACCESS_TOKEN", "KUBECONFIG", "LOCALCLOUD_HOME"} & found.keys()
    assert str(REPOSITORY / "localcloud") not in found["PATH"]
    assert str(venv.directory() / "bin") in found["PATH"]
    gone = environment.exports(found, os.environ).splitlines()[1].partition("|| unset ")[2].split()
    assert {
        "GOOGLE_COMPUTE_CUSTOM_ENDPOINT",
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION",
        "PULUMI_IGNORE_AMBIENT_PLUGINS",
    } <= set(gone)
    assert not {"PWD", "HOME"} & set(gone)
    assert local["PULUMI_HOME"] == str(home.root / "pulumi")
    assert found["PULUMI_HOME"] == str(home.root.parent / "pulumi")


@pytest.mark.usefixtures("home")
def test_what_the_user_set_for_google_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALCLOUD_HOME", raising=False)
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "the user's own")
    monkeypatch.setenv("KUBECONFIG", "/the/user/s")
    found = environment.for_google()
    assert found["GOOGLE_OAUTH_ACCESS_TOKEN"] == "the user's own"
    assert found["KUBECONFIG"] == "/the/user/s"
    assert "LOCALCLOUD_HOME" not in found


@pytest.mark.usefixtures("home")
def test_a_passphrase_is_made_once_and_refused_when_others_can_read_it() -> None:
    path = environment.passphrase_file()
    text = path.read_text()
    assert len(text) > 30
    assert environment.passphrase_file().read_text() == text
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o644)
    with pytest.raises(StepError, match="can be read by others"):
        environment.passphrase_file()
