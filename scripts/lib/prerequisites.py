"""Checks what must be there before anything is built; names what is missing and how to get it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from scripts.lib.steps import StepError

MACOS = sys.platform == "darwin"


@dataclass(frozen=True)
class Prerequisite:
    """A program that must be there: how to ask its version, the oldest that will do, how to install it."""

    name: str
    version: Callable[[], tuple[int, ...] | None]
    oldest: tuple[int, ...]
    install: str


def _version(*command: str, pattern: str = r"(\d+)\.(\d+)") -> Callable[[], tuple[int, ...] | None]:
    def ask() -> tuple[int, ...] | None:
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = re.search(pattern, answer.stdout + answer.stderr)
        return tuple(int(part) for part in found.groups()) if answer.returncode == 0 and found else None

    return ask


def _compiler() -> tuple[int, ...] | None:
    return (1,) if any(shutil.which(name) for name in ("cc", "gcc", "clang")) else None


def _venv() -> tuple[int, ...] | None:
    """Debian ships Python without the means to make a virtual environment, unless python3-venv is there."""
    return _version(sys.executable, "-c", "import ensurepip, venv; print('1.0')")()


def check() -> None:
    """Raises StepError that names all that is missing or too old, with the command for each."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    apt = f"{sudo}apt-get install -y"
    wanted = [
        Prerequisite(
            "Python's venv module",
            _venv,
            (1,),
            "brew install python" if MACOS else f"{apt} python3-venv",
        ),
        Prerequisite(
            "Go",
            _version("go", "version"),
            (1, 26),
            "brew install go" if MACOS else "see https://go.dev/doc/install (distributions are often behind)",
        ),
        Prerequisite(
            "Rust through rustup",
            _version("rustup", "--version"),
            (1, 20),
            "brew install rustup && rustup-init" if MACOS else "see https://rustup.rs",
        ),
        Prerequisite(
            "git", _version("git", "--version"), (2, 20), "brew install git" if MACOS else f"{apt} git"
        ),
        Prerequisite(
            # The smoke test retries on every error, which curl can since then.
            "curl",
            _version("curl", "--version"),
            (7, 71),
            "brew install curl" if MACOS else f"{apt} curl",
        ),
        Prerequisite(
            "a C compiler",
            _compiler,
            (1,),
            "xcode-select --install" if MACOS else f"{apt} build-essential",
        ),
    ]
    problems = []
    for prerequisite in wanted:
        found = prerequisite.version()
        if found is None:
            problems.append(f"{prerequisite.name} is missing; to install: {prerequisite.install}")
        elif found < prerequisite.oldest:
            has, needs = (".".join(map(str, version)) for version in (found, prerequisite.oldest))
            problems.append(
                f"{prerequisite.name} {has} is too old, {needs} is needed; to install: {prerequisite.install}"
            )
    if problems:
        raise StepError("prerequisites:\n  " + "\n  ".join(problems))
