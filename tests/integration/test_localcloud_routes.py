"""Alias ranges as addresses of this machine, with its real kernel.

Ranges are of 198.18.0.0/15, the network for benchmarks (RFC 2544), so that nobody's network is cut off.
"""

import ctypes
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from localcloud.backends import routes
from localcloud.home import Home
from localcloud.specs import BackendError

SUDO = [] if os.geteuid() == 0 else ["sudo", "-n"]


def ip(*arguments: str, check: bool = True) -> str:
    """What the administrator of this machine does by hand."""
    command = [*SUDO, "ip", "route", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


def can_bind(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module", autouse=True)
def _permitted() -> None:
    """Ask whether this user may do any of it."""
    if shutil.which("ip") is None or (SUDO and shutil.which("sudo") is None):
        pytest.skip("`ip` (iproute2), and root or sudo, are needed to change this machine's routes")
    asked = [*SUDO, "ip", "route", "add", "local", "198.19.255.255/32", "dev", "lo"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"this machine's routes may not be changed: {answer.stderr.strip()}")
    ip("del", "local", "198.19.255.255/32", "dev", "lo")


@pytest.fixture
def may_hold() -> None:
    """Without sudo, as localcloud does it."""
    if SUDO:
        pytest.skip("only root may make a range local without sudo")


@pytest.fixture
def net() -> str:
    """The first three numbers of a range."""
    return f"198.18.{random.randint(0, 255)}"  # noqa: S311


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "one")
    yield home
    routes.release_all(home)


@pytest.mark.usefixtures("may_hold")
def test_every_address_of_a_range_can_be_bound_for_as_long_as_it_is_held(home: Home, net: str) -> None:
    assert not can_bind(f"{net}.7")
    for _ in range(2):  # it may be said again
        routes.hold(home, "vm", [f"{net}.0/25", f"{net}.128/25"])
    assert can_bind(f"{net}.7")
    assert can_bind(f"{net}.200")
    routes.release(home, [f"{net}.0/25"])
    assert not can_bind(f"{net}.7")
    assert can_bind(f"{net}.200")
    routes.release(home, [f"{net}.0/25"])
    routes.release_all(home)
    assert not can_bind(f"{net}.200")


@pytest.mark.usefixtures("may_hold")
def test_what_is_in_a_network_of_this_machine_is_refused_by_name_and_nothing_is_half_done(
    home: Home, net: str
) -> None:
    ip("add", "unreachable", f"{net}.128/26")
    try:
        with pytest.raises(BackendError, match=rf"vm: .*{net}.128/25 is in use .*unreachable {net}.128/26"):
            routes.hold(home, "vm", [f"{net}.0/25", f"{net}.128/25"])
        assert not can_bind(f"{net}.7")
    finally:
        ip("del", "unreachable", f"{net}.128/26")
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(BackendError, match="choose another range"):
            routes.hold(home, "vm", [f"{own}/32"])


@pytest.mark.usefixtures("may_hold")
def test_one_localcloud_takes_nothing_from_another(home: Home, net: str, tmp_path: Path) -> None:
    other = Home(tmp_path / "two")
    routes.hold(home, "vm", [f"{net}.0/24"])
    for cidr in (f"{net}.0/24", f"{net}.0/25"):
        with pytest.raises(BackendError, match="a localcloud's"):
            routes.hold(other, "vm", [cidr])
    routes.release(other, [f"{net}.0/24"])
    routes.release_all(other)
    assert can_bind(f"{net}.7")


def test_a_range_that_was_made_local_beforehand_serves_and_stays(home: Home, net: str) -> None:
    ip("add", "local", f"{net}.0/24", "dev", "lo")
    try:
        routes.hold(home, "vm", [f"{net}.0/25"])
        routes.release(home, [f"{net}.0/25"])
        routes.release_all(home)
        assert can_bind(f"{net}.7")
    finally:
        ip("del", "local", f"{net}.0/24", "dev", "lo")


def _hold_without_the_right(root: Path, cidr: str) -> str:
    """In a process of its own, which gives up the right to change networks for all that it starts."""
    drop_from_bounding_set, net_admin = 24, 12
    ctypes.CDLL(None).prctl(drop_from_bounding_set, net_admin, 0, 0, 0)
    try:
        routes.hold(Home(root), "vm", [cidr])
    except BackendError as error:
        return str(error)
    return ""


def test_who_may_not_is_told_the_one_command_and_after_it_all_is_well(home: Home, net: str) -> None:
    with get_context("spawn").Pool(1) as pool:
        said = pool.apply(_hold_without_the_right, (home.root, f"{net}.0/24"))
        assert said.startswith(f"instance vm: its range {net}.0/24 is not local to this machine")
        assert "Operation not permitted" in said
        command = said.rpartition("sudo ")[2]
        assert command == f"ip route add local {net}.0/24 dev lo"
        subprocess.run([*SUDO, *command.split()], check=True)
        try:
            assert pool.apply(_hold_without_the_right, (home.root, f"{net}.0/24")) == ""
        finally:
            ip("del", "local", f"{net}.0/24", "dev", "lo")


@pytest.mark.usefixtures("may_hold")
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_reset_takes_the_ranges_back_even_when_the_directory_is_gone(
    home: Home, net: str, *, is_gone: bool
) -> None:
    routes.hold(home, "vm", [f"{net}.0/24"])
    if is_gone:
        shutil.rmtree(home.root)
    command = [sys.executable, "-m", "localcloud", "reset"]
    env = os.environ | {"LOCALCLOUD_HOME": str(home.root)}
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert not can_bind(f"{net}.7")
