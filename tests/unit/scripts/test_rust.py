"""Where Rust's standard library for wasm comes from, and what is said where it can come from nowhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.lib import paths, rust
from scripts.lib.steps import Log, StepError


class Machine:
    """A machine on which commands are only remembered; `can` are the programs that succeed."""

    def __init__(self) -> None:
        self.can: set[str] = set()
        self.ran: list[str] = []

    def run(self, command: Sequence[str | Path], **_: object) -> None:
        """Remember a command."""
        self.ran.append(" ".join(map(str, command)))
        if command[0] not in self.can:
            raise StepError(f"{command[0]} exited with 1")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Root's machine with apt-get, and with no standard library for wasm yet."""
    made = Machine()
    monkeypatch.setattr(paths, "LOGS", tmp_path)
    monkeypatch.setattr(Log, "run", made.run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(rust, "_rustup_has_target", lambda: "rustup" in made.can and bool(made.ran))
    monkeypatch.setattr(rust, "_packages_installed", lambda: False)
    return made


def test_rustup_brings_it_where_it_can(machine: Machine) -> None:
    machine.can = {"rustup", "apt-get"}
    rust.ensure_wasm_target()
    assert machine.ran == ["rustup target add wasm32-unknown-unknown"]


def test_root_gets_debian_s_packages_where_rustup_cannot(machine: Machine) -> None:
    machine.can = {"apt-get"}
    rust.ensure_wasm_target()
    assert machine.ran[1:] == ["apt-get update", "apt-get install -y rustc-web rust-web-src"]


def test_another_user_is_told_what_root_has_to_install(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        StepError, match="only root may install the package: sudo apt-get install -y rustc-web"
    ):
        rust.ensure_wasm_target()
    assert len(machine.ran) == 1


@pytest.mark.usefixtures("machine")
def test_where_there_are_no_packages_rustup_is_the_only_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(StepError, match="once it can be reached: rustup target add wasm32-unknown-unknown"):
        rust.ensure_wasm_target()


def test_nothing_is_done_where_it_is_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rust, "_packages_installed", lambda: True)
    rust.ensure_wasm_target()
    assert machine.ran == []
