"""`command:local:Command`: a command run when the resource is created, updated, deleted.

Rules of the official plugin 1.2.1: a changed trigger replaces, any other changed input runs `update` (or
`create`); a command that fails fails the step, with its output in the error; the previous output is in
PULUMI_COMMAND_STDOUT/_STDERR.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from localcloud.plugins.protocol import (
    CancelledError,
    Checked,
    Diff,
    Failure,
    Provider,
    ProviderError,
    ReadResult,
    Resource,
)
from localcloud.plugins.values import UNKNOWN, Properties, Secret, Value, compare, has_secret, plain

TYPE = "command:local:Command"
_STRINGS = ("create", "update", "delete", "dir", "stdin")
_LOGGING = ("stdout", "stderr", "stdoutAndStderr", "none")
_NOT_SERVED = ("assetPaths", "archivePaths")
_KNOWN = {
    *_STRINGS,
    "environment",
    "interpreter",
    "triggers",
    "logging",
    "addPreviousOutputInEnv",
    *_NOT_SERVED,
}
# What the command's output may depend on, so that a secret there makes the output a secret.
_FLOWS_INTO_OUTPUT = {*_STRINGS, "environment", "interpreter", "triggers"}
_KILL_GRACE_SECONDS = 5


class CommandProvider(Provider):
    """The plugin 'command'."""

    name = "command"
    version = "1.2.1"

    def configure(self, config: Properties) -> None:
        """The plugin has no configuration."""

    def check(self, resource: Resource, old: Properties, new: Properties, seed: bytes) -> Checked:  # noqa: ARG002
        """Refuses unknown inputs and wrong types."""
        if resource.type != TYPE:
            self.refuse_type(resource.type, [TYPE])
        return Checked(new, list(_failures(plain(new))))

    def diff(self, resource: Resource, state: Properties, old: Properties, new: Properties) -> Diff:  # noqa: ARG002
        """A changed trigger replaces; anything else runs the update command."""
        changes = compare(old, new)
        return Diff(changes, frozenset(path for path in changes if path[0] == "triggers"))

    def create(self, resource: Resource, inputs: Properties, *, preview: bool) -> tuple[str, Properties]:
        """Runs `create`."""
        if preview:
            return "", _state(inputs, UNKNOWN, UNKNOWN)
        stdout, stderr = self._run(resource, inputs, plain(inputs.get("create")), {})
        return f"{resource.name}{secrets.token_hex(4)}", _state(inputs, stdout, stderr)

    def read(self, resource: Resource, state: Properties, inputs: Properties) -> ReadResult:
        """A command has nothing to read: it is what it was."""
        return ReadResult(resource.resource_id, state, inputs)

    def update(
        self,
        resource: Resource,
        state: Properties,
        old: Properties,  # noqa: ARG002
        new: Properties,
        *,
        preview: bool,
    ) -> Properties:
        """Runs `update`, or `create` where there is none."""
        if preview:
            return _state(new, UNKNOWN, UNKNOWN)
        stdout, stderr = self._run(resource, new, plain(new.get("update", new.get("create"))), state)
        return _state(new, stdout, stderr)

    def delete(self, resource: Resource, state: Properties, inputs: Properties) -> None:  # noqa: ARG002
        """Runs `delete`."""
        self._run(resource, state, plain(state.get("delete")), state)

    def _run(
        self, resource: Resource, inputs: Properties, command: str | None, previous: Properties
    ) -> tuple[str, str]:
        """Runs a command; returns stdout and stderr (without a last newline), the previous ones without a
        command.
        """
        given, before = plain(inputs), plain(previous)
        if command is None:
            return before.get("stdout", ""), before.get("stderr", "")
        environment = {**os.environ, **given.get("environment", {})}
        if given.get("addPreviousOutputInEnv", True):
            environment |= {
                f"PULUMI_COMMAND_{name.upper()}": before[name]
                for name in ("stdout", "stderr")
                if before.get(name)
            }
        arguments = [*(given.get("interpreter") or ["/bin/sh", "-c"]), command]
        directory = Path(given.get("dir") or ".")
        if not directory.is_dir():
            raise ProviderError(f"dir: {directory} is no directory; running {command!r} needs it")
        try:
            process = subprocess.Popen(
                arguments,
                cwd=directory,
                env=environment,
                stdin=subprocess.PIPE if given.get("stdin") else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that an interrupt ends what the command started, too
            )
        except OSError as error:
            raise ProviderError(f"interpreter: {arguments[0]} cannot be run: {error.strerror}") from error
        if process.stdin is not None:
            threading.Thread(target=_feed, args=(process.stdin, given["stdin"].encode()), daemon=True).start()
        deadline = time.monotonic() + resource.timeout if resource.timeout else None
        collected: dict[str, list[str]] = {"stdout": [], "stderr": []}
        everything: list[str] = []
        logged = {"stdoutAndStderr": ("stdout", "stderr"), "none": ()}.get(
            given.get("logging", "stdoutAndStderr"), (given.get("logging"),)
        )
        try:
            for stream, line in self._lines(process, deadline):
                collected[stream].append(line)
                everything.append(line)
                if stream in logged and line.strip():
                    self.log(resource.urn, line.rstrip("\n"))
        except ProviderError:
            _end(process)
            raise
        status = process.wait()
        if status != 0:
            how = f"exit status {status}" if status > 0 else f"signal: {signal.Signals(-status).name}"
            raise ProviderError(f"{how}: running {json.dumps(command)}:\n{''.join(everything)}".rstrip("\n"))
        return tuple("".join(collected[name]).removesuffix("\n") for name in ("stdout", "stderr"))  # type: ignore[return-value]

    def _lines(self, process: subprocess.Popen[bytes], deadline: float | None) -> Iterator[tuple[str, str]]:
        """Lines of both streams as they come, until both are at their end."""
        lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            threading.Thread(target=_pump, args=(name, stream, lines), daemon=True).start()
        open_streams = 2
        while open_streams:
            if self.cancelled.is_set():
                raise CancelledError("the command was interrupted")
            if deadline is not None and time.monotonic() > deadline:
                raise ProviderError("the command did not end within its customTimeouts and was killed")
            try:
                name, line = lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is None:
                open_streams -= 1
            else:
                yield name, line


def _pump(name: str, stream: IO[bytes], lines: queue.SimpleQueue[tuple[str, str | None]]) -> None:
    for line in stream:
        lines.put((name, line.decode(errors="replace")))
    lines.put((name, None))


def _feed(stream: IO[bytes], data: bytes) -> None:
    try:
        stream.write(data)
        stream.close()
    except BrokenPipeError:
        pass  # a command need not read its stdin


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the command and what it started: asked first, then forced."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_KILL_GRACE_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def _state(inputs: Properties, stdout: Value, stderr: Value) -> Properties:
    secret = any(has_secret(v) for k, v in inputs.items() if k in _FLOWS_INTO_OUTPUT)
    outputs = {"stdout": stdout, "stderr": stderr}
    return {**inputs, **{k: Secret(v) if secret else v for k, v in outputs.items()}}


def _failures(inputs: Properties) -> Iterator[Failure]:
    for name, value in inputs.items():
        if name not in _KNOWN:
            yield Failure(
                (name,), f"unknown property; {TYPE} takes {', '.join(sorted(_KNOWN - set(_NOT_SERVED)))}"
            )
        elif name in _NOT_SERVED:
            yield Failure(
                (name,), "not served by the stand-in for the plugin 'command'; the official plugin has it"
            )
        elif value is not UNKNOWN:
            yield from _wrong_type(name, value)


def _wrong_type(name: str, value: Value) -> Iterator[Failure]:
    expected = None
    if name in _STRINGS and not isinstance(value, str):
        expected = "a string"
    elif name == "environment" and not (isinstance(value, dict) and _all_strings(value.values())):
        expected = "a map of strings"
    elif name == "interpreter" and not (isinstance(value, list) and _all_strings(value)):
        expected = "a list of strings"
    elif name == "triggers" and not isinstance(value, list):
        expected = "a list"
    elif name == "logging" and value not in _LOGGING:
        expected = f"one of {', '.join(_LOGGING)}"
    elif name == "addPreviousOutputInEnv" and not isinstance(value, bool):
        expected = "a boolean"
    if expected:
        yield Failure((name,), f"expected {expected}, got {value!r}")


def _all_strings(values: object) -> bool:
    return all(v is UNKNOWN or isinstance(v, str) for v in values)  # type: ignore[attr-defined]
