"""Compute Engine's instance: a process tree with a directory, a loopback address and a metadata server of its
own.

A start is a boot: the metadata server, the enabled units, the startup script. What the script starts by
`systemctl` lives on after it, under the supervisor, until the instance is stopped. Stopping ends every
process; the disk, which is everything but run/ and tmp/, stays until the instance is deleted.
"""

from __future__ import annotations

import http.client
import ipaddress
import shlex
import shutil
import socket
import sys

from localcloud.backends import units
from localcloud.backends.ports import remembered_ports
from localcloud.backends.processes import wait_until
from localcloud.backends.rootfs import Rootfs
from localcloud.backends.startup import IDENTIFIER
from localcloud.backends.supervisor import Supervisor, python_environment, python_program
from localcloud.backends.units import UnitError
from localcloud.home import LOOPBACK, Home, is_free
from localcloud.specs import BackendError, InstanceSpec

_KEPT = ("bin", "etc/systemd/system", "log", "root", "usr/local/bin", "var/cache", "var/lib", "var/log")
_LOST_AT_BOOT = ("run", "tmp")
# The agent's port: an address on which someone listens there already is of no use.
_AGENT_PORT = 10250
_METADATA_SECONDS = 20
# What every instance that runs has.
_PARTS = ("metadata", "startup-script")


def start_instance(home: Home, supervisor: Supervisor, spec: InstanceSpec) -> None:
    """Boot an instance. One that runs is left alone.

    Raises:
        BackendError: its address cannot be used, or its metadata server does not answer.
    """
    if not ipaddress.ip_address(spec.ip).is_loopback:
        raise BackendError(f"instance {spec.name}: {spec.ip} is no loopback address")
    rootfs = Rootfs(home, _checked(spec.name))
    home.instance(spec.name)
    ports = remembered_ports(rootfs.root / "ports.json", "metadata", host=spec.ip)
    if all(supervisor.status(rootfs.program(part)).state != "ABSENT" for part in _PARTS):
        rootfs.save(spec)
        _write_systemctl(rootfs)
        _wait_for_metadata(rootfs, spec, ports["metadata"])
        return
    _make_directories(rootfs)
    rootfs.save(spec)
    _write_systemctl(rootfs)
    supervisor.add(
        python_program(
            home,
            rootfs.program("metadata"),
            "localcloud.backends.metadata",
            spec.name,
            scope=rootfs.scope,
            priority=50,
        )
    )
    _wait_for_metadata(rootfs, spec, ports["metadata"])
    for name in units.enabled_units(rootfs):
        _start_unit(rootfs, supervisor, spec, name)
    supervisor.add(
        python_program(
            home,
            rootfs.program("startup-script"),
            "localcloud.backends.startup",
            spec.name,
            scope=rootfs.scope,
            priority=70,
            restart="no",
            console=str(rootfs.console),
            identifier=IDENTIFIER,
            host=spec.name,
        )
    )


def _wait_for_metadata(rootfs: Rootfs, spec: InstanceSpec, port: int) -> None:
    if not wait_until(lambda: _metadata_answers(spec.ip, port), _METADATA_SECONDS):
        log = rootfs.home.logs / f"{rootfs.program('metadata')}.log"
        raise BackendError(f"instance {spec.name}: the metadata server does not answer; see {log}")


def stop_instance(home: Home, supervisor: Supervisor, name: str) -> None:
    """End every process of an instance; its disk stays. One that does not run is no error."""
    rootfs = Rootfs(home, _checked(name))
    supervisor.remove_scope(rootfs.scope, rootfs.program(""))


def delete_instance(home: Home, supervisor: Supervisor, name: str) -> None:
    """Stop an instance and remove its disk and logs. One that is not there is no error."""
    stop_instance(home, supervisor, name)
    rootfs = Rootfs(home, name)
    try:
        shutil.rmtree(rootfs.root)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BackendError(f"cannot remove {rootfs.root}: {error.strerror}") from error
    supervisor.remove_logs(rootfs.program(""))


def serial_output(home: Home, name: str) -> str:
    """What was written to serial port 1, over all boots."""
    try:
        return Rootfs(home, _checked(name)).console.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def allocate_address(home: Home, taken: set[str]) -> str:
    """A loopback address that is none of `taken`, and on which nobody serves yet.

    Linux answers for all of 127.0.0.0/8: each instance gets an address of its own, from a network that
    depends on the home, so that two homes on a machine stay apart. Where only 127.0.0.1 can be bound (macOS),
    it is that one.

    Raises:
        BackendError: all are taken.
    """
    network = home.network
    if not _can_bind(f"{network}.2"):
        return LOOPBACK
    for last in range(2, 255):
        address = f"{network}.{last}"
        if address not in taken and is_free(_AGENT_PORT, address):
            return address
    raise BackendError(f"every address of {network}.0/24 is taken")


def _can_bind(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _checked(name: str) -> str:
    if not name or name.startswith(".") or "/" in name:
        raise BackendError(f"{name!r} is no name for an instance")
    return name


def _make_directories(rootfs: Rootfs) -> None:
    for name in _LOST_AT_BOOT:
        shutil.rmtree(rootfs.root / name, ignore_errors=True)
    for name in (*_KEPT, *_LOST_AT_BOOT):
        (rootfs.root / name).mkdir(parents=True, exist_ok=True)


def _write_systemctl(rootfs: Rootfs) -> None:
    """A wrapper with everything in it: it works in a script that empties its environment, too."""
    assignments = {
        "LOCALCLOUD_HOME": str(rootfs.home.root),
        "LOCALCLOUD_INSTANCE": rootfs.name,
        **python_environment(),
    }
    words = ["exec", "env", *(f"{key}={shlex.quote(value)}" for key, value in assignments.items())]
    words += [shlex.quote(sys.executable), "-S", "-P", "-m", "localcloud.backends.systemctl", '"$@"']
    path = rootfs.root / "bin/systemctl"
    path.write_text(f"#!/bin/sh\n{' '.join(words)}\n")
    path.chmod(0o755)


def _start_unit(rootfs: Rootfs, supervisor: Supervisor, spec: InstanceSpec, name: str) -> None:
    path = units.find(rootfs, name)
    if path is None:
        return
    try:
        program = units.program(units.parse(name, path), rootfs, spec, enabled=True)
    except UnitError as error:
        # As at a real boot: the failure of one unit is written to the console and stops nothing else.
        with rootfs.console.open("a") as console:
            console.write(f"systemd[1]: {error}\n")
        return
    supervisor.add(program)


def _metadata_answers(ip: str, port: int) -> bool:
    connection = http.client.HTTPConnection(ip, port, timeout=2)
    try:
        connection.request("GET", "/", headers={"Metadata-Flavor": "Google"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
