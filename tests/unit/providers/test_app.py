"""The app as it is built: what it can reach is what it imports, and that is next to nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from components.providers import artifacts, cargo, compiler
from tests.unit.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not on PATH")


@pytest.fixture(scope="module")
def component() -> Path:
    """Give the app, from the cache that `pulumi up` takes it from."""
    return Path(cargo.build(REPOSITORY / "wasm_app", compiler.WASM_TARGET).path)


def test_the_app_can_reach_its_request_and_nothing_else(component: Path) -> None:
    found = artifacts.interface(component.read_bytes())
    # No file system, environment, clock, random numbers or sockets: there is nothing to take away from it.
    assert {name.partition("@")[0] for name in found.imports} == {
        "wasi:http/types",
        "wasi:io/error",
        "wasi:io/streams",
    }
    assert [name.partition("@")[0] for name in found.exports] == ["wasi:http/incoming-handler"]


def test_the_app_is_smaller_than_150_kb(component: Path) -> None:
    assert component.stat().st_size < 150_000


def test_nothing_of_this_machine_is_in_the_app(component: Path) -> None:
    content = component.read_bytes()
    for place in (REPOSITORY, Path.home()):
        assert str(place).encode() not in content
