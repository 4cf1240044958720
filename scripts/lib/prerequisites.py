"""Checks what must be there before anything is built; names what is missing and how to get it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scripts.lib import paths, toolchain
from scripts.lib.steps import StepError

# The agent's own rule for evictions, and the kubelet's.
LEAST_FREE = 0.10
_TWO_COMPILERS = 7 * 2**30
MACOS = sys.platform == "darwin"


@dataclass(frozen=True)
class Prerequisite:
    """A program that must be there: how to ask its version, the oldest that will do, how to install it."""

    name: str
    version: Callable[[], tuple[int, ...] | None]
    oldest: tuple[int, ...]
    install: str


def _version(
    *command: str, pattern: str = r"(\d+)\.(\d+)", env: Mapping[str, str] | None = None
) -> Callable[[], tuple[int, ...] | None]:
    def ask() -> tuple[int, ...] | None:
        try:
            # Not where a file of the user's (go.work, .tool-versions) may ask for another version.
            answer = subprocess.run(
                command, cwd="/", env=env, capture_output=True, text=True, check=False, timeout=60
            )
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


def has_room_for_two() -> bool:
    """Whether Go's and Rust's compilers have room at once: cores, and 3 GB of memory each."""
    if (os.cpu_count() or 1) <= 2:
        return False
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= _TWO_COMPILERS
    except (ValueError, OSError):
        return False


def check_places() -> None:
    """Raises StepError for a place that this must write in and cannot: before hours of work end there."""
    for place, remedy in (
        (paths.CACHE, "set HOME or XDG_CACHE_HOME to a directory of yours"),
        (paths.PASSPHRASE.parent, "set HOME or XDG_CONFIG_HOME to a directory of yours"),
        (paths.REPOSITORY, "its run's files go there: clone it into a directory of yours"),
    ):
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise StepError(f"cannot write in {place}: {error.strerror}; {remedy}") from error
    try:
        # The link that stands for an odd place does not help: cargo goes by the real one.
        os.path.realpath(paths.REPOSITORY).encode()
    except UnicodeEncodeError:
        real = os.path.realpath(paths.REPOSITORY).encode(errors="backslashreplace").decode()
        raise StepError(f"cargo builds nothing in {real}, which is not UTF-8; move the checkout") from None
    if os.pathsep in str(paths.CACHE):
        raise StepError(
            f"no program in {paths.CACHE} can be found, as a `{os.pathsep}` ends an entry of PATH; "
            "set XDG_CACHE_HOME to a directory without one"
        )


def warn_of_disk() -> None:
    """Says so where the disk is so full that the node, as any kubelet, would take no pod."""
    disk = shutil.disk_usage(paths.REPOSITORY)
    if disk.free < disk.total * LEAST_FREE:
        print(
            f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.0f} GiB are left where {paths.REPOSITORY} is: "
            f"a node takes no pods with less than {LEAST_FREE:.0%}, so free some, or clone to another disk"
        )


def check_disk(*, tools: bool, environment: bool) -> None:
    """Raises StepError where what is to be built does not fit: before hours of work end there."""
    # Seen on Linux: Go's cache and the tools; the libraries; cargo's intermediate files.
    needs = {
        "Go to build the tools": 6.0 if tools else 0,
        "the virtual environment": 1.0 if environment else 0,
        "cargo to build the agent": 4.0 if not any((paths.CACHE / "builds").glob("*/krustlet")) else 0,
    }
    if os.environ.get("AWESOME_WASM_BUNDLE"):
        needs = {
            "a bundle's contents": 2.0 if tools else 0,
            "the virtual environment": 1.0 if environment else 0,
        }
    free = shutil.disk_usage(paths.CACHE).free / 2**30
    if free < sum(needs.values()):
        needed = sum(needs.values())
        what = ", ".join(f"{name} {size:.0f} GiB" for name, size in needs.items() if size)
        raise StepError(
            f"{free:.1f} GiB are free where {paths.CACHE} is, and {needed:.0f} are needed: {what}; "
            "free some (./scripts/clean helps), or set XDG_CACHE_HOME to a directory on another disk"
        )


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
            _version("go", "version", env=toolchain.go_environment()),
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
            # A node checks the agent's signature with it, which for localcloud is this machine.
            "openssl",
            _version("openssl", "version"),
            (1, 1),
            "brew install openssl" if MACOS else f"{apt} openssl",
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
