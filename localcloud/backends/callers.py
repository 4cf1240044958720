"""Which process is at the other end of a connection on this machine: asked of the kernel, as a caller may say
anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localcloud.backends.processes import MARK

_PROC = Path("/proc")
_IPV4_IN_IPV6 = "0000000000000000FFFF0000"
_LISTEN = "0A"


@dataclass(frozen=True)
class TcpSocket:
    """A row of the kernel's table. Addresses are as it writes them, IPv4 in an IPv6 socket as IPv4."""

    local: str
    remote: str
    state: str
    inode: str

    @property
    def is_listening(self) -> bool:
        return self.state == _LISTEN

    @property
    def port(self) -> int:
        return int(self.local.rpartition(":")[2], 16)

    @property
    def link(self) -> str:
        """What a file descriptor of it leads to."""
        return f"socket:[{self.inode}]"


def tcp_sockets() -> Iterator[TcpSocket]:
    """Every TCP socket of this network namespace; none where there is no /proc."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for row in (_PROC / "net" / table).read_text().splitlines()[1:]:
                _, local, remote, state, *_, inode = row.split()[:10]
                yield TcpSocket(
                    local.removeprefix(_IPV4_IN_IPV6), remote.removeprefix(_IPV4_IN_IPV6), state, inode
                )


def is_call_of(prefix: str, connection: socket.socket) -> bool:
    """Whether an IPv4 connection's other end is held by a process of a scope: its mark, or that of its
    nearest ancestor that has one, starts with `prefix`. True where there is no /proc (macOS), and where
    nothing runs but what has the user's rights.

    A mark counts in this PID namespace only. What is confined has another one, and could give itself any
    mark; its ancestors it cannot leave.
    """
    if not (_PROC / "net/tcp").exists():
        return True
    ends = (_written(connection.getpeername()), _written(connection.getsockname()))
    links = {found.link for found in tcp_sockets() if (found.local, found.remote) == ends}
    return any(not links.isdisjoint(_links(pid)) for pid in _processes_of(prefix))


def _written(name: tuple[str, int]) -> str:
    (number,) = struct.unpack("=I", socket.inet_aton(name[0]))
    return f"{number:08X}:{name[1]:04X}"


def _links(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it ended meanwhile, or it is another user's
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(entry)  # noqa: PTH115  there are many


def _processes_of(prefix: str) -> Iterator[int]:
    here = _namespace("self")
    ours: dict[int, bool] = {0: False}
    for pid in [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]:
        line, mark = [], ""
        at = pid
        while at not in ours and not mark:
            line.append(at)
            ours[at] = False
            mark = _mark(at) if _namespace(str(at)) == here else ""
            at = _parent(at)
        ours |= dict.fromkeys(line, mark.startswith(prefix) if mark else ours[at])
        if ours[pid]:
            yield pid


def _namespace(pid: str) -> str:
    try:
        return str((_PROC / pid / "ns/pid").readlink())
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        # The second field is the name in parentheses, which may hold anything.
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _mark(pid: int) -> str:
    try:
        variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    start = os.fsencode(f"{MARK}=")
    return next((os.fsdecode(item[len(start) :]) for item in variables if item.startswith(start)), "")
