"""Which processes are ours, and how to end them without ever touching another's.

A pid alone says nothing: the kernel gives it out again. A process is ours if its start time is the recorded
one, or if its environment carries the mark that everything under a home's supervisor inherits:

    LOCALCLOUD_SUPERVISED=HOME#SCOPE#PROGRAM      scope is "", "clusters/NAME" or "instances/NAME"

The mark also finds what left its process group (`setsid`, `nohup … &` in a startup script).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MARK = "LOCALCLOUD_SUPERVISED"
_PROC = Path("/proc")
_HAS_PROC = (_PROC / "self" / "stat").exists()


def mark(home: Path, scope: str = "", program: str = "") -> str:
    """The value of the mark for one program of a home."""
    return f"{home}#{scope}#{program}"


def start_time(pid: int) -> str | None:
    """When the process started, as text to compare with; None if there is none, or only a zombie."""
    if not _HAS_PROC:
        seen = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout.split(maxsplit=1)
        return None if len(seen) < 2 or seen[0].startswith("Z") else seen[1].strip()
    try:
        # The second field is the name in parentheses, which may hold anything.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def marked(prefix: str, variable: str = MARK) -> list[int]:
    """Every living process, except the caller, whose mark starts with `prefix` (end it with `#` or be
    exact).
    """
    wanted = f"{variable}={prefix}"
    if not _HAS_PROC:
        listing = subprocess.run(
            ["ps", "-axwwE", "-o", "pid=,command="], capture_output=True, text=True, check=False
        ).stdout
        rows = (line.split(maxsplit=1) for line in listing.splitlines())
        found = [int(row[0]) for row in rows if len(row) == 2 and f" {wanted}" in row[1]]
    else:
        found = [
            int(entry.name)
            for entry in _PROC.iterdir()
            if entry.name.isdigit() and _environment_has(entry, os.fsencode(wanted))
        ]
    return [pid for pid in found if pid != os.getpid() and start_time(pid) is not None]


def _environment_has(entry: Path, wanted: bytes) -> bool:
    try:
        return (b"\0" + wanted) in b"\0" + (entry / "environ").read_bytes()
    except OSError:
        return False  # it ended meanwhile, or it is another user's


def wait_until(condition: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def end(select: Callable[[], Iterable[int]], grace: float = 5.0) -> list[int]:
    """SIGTERM to what `select` finds, SIGKILL after `grace` seconds; `select` is asked again until it finds
    none.

    Returns:
        the pids that are still there (none, unless the kernel holds one of them).
    """
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        signalled: set[int] = set()
        while pids := set(select()):
            for pid in pids - signalled:
                send(pid, number)
            signalled |= pids
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        else:
            return []
    return sorted(select())


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
