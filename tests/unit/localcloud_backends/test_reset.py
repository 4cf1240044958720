"""`python -m localcloud reset`: deletes its own state, also a damaged one, and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from localcloud.__main__ import main
from localcloud.home import Config, Home
from localcloud.store import Store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    found = Home(tmp_path / "home")
    found.directory()
    monkeypatch.setenv("LOCALCLOUD_HOME", str(found.root))
    return found


@pytest.mark.parametrize("name", ["thesis.doc", "notes.txt", "config.json", ".hidden", "a.lock.c"])
def test_a_directory_of_somebody_else_s_stays(
    home: Home, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (home.root / name).write_text('{"colour": "red"}')
    assert main(["reset"]) == 1
    assert "does not look like localcloud's" in capsys.readouterr().err
    assert (home.root / name).read_text() == '{"colour": "red"}'


@pytest.mark.parametrize("content", ["{", "[]", '{"port": 1}', '"x"', ""])
def test_a_damaged_configuration_is_no_obstacle(
    home: Home, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    Store(home.store_path).close()
    home.config_path.write_text(content)
    assert main(["status"]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert main(["reset"]) == 0
    assert not home.root.exists()


def test_a_damaged_store_is_said_and_is_no_obstacle(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.save(Config(port=1, token="t"))
    home.store_path.touch()
    assert main(["status"]) == 3
    home.store_path.write_text("no database " * 1000)
    assert main(["status"]) == 1
    assert "store.db is damaged" in capsys.readouterr().err
    assert main(["reset"]) == 0


def test_what_an_interrupted_start_left_is_deleted(home: Home) -> None:
    with home.lock("start"):
        pass
    assert main(["reset"]) == 0
    assert not home.root.exists()
    home.save(Config(port=1, token="t"))
    assert main(["reset"]) == 0
    assert not home.root.exists()
