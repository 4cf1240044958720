"""What localcloud's parts print: `python -m localcloud logs [-f] [-n LINES] [PART…]`.

A part is a program of the supervisor (`api`, `registry`, `cluster-NAME.etcd`, `vm-NAME.krustlet`) or an
instance's serial console (`vm-NAME.console`). The end of its name is enough where no other ends so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from localcloud.home import Home, HomeError

_POLL_SECONDS = 0.2


def parts(home: Home) -> dict[str, Path]:
    """Every part that has printed something, and where it is."""
    programs = {path.stem: path for path in home.logs.glob("*.log")}
    consoles = {
        f"vm-{path.parents[1].name}.console": path
        for path in (home.root / "instances").glob("*/log/serial-port-1.log")
    }
    return dict(sorted({**programs, **consoles}.items()))


def select(known: Sequence[str], wanted: str) -> str:
    """The part that a user means by the whole name, or else by its end or a piece of it.

    Raises:
        HomeError: none is meant, or more than one.
    """
    for matches in (
        [name for name in known if name == wanted],
        [name for name in known if name.endswith(f".{wanted}")],
        [name for name in known if wanted in name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise HomeError(f"{wanted!r} may be any of: {', '.join(matches)}")
    raise HomeError(
        f"nothing called {wanted!r} has printed anything; there are: {', '.join(known) or 'none'}"
    )


class Tail:
    """One file, from its last lines on, also over rotations."""

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._last = b""
        """The last whole line that was given, to find the place in a file that was cut to its newer half."""
        self._rest = b""
        self._backlog = lines

    def read(self) -> list[str]:
        """The whole lines that came since the last call."""
        found: list[bytes] = []
        if self._file is not None:
            found += self._lines(self._file)
        if self._is_another():
            first = self._file is None
            if self._file is not None:
                self._file.close()
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                self._file = None
            else:
                new = self._lines(self._file)
                found += self._latest(new) if first else self._unseen(new)
        if found:
            self._last = found[-1]
        return [line.decode(errors="replace") for line in found]

    def _is_another(self) -> bool:
        """Whether the path leads to another file than the one that is read, or to a shorter one."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return False
        if self._file is None:
            return True
        mine = os.fstat(self._file.fileno())
        return (mine.st_dev, mine.st_ino) != (now.st_dev, now.st_ino) or now.st_size < self._file.tell()

    def _lines(self, file: BinaryIO) -> list[bytes]:
        *lines, self._rest = (self._rest + file.read()).split(b"\n")
        return lines

    def _latest(self, lines: list[bytes]) -> list[bytes]:
        return lines[-self._backlog :] if self._backlog else []

    def _unseen(self, lines: list[bytes]) -> list[bytes]:
        if self._last in lines:
            return lines[len(lines) - lines[::-1].index(self._last) :]
        return lines


def show(home: Home, wanted: Sequence[str], *, lines: int, follow: bool, out: TextIO = sys.stdout) -> int:
    """Print the last lines of the parts that are meant; with `follow`, what they print until Ctrl-C.

    Without a part, the names of all.

    Raises:
        HomeError: a part is not there, or its name is not clear.
    """
    known = parts(home)
    if not wanted:
        out.write("".join(f"{name}\n" for name in known))
        return 0
    names = list(dict.fromkeys(select(list(known), name) for name in wanted))
    tails = {name: Tail(known[name], lines) for name in names}
    prefixed = len(names) > 1
    try:
        while True:
            for name, tail in tails.items():
                for line in tail.read():
                    out.write(f"{name}: {line}\n" if prefixed else f"{line}\n")
            out.flush()
            if not follow:
                return 0
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
