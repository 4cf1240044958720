"""Reads a systemd service unit and turns it into a program of the supervisor.

The keys are those of a plain daemon. What only narrows what a process may do (sandboxing, resource limits,
another user) is accepted and has no effect; any other key is refused by name, so that nothing is dropped in
silence. Rules from systemd.syntax(7), systemd.unit(5), systemd.service(5) and systemd.exec(5).
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from localcloud.backends.rootfs import Rootfs
from localcloud.backends.supervisor import Program
from localcloud.specs import InstanceSpec

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*\.service")

_DIRECTORIES = {
    "RuntimeDirectory": ("run", "RUNTIME_DIRECTORY"),
    "StateDirectory": ("var/lib", "STATE_DIRECTORY"),
    "CacheDirectory": ("var/cache", "CACHE_DIRECTORY"),
    "LogsDirectory": ("var/log", "LOGS_DIRECTORY"),
    "ConfigurationDirectory": ("etc", "CONFIGURATION_DIRECTORY"),
}
_OBEYED = {
    "Unit": frozenset({"Description"}),
    "Service": frozenset(
        {
            "Type",
            "ExecStart",
            "Environment",
            "EnvironmentFile",
            "Restart",
            "RestartSec",
            "KillSignal",
            "KillMode",
            "TimeoutStopSec",
            "WorkingDirectory",
            "SyslogIdentifier",
            "UMask",
            *_DIRECTORIES,
            *(f"{key}Mode" for key in _DIRECTORIES),
        }
    ),
    "Install": frozenset({"WantedBy"}),
}
# Sandboxing, resource limits, users, and where output goes (it goes to the console).
# fmt: off
_NO_EFFECT = frozenset(
    {
        "AmbientCapabilities", "CPUAccounting", "CPUQuota", "CPUWeight", "CapabilityBoundingSet",
        "Delegate", "DeviceAllow", "DevicePolicy", "DynamicUser", "Group", "IOAccounting",
        "IOWeight", "IPAddressAllow", "IPAddressDeny", "InaccessiblePaths", "KeyringMode",
        "LimitCORE", "LimitMEMLOCK", "LimitNOFILE", "LimitNPROC", "LockPersonality",
        "MemoryAccounting", "MemoryDenyWriteExecute", "MemoryHigh", "MemoryMax", "MemoryMin",
        "MemorySwapMax", "Nice", "NoNewPrivileges", "OOMPolicy", "OOMScoreAdjust", "PrivateDevices",
        "PrivateIPC", "PrivateMounts", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectClock",
        "ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs",
        "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem",
        "ReadOnlyPaths", "ReadWritePaths", "RemoveIPC", "RestrictAddressFamilies",
        "RestrictFileSystems", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID",
        "RuntimeDirectoryPreserve", "SecureBits", "Slice", "SocketBindAllow", "SocketBindDeny",
        "StandardError", "StandardInput", "StandardOutput", "SupplementaryGroups",
        "SystemCallArchitectures", "SystemCallErrorNumber", "SystemCallFilter", "TasksAccounting",
        "TasksMax", "TemporaryFileSystem", "TimeoutStartSec", "User",
    }
)
# fmt: on
_ACCEPTED = {
    "Unit": frozenset(
        {
            "After",
            "Before",
            "Documentation",
            "Requires",
            "StartLimitBurst",
            "StartLimitIntervalSec",
            "Wants",
        }
    ),
    "Install": frozenset({"RequiredBy"}),
    "Service": _NO_EFFECT,
}
_RESTARTS = {"no": "no", "always": "always", "on-failure": "on-failure"}
_KILL_MODES = ("control-group", "mixed", "process")
_SECONDS = {
    "us": 1e-6,
    "usec": 1e-6,
    "ms": 1e-3,
    "msec": 1e-3,
    "": 1,
    "s": 1,
    "sec": 1,
    "second": 1,
    "seconds": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "minutes": 60,
    "h": 3600,
    "hr": 3600,
    "hour": 3600,
    "hours": 3600,
    "d": 86400,
}
# systemd's defaults (DefaultRestartSec, DefaultTimeoutStopSec).
_RESTART_SECONDS = 0.1
_STOP_SECONDS = 90
_FOREVER = 10**7
# Started after the metadata server, before the startup script.
PRIORITY = 60
_ESCAPES = {"n": "\n", "t": "\t", "s": " ", "r": "\r", "\\": "\\", '"': '"', "'": "'"}


class UnitError(Exception):
    """The unit cannot be read or used; the message names the unit, the line or the key."""


@dataclass(frozen=True)
class Unit:
    """A parsed unit: for each section's key the values in order, as written."""

    name: str
    path: Path
    values: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def all(self, section: str, key: str) -> tuple[str, ...]:
        return self.values.get((section, key), ())

    def last(self, section: str, key: str, default: str = "") -> str:
        return self.all(section, key)[-1] if self.all(section, key) else default

    @property
    def description(self) -> str:
        return self.last("Unit", "Description", self.name)

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".service")


def find(rootfs: Rootfs, name: str) -> Path | None:
    """The file of a unit; for `a@b.service` its own, else the template `a@.service`."""
    template = re.sub(r"@.*\.service$", "@.service", name)
    for candidate in (name, template):
        path = rootfs.units / candidate
        if path.is_file():
            return path
    return None


def parse(name: str, path: Path) -> Unit:
    """
    Raises:
        UnitError: a line that is no assignment, or a key that is not known.
    """
    values: dict[tuple[str, str], tuple[str, ...]] = {}
    section = ""
    for number, line in _logical_lines(path.read_text()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            if section not in _OBEYED:
                raise UnitError(f"{path}:{number}: section [{section}] is not supported")
            continue
        key, separator, value = (part.strip() for part in line.partition("="))
        if not separator or not section:
            raise UnitError(f"{path}:{number}: {line!r} is no assignment in a section")
        if key in _ACCEPTED[section]:
            continue
        if key not in _OBEYED[section]:
            raise UnitError(f"{path}:{number}: key {key} in section [{section}] is not supported")
        # An empty value clears what was there.
        values[section, key] = (*values.get((section, key), ()), value) if value else ()
    return Unit(name, path, values)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with continuations joined, comments and blank lines left out; comments may stand in between."""
    pending, start = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith(("#", ";")):
            continue
        start = start if pending else number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        line = (pending + line).strip()
        pending = ""
        if line:
            yield start, line
    if pending.strip():
        yield start, pending.strip()


def program(unit: Unit, rootfs: Rootfs, spec: InstanceSpec, *, enabled: bool) -> Program:
    """The supervisor's program for a unit; makes the directories that the unit asks for.

    Raises:
        UnitError: a value that is not supported, a file that is missing, no such executable.
    """

    def expand(text: str) -> str:
        return _expand_specifiers(text, unit, rootfs, spec)

    kind = unit.last("Service", "Type", "simple")
    if kind not in ("simple", "exec"):
        raise UnitError(f"{unit.name}: Type={kind} is not supported (simple, exec)")
    environment = rootfs.environment(spec)
    environment |= _directories(unit, rootfs, expand)
    environment |= _environment(unit, expand)
    command = _command(unit, environment, expand)
    restart = unit.last("Service", "Restart", "no")
    kill_mode = unit.last("Service", "KillMode", "control-group")
    if restart not in _RESTARTS:
        raise UnitError(f"{unit.name}: Restart={restart} is not supported ({', '.join(_RESTARTS)})")
    if kill_mode not in _KILL_MODES:
        raise UnitError(f"{unit.name}: KillMode={kill_mode} is not supported ({', '.join(_KILL_MODES)})")
    stop_seconds = _duration(unit, "TimeoutStopSec", _STOP_SECONDS)
    return Program(
        name=rootfs.program(unit.stem),
        command=command,
        environment=environment,
        directory=_working_directory(unit, rootfs, expand),
        scope=rootfs.scope,
        priority=PRIORITY,
        autostart=enabled,
        restart=_RESTARTS[restart],
        restart_delay=_duration(unit, "RestartSec", _RESTART_SECONDS),
        stop_signal=_signal(unit),
        stop_seconds=max(1, round(stop_seconds)),
        kill_mode=kill_mode,
        umask=_octal(unit, "UMask", "0022"),
        console=str(rootfs.console),
        identifier=expand(unit.last("Service", "SyslogIdentifier")) or Path(command[0]).name,
        host=spec.name,
    )


def _command(unit: Unit, environment: dict[str, str], expand: Callable[[str], str]) -> tuple[str, ...]:
    lines = unit.all("Service", "ExecStart")
    if len(lines) != 1:
        raise UnitError(f"{unit.name}: a service has exactly one ExecStart, this one has {len(lines)}")
    # The prefixes change privileges (no effect here) or ignore a failure that a daemon does not have.
    words = _split(unit, lines[0].lstrip("-+!:"))
    if not words:
        raise UnitError(f"{unit.name}: ExecStart is empty")
    arguments: list[str] = []
    for word in words:
        whole = re.fullmatch(r"\$([A-Za-z_][A-Za-z0-9_]*)", word)
        if whole:  # an unbraced variable as a word of its own becomes as many words as it has
            arguments += environment.get(whole.group(1), "").split()
        else:
            arguments.append(_expand_variables(expand(word), environment))
    executable = arguments[0]
    if shutil.which(executable, path=environment["PATH"]) is None:
        raise UnitError(f"{unit.name}: Unable to locate executable '{executable}': No such file or directory")
    return tuple(arguments)


def _expand_variables(word: str, environment: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return "$" if match.group(0) == "$$" else environment.get(match.group(1), "")

    return re.sub(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, word)


def _split(unit: Unit, text: str) -> list[str]:
    """Words as systemd splits them: quotes around whole or parts of words, C escapes."""
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    characters = iter(text)
    for character in characters:
        if character == "\\":
            word = word or []
            word.append(_ESCAPES.get(following := next(characters, ""), "\\" + following))
        elif quote:
            if character == quote:
                quote = ""
            elif word is not None:
                word.append(character)
        elif character in "\"'":
            quote = character
            word = word or []
        elif character.isspace():
            if word is not None:
                words.append("".join(word))
            word = None
        else:
            word = word or []
            word.append(character)
    if quote:
        raise UnitError(f"{unit.name}: unbalanced quote in {text!r}")
    return words if word is None else [*words, "".join(word)]


def _environment(unit: Unit, expand: Callable[[str], str]) -> dict[str, str]:
    """Environment= first; EnvironmentFile= overrides it."""
    found: dict[str, str] = {}
    for line in unit.all("Service", "Environment"):
        for word in _split(unit, line):
            key, separator, value = expand(word).partition("=")
            if not separator:
                raise UnitError(f"{unit.name}: Environment={word} is no assignment")
            found[key] = value
    for item in unit.all("Service", "EnvironmentFile"):
        path = Path(expand(item.removeprefix("-")))
        try:
            text = path.read_text()
        except OSError as error:
            if item.startswith("-"):
                continue
            raise UnitError(
                f"{unit.name}: Failed to load environment file {path}: {error.strerror}"
            ) from error
        for _, line in _logical_lines(text):
            key, separator, value = line.partition("=")
            if separator:
                words = _split(unit, value)
                found[key.strip()] = " ".join(words)
    return found


def _directories(unit: Unit, rootfs: Rootfs, expand: Callable[[str], str]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for key, (place, variable) in _DIRECTORIES.items():
        paths = []
        for name in (word for line in unit.all("Service", key) for word in _split(unit, expand(line))):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UnitError(f"{unit.name}: {key}={name} must be a relative path")
            path = rootfs.root / place / name
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(_octal(unit, f"{key}Mode", "0755"))
            paths.append(str(path))
        if paths:
            variables[variable] = ":".join(paths)
    return variables


def _working_directory(unit: Unit, rootfs: Rootfs, expand: Callable[[str], str]) -> str:
    given = expand(unit.last("Service", "WorkingDirectory"))
    path = (
        Path(given.removeprefix("-")) if given not in ("", "~") else rootfs.root / ("root" if given else "")
    )
    if not path.is_dir():
        if not given.startswith("-"):
            raise UnitError(f"{unit.name}: WorkingDirectory={given} is no directory")
        path = rootfs.root
    return str(path)


def _expand_specifiers(text: str, unit: Unit, rootfs: Rootfs, spec: InstanceSpec) -> str:
    prefix, _, instance = unit.stem.partition("@")
    root = rootfs.root
    known = {
        "%": "%",
        "n": unit.name,
        "N": unit.stem,
        "p": prefix,
        "i": instance,
        "H": spec.name,
        "t": str(root / "run"),
        "S": str(root / "var/lib"),
        "C": str(root / "var/cache"),
        "L": str(root / "var/log"),
        "E": str(root / "etc"),
        "T": str(root / "tmp"),
        "h": str(root / "root"),
    }

    def value(match: re.Match[str]) -> str:
        if match.group(1) not in known:
            raise UnitError(f"{unit.name}: specifier {match.group(0)} is not supported")
        return known[match.group(1)]

    return re.sub(r"%(.)", value, text)


def seconds(text: str) -> float | None:
    """systemd.time(7)'s time spans (`90`, `1min 30s`, `500ms`, `infinity`); None if it is none."""
    if text == "infinity":
        return _FOREVER
    if not re.fullmatch(r"\s*(\d+(\.\d+)?\s*[a-z]*\s*)+", text):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text)
    if any(name not in _SECONDS for _, name in parts):
        return None
    return sum(float(number) * _SECONDS[name] for number, name in parts)


def _duration(unit: Unit, key: str, default: float) -> float:
    text = unit.last("Service", key)
    if not text:
        return default
    value = seconds(text)
    if value is None:
        raise UnitError(f"{unit.name}: {key}={text} is no time span")
    return value


def _octal(unit: Unit, key: str, default: str) -> int:
    text = unit.last("Service", key, default)
    if not re.fullmatch(r"[0-7]{1,4}", text):
        raise UnitError(f"{unit.name}: {key}={text} is no mode")
    return int(text, 8)


def _signal(unit: Unit) -> str:
    text = unit.last("Service", "KillSignal", "SIGTERM")
    name = text if text.startswith("SIG") else f"SIG{text}"
    if name not in signal.Signals.__members__:
        raise UnitError(f"{unit.name}: KillSignal={text} is no signal")
    return name.removeprefix("SIG")


def enabled_units(rootfs: Rootfs) -> list[str]:
    """The names of the units that start at boot."""
    try:
        return sorted(link.name for link in rootfs.wants.iterdir() if NAME.fullmatch(link.name))
    except FileNotFoundError:
        return []
