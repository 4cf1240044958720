"""supervisord as localcloud uses it: one daemon a home, one configuration fragment a program.

    supervisor/supervisord.conf   the daemon; programs come from conf.d/*.conf
    supervisor/programs/NAME.json everything about NAME (see launch.py for what it runs)
    supervisor/conf.d/NAME.conf   how NAME is kept running, made of the former
    supervisor/run/NAME.json      the process that runs it now
    logs/NAME.log                 its output, rotated

Both outlive the daemon, so everything comes back at the next start; a fragment that was damaged meanwhile
is written anew, and a program whose definition was damaged is dropped, until somebody adds it again.
Restarts are unlimited: `startsecs` is 0 and launch.py waits `restart_delay` before each one, where
supervisord's own way is to give up after some tries.

Stays on the standard library and quick to import: `systemctl` on an instance uses it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import xmlrpc.client
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from localcloud.backends.processes import MARK, end, mark, marked, start_time, wait_until
from localcloud.home import Home, write_private
from localcloud.sources import CHECKOUT
from localcloud.specs import BackendError

# sun_path holds 104 bytes on macOS and 108 on Linux; supervisord binds PATH.PID first.
_LONGEST_SOCKET_PATH = 90
# More than the longest stop time of any program (systemd's default for a unit is 90 s).
_LONGEST_STOP_SECONDS = 120
_LONGEST_START_SECONDS = 30
_LIVE = frozenset({"STARTING", "RUNNING", "STOPPING", "BACKOFF"})

# Paths are relative to supervisor/, where the daemon is started and stays: its parser would expand a `%` in
# one.
_CONFIGURATION = """\
[supervisord]
logfile=../logs/supervisord.log
logfile_maxbytes=5MB
logfile_backups=2
pidfile=supervisord.pid
childlogdir=../logs
umask=077
identifier=localcloud

[unix_http_server]
file=%(ENV_LOCALCLOUD_SOCKET)s
chmod=0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[eventlistener:serial-console]
command='%(ENV_LOCALCLOUD_PYTHON)s' -S -P -m localcloud.backends.console
events=PROCESS_LOG_STDOUT,PROCESS_STATE_EXITED,PROCESS_STATE_STOPPED
buffer_size=8192
autorestart=true
startsecs=0
startretries=1000000
stopasgroup=true
stderr_logfile=../logs/serial-console.log
stderr_logfile_maxbytes=1MB
stderr_logfile_backups=1
stdout_logfile=NONE

[include]
files=conf.d/*.conf
"""

_PROGRAM = """\
[program:{name}]
command='%(ENV_LOCALCLOUD_PYTHON)s' -S -P -m localcloud.backends.launch {name}
priority={priority}
autostart={autostart}
autorestart={autorestart}
exitcodes=0
startsecs=0
startretries=1000000
stopsignal={stop_signal}
stopwaitsecs={stop_seconds}
stopasgroup={stop_as_group}
killasgroup={kill_as_group}
redirect_stderr=true
stdout_logfile=../logs/{name}.log
stdout_logfile_maxbytes=5MB
stdout_logfile_backups=2
stdout_events_enabled={events}
"""

_AUTORESTART = {"always": "true", "on-failure": "unexpected", "no": "false"}


@dataclass(frozen=True)
class Program:
    """One process to keep.

    `environment` is all that it sees, beside PATH, HOME, USER, LANG and TMPDIR of the supervisor; `scope` is
    the directory below the home that it belongs to (`clusters/NAME`), `restart` systemd's `Restart=`,
    `restart_delay` seconds before each restart, `stop_seconds` the time between `stop_signal` and SIGKILL,
    `kill_mode` systemd's `KillMode=`. A lower `priority` starts earlier and stops later. Output also goes,
    line by line with `identifier` in front, to the file `console` if that is given.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    scope: str = ""
    priority: int = 50
    autostart: bool = True
    restart: str = "always"
    restart_delay: float = 0.5
    stop_signal: str = "TERM"
    stop_seconds: int = 10
    kill_mode: str = "control-group"
    umask: int = 0o077
    console: str = ""
    identifier: str = ""
    host: str = ""


_FIELDS = {item.name for item in fields(Program)} | {"mark"}


def _fragment(definition: dict[str, Any]) -> str:
    """How supervisord keeps a program, from its definition."""
    return _PROGRAM.format(
        name=definition["name"],
        priority=definition["priority"],
        autostart=str(definition["autostart"]).lower(),
        autorestart=_AUTORESTART[definition["restart"]],
        stop_signal=definition["stop_signal"].removeprefix("SIG"),
        stop_seconds=definition["stop_seconds"],
        stop_as_group=str(definition["kill_mode"] == "control-group").lower(),
        kill_as_group=str(definition["kill_mode"] != "process").lower(),
        events=str(bool(definition["console"])).lower(),
    )


@dataclass(frozen=True)
class ProgramState:
    """`state` is supervisord's name for it (RUNNING, EXITED, …), ABSENT if there is no such program, or
    WAITING before a restart, when it may have ended already; `pid` is 0 unless a process is there.
    """

    name: str
    state: str
    pid: int = 0
    exit_status: int = 0
    started: int = 0

    @property
    def live(self) -> bool:
        return self.state in _LIVE or self.state == "WAITING"


def python_environment() -> dict[str, str]:
    """For a Python of localcloud's own: its sources, UTF-8 in every locale, a place for compiled code."""
    elsewhere = {key: os.environ[key] for key in ("PYTHONPYCACHEPREFIX",) if key in os.environ}
    return {"PYTHONPATH": str(CHECKOUT), "PYTHONUTF8": "1", **elsewhere}


def python_program(home: Home, name: str, module: str, *arguments: str, **options: Any) -> Program:
    """A program of localcloud's own: `python -m module` with this interpreter, sources and home."""
    environment = {"LOCALCLOUD_HOME": str(home.root), "PYTHONUNBUFFERED": "1", **python_environment()}
    environment |= options.pop("environment", {})
    return Program(name, (sys.executable, "-P", "-m", module, *arguments), environment, **options)


class Supervisor:
    """The process supervisor of one home. Every method may be called from any process, at the same time."""

    def __init__(self, home: Home) -> None:
        self.home = home

    # The daemon.

    def start(self) -> None:
        """Start the daemon and every program that was left to it. A daemon that runs is left alone.

        Raises:
            BackendError: it cannot be started.
        """
        with self.home.lock("supervisor"):
            if self.is_running():
                return
            self._clear()
            directory = self.home.supervisor
            for name in ("conf.d", "programs", "run"):
                self.home.directory("supervisor", name)
            self.home.directory("logs")
            write_private(directory / "supervisord.conf", _CONFIGURATION)
            self._mend()
            result = subprocess.run(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "supervisor.supervisord",
                    "-c",
                    str(directory / "supervisord.conf"),
                ],
                env=self._environment(),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode != 0 or not wait_until(self.is_running, 10):
                raise BackendError(
                    f"the supervisor did not start: {(result.stderr or result.stdout).strip()[-500:]}; "
                    f"see {self.home.logs / 'supervisord.log'}"
                )
            pid = self._call("getPID")
            write_private(
                directory / "supervisord.json", json.dumps({"pid": pid, "started": start_time(pid)})
            )

    def stop(self) -> None:
        """Stop every program, then the daemon. Returns when no process of this home's is left.

        Raises:
            BackendError: a process cannot be ended.
        """
        with self.home.lock("supervisor"):
            if self.is_running():
                pid = self._call("getPID")
                started = start_time(pid)
                # The daemon would stop them by itself, but one after the other.
                self._halt_in_order(self._definitions())
                with contextlib.suppress(BackendError):
                    self._call("shutdown")
                wait_until(lambda: start_time(pid) != started, _LONGEST_STOP_SECONDS)
            self._clear()

    def is_running(self) -> bool:
        """Whether the daemon answers."""
        try:
            return bool(self._call("getState")["statename"] == "RUNNING")
        except BackendError:
            return False

    def _clear(self) -> None:
        """End what an earlier daemon left behind, and remove its socket and records."""
        left = end(self._orphans)
        if left:
            raise BackendError(f"processes of {self.home.root} cannot be ended: {', '.join(map(str, left))}")
        directory = self.home.supervisor
        socket_path = self.socket
        for path in (socket_path, directory / "supervisord.pid", directory / "supervisord.json"):
            path.unlink(missing_ok=True)
        if socket_path.parent != directory:
            with contextlib.suppress(OSError):
                socket_path.parent.rmdir()
        (directory / "socket-path").unlink(missing_ok=True)
        for record in (directory / "run").glob("*.json"):
            record.unlink(missing_ok=True)

    def _orphans(self) -> set[int]:
        found = set(marked(f"{self.home.root}#"))
        directory = self.home.supervisor
        for record in [directory / "supervisord.json", *(directory / "run").glob("*.json")]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                known = json.loads(record.read_text())
                if known["started"] is not None and start_time(known["pid"]) == known["started"]:
                    found.add(known["pid"])
        return found

    def _environment(self) -> dict[str, str]:
        kept = {
            key: os.environ[key] for key in ("PATH", "HOME", "USER", "LANG", "TMPDIR") if key in os.environ
        }
        return (
            kept
            | python_environment()
            | {
                MARK: mark(self.home.root),
                "LOCALCLOUD_PYTHON": sys.executable,
                "LOCALCLOUD_SUPERVISOR": str(self.home.supervisor),
                "LOCALCLOUD_SOCKET": str(self._private_socket()),
            }
        )

    # Its programs.

    def add(self, program: Program, *, start: bool = False) -> None:
        """Keep a program from now on. The same one again changes nothing; a changed one is restarted.

        A new one is started if it is `autostart`. With `start`, it runs afterwards in any case.

        Raises:
            BackendError: there is no such executable, or the supervisor does not take it.
        """
        name = program.name
        if shutil.which(program.command[0], path=program.environment.get("PATH")) is None:
            raise BackendError(f"{name}: there is no executable {program.command[0]} on PATH")
        if not self._write(program) and self.status(name).state != "ABSENT":
            if start:
                self.start_program(name)
            return
        self._halt(name)
        self._forget(name)
        self._call("reloadConfig")
        (self.home.supervisor / "run" / f"{name}.json").unlink(missing_ok=True)
        with _tolerate("ALREADY_ADDED"):
            self._call("addProcessGroup", name)
        if program.autostart:
            # The daemon starts it by itself at its next turn. A second start could run a script that has
            # ended by then once more.
            if not wait_until(lambda: self.status(name).started > 0, _LONGEST_START_SECONDS):
                raise BackendError(f"{name} is not started; see {self.home.logs / 'supervisord.log'}")
        elif start:
            self.start_program(name)

    def remove(self, name: str) -> None:
        """Stop a program and forget it. One that is not there is no error."""
        directory = self.home.supervisor
        (directory / "conf.d" / f"{name}.conf").unlink(missing_ok=True)
        if self.is_running():
            self._halt(name)
            self._forget(name)
        for path in (directory / "programs" / f"{name}.json", directory / "run" / f"{name}.json"):
            path.unlink(missing_ok=True)

    def remove_scope(self, scope: str, prefix: str) -> None:
        """Stop and forget every program of a scope, the last to start first, and end what they left behind.

        `prefix` is what the scope's programs are called, so that those are found whose definition is damaged.

        Raises:
            BackendError: a process cannot be ended.
        """
        paths = (self.home.supervisor / "programs").glob("*.json")
        mine = [
            self.definition(path.stem) or {"name": path.stem, "priority": 0}
            for path in sorted(paths)
            if path.stem.startswith(prefix)
        ]
        for program in mine:  # first, so that a kill in the middle brings none of them back
            (self.home.supervisor / "conf.d" / f"{program['name']}.conf").unlink(missing_ok=True)
        if self.is_running():
            self._halt_in_order(mine)
        for program in mine:
            self.remove(program["name"])
        left = end(lambda: marked(f"{self.home.root}#{scope}#"))
        if left:
            raise BackendError(f"processes of {scope} cannot be ended: {', '.join(map(str, left))}")

    def remove_logs(self, prefix: str) -> None:
        """Remove the logs of programs that are gone, by the beginning of their names."""
        for log in self.home.logs.iterdir():
            if log.name.startswith(prefix):
                log.unlink(missing_ok=True)

    def restart(self, name: str) -> None:
        """Stop a program and start it again, without the delay of an automatic restart."""
        self._halt(name)
        self.start_program(name)

    def start_program(self, name: str) -> None:
        """Start a program that is known; one that runs is left alone."""
        if self.status(name).live:
            return
        (self.home.supervisor / "run" / f"{name}.json").unlink(missing_ok=True)
        with _tolerate("ALREADY_STARTED"):
            self._call("startProcess", name, False)

    def stop_program(self, name: str) -> None:
        """Stop a program; it stays known."""
        self._halt(name)

    def set_autostart(self, name: str, *, enabled: bool) -> None:
        """Whether a known program comes back at the daemon's next start; does not touch it now."""
        definition = self.definition(name)
        if definition is not None:
            definition["autostart"] = enabled
            directory = self.home.supervisor
            _write_if_new(directory / "programs" / f"{name}.json", json.dumps(definition, indent=1))
            _write_if_new(directory / "conf.d" / f"{name}.conf", _fragment(definition))

    def state(self, name: str) -> str:
        return self.status(name).state

    def status(self, name: str) -> ProgramState:
        try:
            return self._program_state(self._call("getProcessInfo", name))
        except _FaultError as fault:
            if fault.name == "BAD_NAME":
                return ProgramState(name, "ABSENT")
            raise

    def programs(self) -> list[ProgramState]:
        """Every program that is known, by name."""
        return sorted(
            (self._program_state(item) for item in self._call("getAllProcessInfo")),
            key=lambda item: item.name,
        )

    def definition(self, name: str) -> dict[str, Any] | None:
        """The fields of the `Program` that was added under this name; None if it is not there, or damaged."""
        try:
            found: dict[str, Any] = json.loads(
                (self.home.supervisor / "programs" / f"{name}.json").read_text()
            )
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and found.keys() >= _FIELDS else None

    def _program_state(self, info: dict[str, Any]) -> ProgramState:
        name, state, exit_status = str(info["name"]), str(info["statename"]), int(info["exitstatus"])
        record = self.home.supervisor / "run" / f"{name}.json"
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(record.read_text())
            if state == "RUNNING" and known["waiting"] and known["pid"] == info["pid"]:
                state = "WAITING"
        if state == "EXITED" and self._restarts(name, exit_status):
            state = "WAITING"
        return ProgramState(name, state, info["pid"], exit_status, info["start"])

    def _restarts(self, name: str, exit_status: int) -> bool:
        """Whether the daemon starts a program again that has ended so."""
        policy = (self.definition(name) or {"restart": "no"})["restart"]
        return bool(policy == "always" or (policy == "on-failure" and exit_status != 0))

    def _definitions(self) -> list[dict[str, Any]]:
        paths = sorted((self.home.supervisor / "programs").glob("*.json"))
        return [found for path in paths if (found := self.definition(path.stem)) is not None]

    def _write(self, program: Program) -> bool:
        """Write the program's files; whether they are new."""
        definition = asdict(program) | {"mark": mark(self.home.root, program.scope, program.name)}
        # The fragment last: with it the program exists.
        written = [
            _write_if_new(
                self.home.directory("supervisor", "programs") / f"{program.name}.json",
                json.dumps(definition, indent=1),
            ),
            _write_if_new(
                self.home.directory("supervisor", "conf.d") / f"{program.name}.conf", _fragment(definition)
            ),
        ]
        return any(written)

    def _mend(self) -> None:
        """Make every fragment that of its definition: the daemon refuses to start with a single damaged one.

        A definition without a fragment is of a program that was being removed.
        """
        for fragment in (self.home.supervisor / "conf.d").glob("*.conf"):
            definition = self.definition(fragment.stem)
            if definition is None:
                fragment.unlink()
                fragment.parent.with_name("programs").joinpath(f"{fragment.stem}.json").unlink(
                    missing_ok=True
                )
            else:
                _write_if_new(fragment, _fragment(definition))

    def _halt_in_order(self, definitions: list[dict[str, Any]]) -> None:
        """Stop programs, those of one priority at the same time, the last to start first."""
        for priority in sorted({program["priority"] for program in definitions}, reverse=True):
            self._halt(*(program["name"] for program in definitions if program["priority"] == priority))

    def _halt(self, *names: str) -> None:
        """Return when no process of these programs is left, and none is about to be started.

        Between the end of a process and its restart there is nothing that the daemon would stop: what comes
        back in the meantime is stopped then.
        """
        concerned = [name for name in names if self.status(name).live]

        def left() -> list[str]:
            live = [state for state in map(self.status, concerned) if state.live]
            for state in live:
                if state.state != "STOPPING":
                    with _tolerate("NOT_RUNNING", "BAD_NAME"):
                        self._call("stopProcess", state.name, False)
            return [state.name for state in live]

        # The daemon itself goes from the stop signal to SIGKILL.
        if not wait_until(lambda: not left(), _LONGEST_STOP_SECONDS):
            raise BackendError(f"{', '.join(left())} does not stop; see the logs in {self.home.logs}")
        for name in concerned:
            (self.home.supervisor / "run" / f"{name}.json").unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with _tolerate("BAD_NAME"):
            self._call("removeProcessGroup", name)

    # Talking to the daemon.

    @property
    def socket(self) -> Path:
        """Where the daemon listens; written down at its start, as a program's environment may differ."""
        try:
            return Path((self.home.root / "supervisor" / "socket-path").read_text())
        except FileNotFoundError:
            return self._choose_socket()

    def _choose_socket(self) -> Path:
        """In the home, or in a directory of the user's own if that path is too long."""
        path = self.home.root / "supervisor" / "supervisor.sock"
        if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
            return path
        name = hashlib.sha256(os.fsencode(self.home.root)).hexdigest()[:16]
        runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        if len(runtime) > _LONGEST_SOCKET_PATH - 45:
            runtime = "/tmp"  # noqa: S108  _private_socket checks who owns what is in it
        return Path(runtime) / f"localcloud-{os.getuid()}-{name}" / "s"

    def _private_socket(self) -> Path:
        path = self._choose_socket()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        seen = path.parent.lstat()
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
            raise BackendError(f"{path.parent} must be a directory of yours with mode 0700; remove it")
        write_private(self.home.supervisor / "socket-path", str(path))
        return path

    def _call(self, method: str, *arguments: Any) -> Any:
        proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=_UnixTransport(self.socket))
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            raise _FaultError(method, arguments, fault) from fault
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise BackendError(
                f"the supervisor of {self.home.root} does not answer ({error}); "
                "run: python -m localcloud start"
            ) from error


class _FaultError(BackendError):
    """supervisord refused a call; `name` is its name for the fault (BAD_NAME, NOT_RUNNING, …)."""

    def __init__(self, method: str, arguments: tuple[Any, ...], fault: xmlrpc.client.Fault) -> None:
        super().__init__(f"the supervisor refused {method}{arguments!r}: {fault.faultString}")
        self.name = str(fault.faultString).partition(":")[0]


@contextlib.contextmanager
def _tolerate(*names: str) -> Iterator[None]:
    try:
        yield
    except _FaultError as fault:
        if fault.name not in names:
            raise


def _write_if_new(path: Path, text: str) -> bool:
    try:
        if path.read_text() == text:
            return False
    except FileNotFoundError:
        pass
    write_private(path, text)
    return True


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:  # noqa: ARG002
        return _UnixConnection(self._path)
