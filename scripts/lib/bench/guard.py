"""Ends what a benchmark started, however the benchmark itself ends.

`python -m scripts.lib.bench.guard DIRECTORY` waits until its standard input is closed, which the kernel does
for a benchmark that was killed too. Then it ends every process that has the directory in its environment,
puts back the files that were kept, unmounts what is below the directory, and removes it with the control
groups of its name.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "AWESOME_WASM_BENCH"
KEPT = "kept"


def keep(directory: Path, file: Path) -> None:
    """Has a file that is about to be changed put back in the end."""
    place = directory / KEPT / file.relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, place)


def mount_points(mountinfo: str) -> list[str]:
    """Where something is mounted, in order, without the octal codes of proc_pid_mountinfo(5)."""
    places = (line.split(" ")[4] for line in mountinfo.splitlines())
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place) for place in places]


def marked(directory: Path) -> list[int]:
    """The processes that were started with the mark of this directory."""
    mark, found = f"{MARK}={directory}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end(directory: Path, grace: float = 15) -> None:
    """SIGTERM, so that an engine ends its containers; SIGKILL for what is left after `grace` seconds."""
    deadline = time.monotonic() + grace
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked(directory):
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        while marked(directory) and time.monotonic() < deadline:
            time.sleep(0.1)
        deadline = time.monotonic() + grace
    for place in (directory / KEPT).rglob("*"):
        file = Path("/", place.relative_to(directory / KEPT))
        if place.is_file() and place.read_bytes() != file.read_bytes():
            shutil.copy2(place, file)
    for mounted in reversed(mount_points(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))):
        if mounted.startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", mounted], check=False)
    for group in Path("/sys/fs/cgroup").glob(f"**/{directory.name}"):
        for inner in sorted([group, *group.rglob("*/")], reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A directory for a benchmark; what is started with `environment(directory)` does not outlive it."""
    directory = Path(tempfile.mkdtemp(prefix="awesome-wasm-bench-"))
    # In a session of its own: an interrupt of the terminal is for the benchmark.
    command = [sys.executable, "-m", "scripts.lib.bench.guard", str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield directory
    finally:
        process.communicate()


def environment(directory: Path) -> dict[str, str]:
    """The environment of what is to end with the directory."""
    return {**os.environ, MARK: str(directory)}


if __name__ == "__main__":
    sys.stdin.read()
    end(Path(sys.argv[1]))
