"""What a part of the program may know of another: the rules that no type checker sees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.unit.conftest import REPOSITORY

PROGRAM = [REPOSITORY / "__main__.py", *sorted((REPOSITORY / "components").rglob("*"))]
PROVIDERS = sorted((REPOSITORY / "components" / "providers").glob("*.py"))
SCRIPTS = sorted((REPOSITORY / "scripts" / "lib").rglob("*.py"))
LOCALCLOUD = sorted((REPOSITORY / "localcloud").rglob("*.py"))


def name(path: Path) -> str:
    """Name a file in the report."""
    return str(path.relative_to(REPOSITORY))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    """Say whether a module is a package or in it."""
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", [path for path in PROGRAM if path.suffix in (".py", ".sh")], ids=name)
def test_the_program_knows_google_and_nothing_of_what_stands_in_for_it(path: Path) -> None:
    assert "localcloud" not in path.read_text().lower()


@pytest.mark.parametrize("path", LOCALCLOUD, ids=name)
def test_localcloud_knows_nothing_of_the_program(path: Path) -> None:
    assert not [module for module in imported(path) if within(module, "components")]


# The commands and their shell, which put the rooms together.
ENTRANCES = {"__main__.py", "environment.py"}


@pytest.mark.parametrize("path", [path for path in LOCALCLOUD if path.name not in ENTRANCES], ids=name)
def test_what_two_rooms_of_localcloud_need_lies_below_both(path: Path) -> None:
    rooms = {"api", "backends", "plugins"}
    room = path.relative_to(REPOSITORY / "localcloud").parts[0]
    others = [f"localcloud.{other}" for other in rooms - {room}]
    assert not [module for module in imported(path) if any(within(module, other) for other in others)]


@pytest.mark.parametrize("path", [*SCRIPTS, *LOCALCLOUD, *PROVIDERS], ids=name)
def test_what_users_run_imports_no_test(path: Path) -> None:
    assert not [module for module in imported(path) if within(module, "tests")]


@pytest.mark.parametrize("path", PROVIDERS, ids=name)
def test_a_dynamic_provider_imports_no_component(path: Path) -> None:
    ours = [module for module in imported(path) if within(module, "components")]
    assert [module for module in ours if not within(module, "components.providers")] == []


@pytest.mark.parametrize("path", [path for path in PROGRAM if path.suffix == ".py"], ids=name)
def test_configuration_is_read_in_one_place(path: Path) -> None:
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pulumi.Config"
    ]
    assert not reads or path.name == "config.py"


def test_no_module_needs_itself() -> None:
    """A circle counts also where only the type checker, or a function that runs later, closes it."""
    files = [REPOSITORY / "__main__.py", *SCRIPTS, *LOCALCLOUD, *(REPOSITORY / "components").rglob("*.py")]
    modules = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }
    graph = {
        module: {other for other in imported(path) if other in modules} for module, path in modules.items()
    }
    assert graph["localcloud.api.server"] >= {"localcloud.api.service", "localcloud.api.operations"}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_a_preview_imports_no_client_of_what_it_does_not_ask() -> None:
    components = ("artifact", "cluster", "node", "registry", "workload")
    code = f"import {', '.join(f'components.{name}' for name in components)}, sys; print(*sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    loaded = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "pulumi" in loaded
    assert not {"kubernetes", "wasmtime", "google.auth"} & set(loaded)
