"""What is left of a stack that was destroyed, and of the others beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.lib import paths, pulumi


@pytest.fixture
def stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as pulumi leaves it after the stack `local` was removed."""
    monkeypatch.setattr(paths, "STACKS", tmp_path / ".stacks")
    state = tmp_path / ".stacks" / ".pulumi"
    for name in (
        "meta.yaml",
        "stacks/awesome-wasm/local.json.bak",
        "history/awesome-wasm/local/local-1.history.json",
        "backups/awesome-wasm/local/local.1.json",
    ):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text("{}")
    return state


def test_nothing_is_left_where_the_stack_was_alone(stacks: Path) -> None:
    assert pulumi.remove_files() == set()
    assert not stacks.parent.exists()


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_the_state_of_another_stack_stays_with_its_history(stacks: Path, name: str) -> None:
    kept = {stacks / "stacks/awesome-wasm" / name, stacks / "history/awesome-wasm/dev/dev-1.history.json"}
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert not pulumi.is_known()
    assert pulumi.remove_files() == {"dev"}
    files = {path for path in stacks.rglob("*") if path.is_file()}
    assert files == {stacks / "meta.yaml", *kept}


def test_a_stack_is_known_by_its_state(stacks: Path) -> None:
    assert not pulumi.is_known()
    (stacks / "stacks/awesome-wasm/local.json").write_text("{}")
    assert pulumi.is_known()
