"""Ports that are chosen once and kept in a file, so that an address stays good after a restart."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

from localcloud.home import LOOPBACK, is_free, write_private
from localcloud.specs import BackendError

# Below every system's ephemeral range (Linux 32768, macOS 49152): while a program is down, no outgoing
# connection can take its port.
_RANGE = range(20000, 30000)


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
