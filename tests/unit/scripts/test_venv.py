"""The virtual environment comes from uv where that can be had, and from pip where it cannot."""

from __future__ import annotations

import ast
import os
import subprocess
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
    monkeypatch.setattr(venv, "_sources", lambda _: {})
    target = tmp_path / "venvs" / "x"
    target.mkdir(parents=True)
    assert venv._make(target, Log(tmp_path / "log")) == target
    assert (target / "complete").is_file()
    installed = [words for words in done if "requirements.txt" in words]
    assert all("--require-hashes" in words for words in done[1:])
    by_pip = [" -m pip " in words for words in installed]
    assert by_pip == {"uv.txt": [True], "uv/bin/uv": [False, True], "": [False]}[fails]
    assert list(target.parent.iterdir()) == [target], "uv and its cache are gone"


PIP = [sys.executable, "-m", "pip"]


def test_uv_asks_where_pip_is_told_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_DEFAULT_INDEX", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_CERT", "/their/ca.pem")
    found = venv._sources(PIP)
    assert found["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert found["SSL_CERT_FILE"] == "/their/ca.pem"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example/simple")
    assert venv._sources(PIP)["UV_DEFAULT_INDEX"] == "https://own.example/simple"


def test_the_user_says_from_where_is_installed_and_not_what_or_where_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pip's own reading of what it is given: a variable, a file, a section each."""
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://first.example/simple\nextra-index-url =\n  https://a.example\n  https://b's.example\n"
        "[install]\nuser = true\nindex-url = https://then.example/simple\nno-deps = true\n"
    )
    for name in os.environ:
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    theirs = {"USER": "1", "TARGET": "/theirs", "PREFIX": "/theirs", "ROOT": "/theirs", "DRY_RUN": "1"}
    theirs |= {"REQUIRE_VIRTUALENV": "1", "NO_BINARY": ":all:", "PYTHON": "/theirs", "TIMEOUT": "7"}
    for name, value in theirs.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("UV_TARGET", "UV_PREFIX", "UV_SYSTEM_PYTHON", "UV_NO_BINARY", "UV_CONFIG_FILE"):
        monkeypatch.setenv(name, "/theirs")
    found = venv._sources(PIP)
    shown = subprocess.run([*PIP, "config", "list"], env=found, capture_output=True, text=True, check=True)
    lines = [line.removeprefix(":env:.").partition("=") for line in shown.stdout.splitlines()]
    listed = {key: ast.literal_eval(value) for key, _, value in lines if key != "config-file"}
    wanted = {
        "index-url": "https://then.example/simple",
        "extra-index-url": "\nhttps://a.example\nhttps://b's.example",
        "timeout": "7",
    }
    assert wanted.items() <= listed.items()
    assert listed.keys() <= {*venv._SOURCES}, "but for what the machine's own file says"
    assert not [name for name, value in found.items() if name.startswith("UV_") and value == "/theirs"]
