"""Who is at the other end of a connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from localcloud.backends import processes
from localcloud.backends.callers import is_call_of
from localcloud.backends.processes import MARK

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="callers are found in /proc")

# Connects, and holds the connection until its input ends.
CALL = "import socket, sys; held = socket.create_connection((sys.argv[1], int(sys.argv[2]))); input()"
OWN = processes.mark(Path("/home"), "instances/own")


def _is_own(mark: str | None, host: str = "127.0.0.1", *, prefix: tuple[str, ...] = ()) -> bool:
    """What is said of a process that is started with a mark, by the command `prefix`."""
    environment = {key: value for key, value in os.environ.items() if key != MARK}
    if mark is not None:
        environment[MARK] = mark
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        command = [*prefix, sys.executable, "-c", CALL, host, str(server.getsockname()[1])]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as caller:
            with server.accept()[0] as connection:
                answer = is_call_of(OWN, connection)
            caller.communicate(b"\n")
    return answer


@pytest.mark.parametrize(
    ("mark", "own"),
    [
        (f"{OWN}web", True),
        (None, False),
        ("", False),
        (processes.mark(Path("/home"), "instances/own-2", "web"), False),
        (processes.mark(Path("/home/other"), "instances/own", "web"), False),
        (f"x{OWN}web", False),
    ],
)
def test_a_caller_is_a_scopes_if_its_mark_says_so(mark: str | None, own: bool) -> None:
    assert _is_own(mark) is own


def test_a_caller_without_a_mark_is_its_nearest_marked_ancestors() -> None:
    other = processes.mark(Path("/home"), "instances/other", "web")
    without = ("sh", "-c", f'env -u {MARK} "$@"; :', "sh")
    assert _is_own(f"{OWN}web", prefix=without)
    assert not _is_own(other, prefix=without)
    assert not _is_own(f"{OWN}web", prefix=("env", f"{MARK}={other}", *without))


def test_an_ipv4_caller_may_use_an_ipv6_socket() -> None:
    if not Path("/proc/net/tcp6").exists():
        pytest.skip("there is no IPv6 here")
    assert _is_own(f"{OWN}web", "::ffff:127.0.0.1")
    assert not _is_own(None, "::ffff:127.0.0.1")
