"""A whole localcloud in one file, to begin again where a walk, a demonstration or a bug report should.

    HOME-snapshots/NAME.tar     the state directory, readable by its owner alone: keys and tokens are in it

It is taken while nothing runs, and lacks what a start makes anew (the supervisor's files, locks, what an
instance loses at a reboot): a restored localcloud is one whose power came back. It may be restored into
another home, as long as its ports are free there. What pulumi knows of a stack is pulumi's, and is kept by
`pulumi stack export`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localcloud.home import Home, HomeError, write_private

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ABOUT = "snapshot.json"
_FORMAT = 1
_LEFT_OUT = ("./supervisor", "./*.lock", "./instances/*/run", "./instances/*/tmp")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's name, its file, and its size in bytes."""

    name: str
    path: Path
    size: int


def directory(home: Home) -> Path:
    """Where the snapshots of a home are: beside it, so that `reset` leaves them alone."""
    return home.root.with_name(f"{home.root.name}-snapshots")


def listed(home: Home) -> list[Snapshot]:
    return [Snapshot(path.stem, path, path.stat().st_size) for path in sorted(directory(home).glob("*.tar"))]


def _path(home: Home, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise HomeError(f"{name!r} is no name for a snapshot: letters, digits, `.`, `_` and `-`, at most 100")
    return directory(home) / f"{name}.tar"


def save(home: Home, name: str) -> Snapshot:
    """Keep a home that does not run. A snapshot of that name is replaced once the new one is whole.

    Raises:
        HomeError: the name cannot be used, or the file cannot be written.
    """
    path = _path(home, name)
    about = {"format": _FORMAT, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    write_private(home.root / _ABOUT, json.dumps(about))
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        excluded = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
        _tar("-cf", str(scratch), *excluded, "-C", str(home.root), ".")
        scratch.replace(path)
    except OSError as error:
        raise HomeError(f"cannot write {path}: {error.strerror}") from error
    finally:
        scratch.unlink(missing_ok=True)
        (home.root / _ABOUT).unlink(missing_ok=True)
    return Snapshot(name, path, path.stat().st_size)


def require(home: Home, name: str) -> Path:
    """The file of a snapshot.

    Raises:
        HomeError: there is none of that name.
    """
    path = _path(home, name)
    if not path.exists():
        names = ", ".join(item.name for item in listed(home))
        raise HomeError(f"there is no snapshot {name} in {directory(home)}; there are: {names or 'none'}")
    return path


def restore(home: Home, name: str) -> None:
    """Put a snapshot in the place of a home that does not run. What was there is kept if that fails.

    Raises:
        HomeError: there is no such snapshot, it is damaged, or it cannot be unpacked.
    """
    path = require(home, name)
    unique = secrets.token_hex(4)
    new = home.root.with_name(f".{home.root.name}.{unique}.new")
    old = home.root.with_name(f".{home.root.name}.{unique}.old")
    try:
        new.mkdir(mode=0o700)
        _tar("-xpf", str(path), "-C", str(new))
        _check(new, path)
        if home.root.exists():
            home.root.rename(old)
        new.rename(home.root)
    except OSError as error:
        raise HomeError(f"cannot restore {path}: {error.strerror}") from error
    finally:
        if not home.root.exists() and old.exists():
            old.rename(home.root)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _check(unpacked: Path, path: Path) -> None:
    about = unpacked / _ABOUT
    try:
        version = json.loads(about.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise HomeError(f"{path} is no snapshot of localcloud") from None
    if version != _FORMAT:
        raise HomeError(f"{path} is of format {version}, and this localcloud reads format {_FORMAT}")
    about.unlink()


def _tar(*arguments: str) -> None:
    try:
        done = subprocess.run(["tar", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HomeError("there is no `tar` on PATH, which snapshots are made with") from None
    if done.returncode != 0:
        raise HomeError(f"tar {arguments[0]} {arguments[1]} failed: {done.stderr.strip()[-300:]}")
