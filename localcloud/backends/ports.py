"""Ports that are chosen once and kept in a file, so that an address stays good after a restart."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import socket
from pathlib import Path

from localcloud.backends.callers import tcp_sockets
from localcloud.home import LOOPBACK, is_free, write_private
from localcloud.specs import BackendError

# Below every system's ephemeral range (Linux 32768, macOS 49152): while a program is down, no outgoing
# connection can take its port.
_RANGE = range(20000, 30000)
_NOBODYS = "127.255.255.254"


def choose_port(host: str = LOOPBACK, taken: frozenset[int] = frozenset()) -> int:
    """A TCP port that nobody listens on now.

    Raises:
        BackendError: none was found, or `host` is no address of this machine.
    """
    for port in random.sample(_RANGE, 200):
        if port not in taken and is_free(port, host):
            return port
    raise BackendError(f"no free port on {host}")


def remembered_ports(path: Path, *names: str, host: str = LOOPBACK) -> dict[str, int]:
    """The ports kept in `path` under these names; those that are missing are chosen and kept.

    Raises:
        BackendError: the file is damaged, and what has these ports is known to others by them.
    """
    ports: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        try:
            ports = {str(name): int(port) for name, port in json.loads(path.read_text()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise BackendError(
                f"{path} is damaged ({error}); delete what it belongs to, and create it again"
            ) from error
    missing = [name for name in names if name not in ports]
    for name in missing:
        ports[name] = choose_port(host, frozenset(ports.values()))
    if missing:
        write_private(path, json.dumps(ports))
    return {name: ports[name] for name in names}


def refusal(port: int) -> str:
    """Why no instance can listen on a port, to be said after its number; empty if nothing is in the way.

    Asked on an address that no instance has: what is in the way there listens on all of them.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_NOBODYS, port))
        except OSError as error:
            match error.errno:
                case errno.EADDRINUSE:
                    return f"is taken{owner(port)}"
                case errno.EACCES | errno.EPERM:
                    return "needs rights that you do not have"
    return ""


def owner(port: int) -> str:
    """` by NAME (process PID)` for who listens on a port, if that can be told (Linux only)."""
    links = {found.link for found in tcp_sockets() if found.is_listening and found.port == port}
    for entry in Path("/proc").glob("[0-9]*/fd/*") if links else ():
        try:
            if str(entry.readlink()) in links:
                process = entry.parents[1]
                return f" by {(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue
    return ""
