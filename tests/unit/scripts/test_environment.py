"""The environment for working by hand leads to localcloud, or there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from localcloud.home import Config, Home
from scripts.lib import environment, paths, toolchain
from scripts.lib.steps import StepError


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
