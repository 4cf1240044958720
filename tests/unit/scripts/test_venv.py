"""The virtual environment comes from uv where that can be had, and from pip where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.lib import venv
from scripts.lib.steps import Log, StepError


@pytest.mark.parametrize("fails", ["uv.txt", "uv/bin/uv", ""])
def test_what_uv_cannot_install_pip_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    done: list[str] = []

    def run(_log: Log, command: list[object], **_: object) -> None:
        words = " ".join(map(str, command))
        done.append(words)
        if fails and fails in words.replace(str(tmp_path), ""):
            raise StepError(fails)

    monkeypatch.setattr(Log, "run", run)
    monkeypatch.setattr(venv, "_as_pip", lambda _: {})
    target = tmp_path / "venvs" / "x"
    target.mkdir(parents=True)
    assert venv._make(target, Log(tmp_path / "log")) == target
    assert (target / "complete").is_file()
    installed = [words for words in done if "requirements.txt" in words]
    assert all("--require-hashes" in words for words in done[1:])
    by_pip = [" -m pip " in words for words in installed]
    assert by_pip == {"uv.txt": [True], "uv/bin/uv": [False, True], "": [False]}[fails]
    assert list(target.parent.iterdir()) == [target], "uv and its cache are gone"


def test_uv_asks_where_pip_is_told_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_DEFAULT_INDEX", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_CERT", "/their/ca.pem")
    found = venv._as_pip([sys.executable, "-m", "pip"])
    assert found["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert found["SSL_CERT_FILE"] == "/their/ca.pem"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example/simple")
    assert venv._as_pip([sys.executable, "-m", "pip"])["UV_DEFAULT_INDEX"] == "https://own.example/simple"
