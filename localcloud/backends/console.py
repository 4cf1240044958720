"""Serial port 1 of every instance: supervisord's event listener that writes what an instance's programs
print.

supervisord hands over each program's output as PROCESS_LOG_STDOUT events, in order; programs/NAME.json says
into which file it goes. A line reads as on a Google image:

    Nov 24 08:00:00 HOST IDENTIFIER[PID]: TEXT

The file is cut to its newer half at 2 MiB: Google keeps the last megabyte.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

_LARGEST = 2 * 1024 * 1024
_LONGEST_LINE = 8192


class Console:
    """Puts the pieces that arrive together into whole lines, and writes each to its instance's file."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._partial: dict[str, bytes] = {}
        self._places: dict[str, tuple[Path, str, str]] = {}

    def log(self, name: str, pid: str, data: bytes) -> None:
        """Take a piece of a program's output."""
        *lines, rest = (self._partial.pop(name, b"") + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines.append(rest)
            rest = b""
        if rest:
            self._partial[name] = rest
        self._write(name, pid, lines)

    def ended(self, name: str, pid: str) -> None:
        """Write what a program printed last without ending the line."""
        rest = self._partial.pop(name, b"")
        if rest:
            self._write(name, pid, [rest])
        self._places.pop(name, None)

    def _write(self, name: str, pid: str, lines: list[bytes]) -> None:
        place = self._place(name)
        if place is None or not lines:
            return
        path, host, identifier = place
        prefix = f"{time.strftime('%b %e %H:%M:%S')} {host} {identifier}[{pid}]: ".encode()
        try:
            with path.open("ab") as file:
                file.write(b"".join(prefix + line.rstrip(b"\r") + b"\n" for line in lines))
                size = file.tell()
            if size > _LARGEST:
                _halve(path)
        except OSError:
            return  # the instance is being deleted

    def _place(self, name: str) -> tuple[Path, str, str] | None:
        if name not in self._places:
            try:
                program = json.loads((self._programs / f"{name}.json").read_text())
            except (OSError, ValueError):
                return None
            if not program["console"]:
                return None
            self._places[name] = (Path(program["console"]), program["host"], program["identifier"] or name)
        return self._places[name]


def _halve(path: Path) -> None:
    kept = path.read_bytes()[-_LARGEST // 2 :]
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(kept[kept.find(b"\n") + 1 :])
    temporary.replace(path)


def serve(console: Console, events: BinaryIO, replies: BinaryIO) -> None:
    """supervisord's event listener protocol, until it closes the pipe."""
    while True:
        replies.write(b"READY\n")
        replies.flush()
        header = _fields(events.readline())
        if not header:
            return
        payload = events.read(int(header["len"]))
        first, _, data = payload.partition(b"\n")
        about = _fields(first)
        if header["eventname"] == "PROCESS_LOG_STDOUT":
            console.log(about["processname"], about["pid"], data)
        else:
            console.ended(about["processname"], about.get("pid", "0"))
        replies.write(b"RESULT 2\nOK")
        replies.flush()


def _fields(line: bytes) -> dict[str, str]:
    return dict(part.split(":", 1) for part in line.decode(errors="replace").split() if ":" in part)


if __name__ == "__main__":
    serve(
        Console(Path(os.environ["LOCALCLOUD_SUPERVISOR"]) / "programs"), sys.stdin.buffer, sys.stdout.buffer
    )
