"""./scripts/clean takes what nobody uses, and nothing else, whoever uses it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib import clean, paths, timings, toolchain, venv

OLD = (1_600_000_000, 1_600_000_000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of a checkout that uses tools/own-1 and venvs/own-2."""
    root = tmp_path / "cache"
    for name in ("tools/own-1", "venvs/own-2", "venvs/policy-3"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(paths, "CACHE", root)
    monkeypatch.setattr(toolchain, "current", lambda: [root / "tools/own-1"])
    monkeypatch.setattr(venv, "directory", lambda: root / "venvs/own-2")
    monkeypatch.setattr(venv, "policies_directory", lambda: root / "venvs/policy-3")
    return root


def _entry(cache: Path, kind: str, number: int) -> Path:
    """Something in the cache that is old; gives its directory."""
    name = f"{number:064x}" if kind == "builds" else f"tool-{number:012x}"
    directory = cache / kind / name
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"x" * 5000)
    os.utime(directory, OLD)
    return directory


def _checkout(cache: Path, name: str, used: list[Path]) -> Path:
    """Another checkout, which has noted what it uses."""
    checkout = cache.parent / name
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "scripts" / "up").touch()
    note = {"checkout": str(checkout), "uses": [str(path.relative_to(cache)) for path in used]}
    (cache / "uses").mkdir(exist_ok=True)
    (cache / "uses" / f"{name}.json").write_text(json.dumps(note))
    return checkout


@pytest.fixture
def running(cache: Path) -> Iterator[list[Path]]:
    """What processes were started with, by a variable and by an argument."""
    used = [_entry(cache, "tools", 1), _entry(cache, "builds", 1)]
    variables = {"PATH": f"/bin:{used[0]}:/usr/bin"}
    command = [sys.executable, "-c", "input()", str(used[1] / "file")]
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE) as process:
        yield used
        process.kill()


def test_what_is_used_in_any_way_stays_and_all_else_goes(
    cache: Path, running: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    number = itertools.count(2)
    kinds = ("tools", "venvs", "builds")
    noted, of_gone, nobodys = ([_entry(cache, kind, next(number)) for kind in kinds] for _ in range(3))
    checkout = _checkout(cache, "living", noted)
    gone = _checkout(cache, "gone", of_gone)
    (gone / "scripts" / "up").unlink()
    states = checkout / ".stacks" / ".pulumi" / "stacks" / "awesome-wasm"
    states.mkdir(parents=True)
    in_states = [_entry(cache, "builds", next(number)) for _ in range(2)]
    (states / "local.json").write_text(f'{{"sha256": "{in_states[0].name}"}}')
    (states / "dev.json.gz").write_bytes(gzip.compress(f'"{in_states[1].name}"'.encode()))
    young = _entry(cache, "builds", next(number))
    os.utime(young)
    (cache / "pulumi").mkdir()
    (cache / "target").mkdir()
    before = {path for path in cache.rglob("*") if path.is_dir()}

    clean.clean(dry_run=True)
    assert "would come free" in capsys.readouterr().out
    assert {path for path in cache.rglob("*") if path.is_dir()} == before
    clean.clean(dry_run=False)
    said = capsys.readouterr().out

    for path in (*noted, *running, *in_states, young, cache / "tools/own-1", cache / "venvs/own-2"):
        assert path.is_dir()
        assert path.name not in said
    for path in (*of_gone, *nobodys):
        assert not path.exists()
        assert path.name in said
    assert (cache / "pulumi").is_dir()
    assert (cache / "target").is_dir()
    assert not (cache / "uses" / "gone.json").exists()
    clean.clean(dry_run=False)
    assert "nothing is left over" in capsys.readouterr().out


def test_a_record_goes_with_its_build_and_compiled_python_with_its_source(
    cache: Path, tmp_path: Path
) -> None:
    gone = _entry(cache, "builds", 1)
    kept = _entry(cache, "builds", 2)
    _checkout(cache, "living", [kept])
    records = cache / "inputs" / "x"
    records.mkdir(parents=True)
    for number, build in enumerate((gone.name, kept.name, "0" * 64)):
        (records / f"{number}.json").write_text(json.dumps({"built": {"sha256": build}, "inputs": {}}))
    source = tmp_path / "source"
    source.mkdir()
    compiled = cache / "pycache" / source.relative_to("/")
    (compiled / "gone" / "deep").mkdir(parents=True)
    (compiled / "module.pyc").touch()
    clean.clean(dry_run=False)
    assert [path.name for path in records.iterdir()] == ["1.json"]
    assert sorted(path.name for path in compiled.iterdir()) == ["module.pyc"]


def test_one_that_was_interrupted_leaves_nothing_that_looks_like_a_tool(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = _entry(cache, "tools", 1)

    def interrupted(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clean.clean(dry_run=False)
    assert not tool.exists()
    clean.clean(dry_run=False)
    assert sorted(path.name for path in (cache / "tools").iterdir()) == ["own-1"]


def test_two_at_once_and_a_command_at_work_wait_for_each_other(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [_entry(cache, "tools", number) for number in range(20)]
    cleaning = [threading.Thread(target=clean.clean, kwargs={"dry_run": False}) for _ in range(3)]
    with clean.in_use(), clean.in_use():
        for thread in cleaning:
            thread.start()
        cleaning[0].join(timeout=0.2)
        assert all(path.is_dir() for path in entries)
    for thread in cleaning:
        thread.join()
    assert not any(path.exists() for path in entries)
    assert "another command works with the cache; waiting for it" in capsys.readouterr().out


def test_what_comes_free_is_what_the_disk_gets_back(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "b" / "file").hardlink_to(tmp_path / "a" / "file")
    assert clean.freed([tmp_path / "a"]) == 0
    both = clean.freed([tmp_path / "a", tmp_path / "b"])
    assert both == (tmp_path / "a" / "file").stat().st_blocks * 512
    assert timings.size(tmp_path / "a" / "file") == both
