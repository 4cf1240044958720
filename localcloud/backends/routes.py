"""An instance's alias ranges as addresses of this machine: as on Google, where the guest agent makes each of
them local to the VM's kernel (`ip route add local RANGE`), so that a process may bind any address of it.

The kernel itself keeps which of these routes are of which home: they have a protocol of ours, and for a
metric a number that is made of the home's path. So none is forgotten with a file, and none goes that somebody
else made: a route that the machine's administrator added beforehand serves as well, and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network

from localcloud.home import Home
from localcloud.specs import BackendError

# A number that iproute2 and its daemons have no name for.
_PROTOCOL = "167"
# The default route, also in two halves as VPNs write it, leads everywhere and says of no range whose it is.
_SHORTEST_PREFIX = 2


@dataclass(frozen=True)
class Route:
    """A line of the kernel's tables. `text` is for people."""

    range: IPv4Network
    is_local: bool
    protocol: str
    metric: int
    text: str

    def is_of(self, home: Home) -> bool:
        return (self.protocol, self.metric) == (_PROTOCOL, _metric(home))


def hold(home: Home, owner: str, ranges: Sequence[str]) -> None:
    """Make ranges local to this machine's kernel, all or none; one that is so already is left as it is.

    Raises:
        BackendError: one is in a network that this machine knows, or this user may not.
    """
    if not ranges:
        return
    added: list[str] = []
    with home.lock("routes"):
        try:
            for cidr in ranges:
                if not _is_held(home, owner, IPv4Network(cidr)):
                    _add(home, owner, cidr)
                    added.append(cidr)
        except BackendError:
            for cidr in added:
                _remove(home, cidr)
            raise


def release(home: Home, ranges: Sequence[str]) -> None:
    """Take back what `hold` did; one that this home does not hold is no error.

    Raises:
        BackendError: the kernel refuses.
    """
    if not ranges:
        return
    with home.lock("routes"):
        for route in _own(home):
            if str(route.range) in ranges:
                _remove(home, str(route.range))


def release_all(home: Home) -> None:
    """Take back every range that this home holds, also when its directory is gone.

    Raises:
        BackendError: the kernel refuses.
    """
    for route in _own(home):
        _remove(home, str(route.range))


def _is_held(home: Home, owner: str, wanted: IPv4Network) -> bool:
    """Whether a range is local already, by us or by who runs this machine.

    Raises:
        BackendError: it belongs to something else.
    """
    near = [
        route
        for route in _routes()
        if route.range.overlaps(wanted) and route.range.prefixlen >= _SHORTEST_PREFIX
    ]
    for route in near:
        others = route.protocol == _PROTOCOL and not (route.is_of(home) and route.range == wanted)
        if route.is_local and wanted.subnet_of(route.range) and not others:
            return True
    for route in near:
        whose = ", which is a localcloud's" if route.protocol == _PROTOCOL else ""
        raise BackendError(
            f"instance {owner}: its range {wanted} is in use on this machine ({route.text}{whose}); "
            "choose another range"
        )
    return False


def _add(home: Home, owner: str, cidr: str) -> None:
    answer = _ip("route", "add", "local", cidr, *_mark(home))
    if answer.returncode:
        raise BackendError(
            f"instance {owner}: its range {cidr} is not local to this machine, and you may not make it so "
            f"({answer.stderr.strip()}); run this and try again: sudo ip route add local {cidr} dev lo"
        )


def _remove(home: Home, cidr: str) -> None:
    answer = _ip("route", "del", "local", cidr, *_mark(home))
    if answer.returncode:
        raise BackendError(
            f"cannot take the route to {cidr} back: {answer.stderr.strip()}; run: "
            f"sudo ip route del local {cidr} {' '.join(_mark(home))}"
        )


def _own(home: Home) -> list[Route]:
    try:
        return [route for route in _routes() if route.is_of(home)]
    except BackendError:
        return []  # who may not read them has added none


def _routes() -> list[Route]:
    answer = _ip("-4", "-json", "route", "show", "table", "all")
    if answer.returncode:
        raise BackendError(f"cannot read this machine's routes: {answer.stderr.strip()}")
    return [
        Route(
            range=IPv4Network(item["dst"]),
            is_local=item.get("type") == "local" and item.get("dev") == "lo",
            protocol=item.get("protocol", ""),
            metric=int(item.get("metric", 0)),
            text=" ".join(str(item[key]) for key in ("type", "dst", "gateway", "dev") if key in item),
        )
        for item in json.loads(answer.stdout or "[]")
        if item["dst"] != "default"
    ]


def _mark(home: Home) -> list[str]:
    return ["dev", "lo", "proto", _PROTOCOL, "metric", str(_metric(home))]


def _metric(home: Home) -> int:
    """A home's number, 32 bits; 0 means none to the kernel."""
    return int.from_bytes(hashlib.sha256(os.fsencode(home.root)).digest()[:4], "big") or 1


def _program() -> str | None:
    # An ordinary user's PATH may lack the directories of the system's own tools.
    return shutil.which("ip", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = _program()
    if program is None:
        raise BackendError("alias ranges need Linux and its program `ip` (Debian's package iproute2)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
