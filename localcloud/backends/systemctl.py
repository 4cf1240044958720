"""The `systemctl` of an instance: systemd's verbs, words and exit statuses over localcloud's supervisor.

Served: daemon-reload, enable and disable (with --now), start, stop, restart, is-active, is-enabled, status,
show. Units are read when they are started, so daemon-reload has nothing to do. Runs in a few hundredths of a
second, as scripts call it often: standard library only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from localcloud.backends import units
from localcloud.backends.rootfs import Rootfs
from localcloud.backends.supervisor import ProgramState, Supervisor
from localcloud.backends.units import Unit, UnitError
from localcloud.home import Home
from localcloud.specs import BackendError

# From systemctl(1) and systemd's LSB statuses.
_FAILED = 1
_NOT_INSTALLED = 5
_NOT_ACTIVE = 3
_UNKNOWN = 4
_TAIL = 10

_ACTIVE_STATES = {
    "RUNNING": ("active", "running"),
    "STARTING": ("active", "running"),
    "WAITING": ("activating", "auto-restart"),
    "BACKOFF": ("activating", "auto-restart"),
    "STOPPING": ("deactivating", "stop-sigterm"),
    "FATAL": ("failed", "failed"),
    "UNKNOWN": ("failed", "failed"),
}


@dataclass(frozen=True)
class Options:
    """What was given beside the verb and the units."""

    now: bool = False
    quiet: bool = False
    value: bool = False
    properties: tuple[str, ...] = ()


class Systemctl:
    """One instance's services."""

    def __init__(self, home: Home, instance: str) -> None:
        self._rootfs = Rootfs(home, instance)
        self._spec = self._rootfs.load()
        self._supervisor = Supervisor(home)

    def run(self, verb: str, names: Sequence[str], options: Options) -> int:
        """Do what a verb says for each unit; the exit status is the first one that is not 0."""
        verbs: dict[str, Callable[[str, Options], int]] = {
            "enable": self._enable,
            "disable": self._disable,
            "start": self._start,
            "stop": self._stop,
            "restart": self._restart,
            "is-active": self._is_active,
            "is-enabled": self._is_enabled,
            "status": self._status,
            "show": self._show,
        }
        if verb == "daemon-reload" and not names:
            return 0
        if verb not in verbs:
            return _complain(f"Unknown command verb '{verb}'.", _FAILED)
        if not names:
            return _complain("Too few arguments.", _FAILED)
        statuses = []
        for name in names:
            full = name if name.endswith(".service") else f"{name}.service"
            if not units.NAME.fullmatch(full) or ".." in full:
                return _complain(f'Invalid unit name "{name}".', _FAILED)
            statuses.append(verbs[verb](full, options))
        return next((status for status in statuses if status), 0)

    def _enable(self, name: str, options: Options) -> int:
        unit = self._unit(name)
        if unit is None:
            return _complain(f"Failed to enable unit: Unit {name} does not exist", _FAILED)
        link = self._rootfs.wants / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(unit.path, link.parent))
            if not options.quiet:
                _say(f"Created symlink {link} -> {unit.path}.", sys.stderr)
        self._supervisor.set_autostart(self._program(name), enabled=True)
        return self._start(name, options) if options.now else 0

    def _disable(self, name: str, options: Options) -> int:
        link = self._rootfs.wants / name
        if units.find(self._rootfs, name) is None and not link.is_symlink():
            return _complain(f"Failed to disable unit: Unit {name} does not exist", _FAILED)
        if link.is_symlink():
            link.unlink()
            if not options.quiet:
                _say(f'Removed "{link}".', sys.stderr)
        self._supervisor.set_autostart(self._program(name), enabled=False)
        return self._stop(name, options) if options.now else 0

    def _start(self, name: str, _options: Options) -> int:
        if self._state(name).live:
            return 0
        unit = self._unit(name)
        if unit is None:
            return _complain(f"Failed to start {name}: Unit {name} not found.", _NOT_INSTALLED)
        program = units.program(unit, self._rootfs, self._spec, enabled=self._is_wanted(name))
        self._supervisor.add(program, start=True)
        return 0

    def _stop(self, name: str, _options: Options) -> int:
        if self._state(name).state == "ABSENT" and self._unit(name) is None:
            return _complain(f"Failed to stop {name}: Unit {name} not loaded.", _NOT_INSTALLED)
        self._supervisor.stop_program(self._program(name))
        return 0

    def _restart(self, name: str, options: Options) -> int:
        if self._unit(name) is None:
            return _complain(f"Failed to restart {name}: Unit {name} not found.", _NOT_INSTALLED)
        self._supervisor.stop_program(self._program(name))
        return self._start(name, options)

    def _is_active(self, name: str, options: Options) -> int:
        active = self._active(name)[0]
        if not options.quiet:
            _say(active)
        if active == "active":
            return 0
        return _NOT_ACTIVE if self._is_known(name) else _UNKNOWN

    def _is_enabled(self, name: str, options: Options) -> int:
        known = self._unit_file_state(name)
        if not options.quiet:
            _say(known or "not-found")
        return {"enabled": 0, "disabled": _FAILED}.get(known, _UNKNOWN)

    def _status(self, name: str, _options: Options) -> int:
        if not self._is_known(name):
            return _complain(f"Unit {name} could not be found.", _UNKNOWN)
        unit, state = self._unit(name), self._state(name)
        active, sub = self._active(name)
        mark = {"active": "●", "failed": "x"}.get(active, "○")
        since = time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(state.started))
        lines = [f"{mark} {name} - {unit.description if unit else name}"]
        place = f"loaded ({unit.path}; {self._unit_file_state(name)})" if unit else "not-found"
        lines.append(f"     Loaded: {place}")
        lines.append(f"     Active: {active} ({sub})" + (f" since {since}" if state.started else ""))
        if state.pid:
            lines.append(f"   Main PID: {state.pid}")
        _say("\n".join([*lines, "", *self._tail(name)]))
        return 0 if active == "active" else _NOT_ACTIVE

    def _show(self, name: str, options: Options) -> int:
        unit, state = self._unit(name), self._state(name)
        active, sub = self._active(name)
        properties = {
            "Id": name,
            "Description": unit.description if unit else name,
            "LoadState": "loaded" if unit else "not-found",
            "ActiveState": active,
            "SubState": sub,
            "UnitFileState": self._unit_file_state(name),
            "MainPID": str(state.pid),
            "ExecMainStatus": str(state.exit_status),
            "FragmentPath": str(unit.path) if unit else "",
        }
        for key in options.properties or tuple(properties):
            if key in properties:
                _say(properties[key] if options.value else f"{key}={properties[key]}")
        return 0

    def _unit(self, name: str) -> Unit | None:
        path = units.find(self._rootfs, name)
        return None if path is None else units.parse(name, path)

    def _program(self, name: str) -> str:
        return self._rootfs.program(name.removesuffix(".service"))

    def _state(self, name: str) -> ProgramState:
        return self._supervisor.status(self._program(name))

    def _active(self, name: str) -> tuple[str, str]:
        state = self._state(name)
        if state.state == "EXITED" and state.exit_status != 0:
            return ("failed", "failed")
        return _ACTIVE_STATES.get(state.state, ("inactive", "dead"))

    def _is_wanted(self, name: str) -> bool:
        return (self._rootfs.wants / name).is_symlink()

    def _unit_file_state(self, name: str) -> str:
        if self._is_wanted(name):
            return "enabled"
        return "disabled" if units.find(self._rootfs, name) else ""

    def _is_known(self, name: str) -> bool:
        return units.find(self._rootfs, name) is not None or self._state(name).state != "ABSENT"

    def _tail(self, name: str) -> list[str]:
        log = self._rootfs.home.logs / f"{self._program(name)}.log"
        try:
            return log.read_text(errors="replace").splitlines()[-_TAIL:]
        except FileNotFoundError:
            return []


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stdout)


def _complain(text: str, status: int) -> int:
    _say(text, sys.stderr)
    return status


def _arguments(words: Sequence[str]) -> tuple[list[str], Options]:
    """Words that are no options, and the options.

    Raises:
        UnitError: an option that is not served.
    """
    plain: list[str] = []
    flags: set[str] = set()
    properties: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("-p", "--property"):
            properties += next(rest, "").split(",")
        elif word.startswith(("--property=", "-p")):
            properties += word.removeprefix("--property=").removeprefix("-p").split(",")
        elif word in (
            "--now",
            "--quiet",
            "-q",
            "--value",
            "--no-pager",
            "--system",
            "--no-block",
            "--full",
            "-l",
        ):
            flags.add(word)
        elif word.startswith("-"):
            raise UnitError(f"unrecognized option '{word}'")
        else:
            plain.append(word)
    quiet = bool(flags & {"-q", "--quiet"})
    return plain, Options("--now" in flags, quiet, "--value" in flags, tuple(properties))


def main(words: Sequence[str]) -> int:
    """The command; LOCALCLOUD_INSTANCE names the instance."""
    try:
        plain, options = _arguments(words)
        if not plain:
            return _complain("systemctl: no command verb was given.", _FAILED)
        manager = Systemctl(Home.locate(), os.environ["LOCALCLOUD_INSTANCE"])
        return manager.run(plain[0], plain[1:], options)
    except (UnitError, BackendError) as error:
        return _complain(f"systemctl: {error}", _FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
