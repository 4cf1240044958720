"""Runs a directory of preview 1 modules as pods: `python -m tests.conformance.wasi DIRECTORY [NAME…]`.

The layout is that of the public wasi-testsuite (WebAssembly/wasi-testsuite, doc/specification.md): each
`NAME.wasm` or `NAME.wat` is a test case, and `NAME.json` beside it says what it gets (`args`, `env`, `dirs`)
and what it has to do (`exit_code`, `stdout`, `stderr`). A localcloud and an agent of their own are started
for it, and nothing is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wasmtime

from components.providers import cargo
from tests.integration.agent.harness import (
    Agent,
    Cluster,
    Pod,
    Registry,
    Workspace,
    command,
    layout,
    literal,
    make_namespace,
)
from tests.integration.conftest import REPOSITORY, make_localcloud

# Pods at once: each waits for little but its own start.
BATCH = 16
# How long one test case may take, from its pod's creation on.
TIMEOUT = 120.0
CHECKED = ("exit_code", "stdout", "stderr")


class SuiteError(Exception):
    """The directory is no suite of test cases."""


@dataclass(frozen=True)
class Case:
    """A module, what it gets, and what it has to do; None: that is not checked."""

    name: str
    module: Path
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    dirs: tuple[str, ...] = ()
    exit_code: int = 0
    stdout: str | None = None
    stderr: str | None = None
    # What its specification asks for beyond that.
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """How a case went: "ok", "failed", or "skipped" where it asks for what this runner does not know."""

    case: Case
    outcome: str
    detail: str = ""


def read_suite(directory: Path) -> list[Case]:
    """Find the test cases below a directory, by name.

    Raises:
        SuiteError: there is none, or a specification cannot be read.
    """
    modules = sorted(path for kind in ("wasm", "wat") for path in directory.rglob(f"*.{kind}"))
    if not modules:
        raise SuiteError(f"{directory} holds no .wasm and no .wat file")
    return [_read_case(directory, module) for module in modules]


def _read_case(directory: Path, module: Path) -> Case:
    path = module.with_suffix(".json")
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text()).items()) if path.exists() else {}
        unknown = sorted(set(found) - {"args", "env", "dirs", *CHECKED})
        return Case(
            name=module.relative_to(directory).with_suffix("").as_posix(),
            module=module,
            args=tuple(str(argument) for argument in found.get("args", [])),
            env={str(name): str(value) for name, value in found.get("env", {}).items()},
            dirs=tuple(str(name) for name in found.get("dirs", [])),
            exit_code=int(found.get("exit_code", 0)),
            stdout=found.get("stdout"),
            stderr=found.get("stderr"),
            unknown=tuple(unknown),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SuiteError(f"{path}: {error}") from error


def run_suite(space: Workspace, cases: Sequence[Case]) -> Iterator[Result]:
    """Run the cases as pods on the space's node, some at once; give each one's result, in order."""
    scratch = Path(tempfile.mkdtemp(prefix="suite-", dir=space.agent.host_directory))
    try:
        for first in range(0, len(cases), BATCH):
            batch = cases[first : first + BATCH]
            started = [(case, _start(space, case, scratch)) for case in batch]
            for case, started_as in started:
                yield started_as if isinstance(started_as, Result) else _finish(case, started_as)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _start(space: Workspace, case: Case, scratch: Path) -> Pod | Result:
    if case.unknown:
        return Result(case, "skipped", f"its specification has {', '.join(case.unknown)}")
    try:
        content = _content(case.module)
        volumes = [_volume(case, name, scratch) for name in case.dirs]
    except (OSError, wasmtime.WasmtimeError) as error:
        return Result(case, "failed", f"{error}")
    name = space.unique("case")
    image = space.registry.push(f"suite/{name}", layout(content, system="wasip1"))
    mounts = [
        {"name": volume["name"], "mountPath": directory}
        for volume, directory in zip(volumes, case.dirs, strict=True)
    ]
    container = command(
        image,
        *map(_verbatim, case.args),
        env=[literal(key, _verbatim(value)) for key, value in case.env.items()],
        volumeMounts=mounts,
    )
    return space.pod(container, name=name, volumes=volumes, restart="Never")


def _content(module: Path) -> bytes:
    return bytes(wasmtime.wat2wasm(module.read_text())) if module.suffix == ".wat" else module.read_bytes()


def _verbatim(text: str) -> str:
    """Keep Kubernetes from expanding $(NAME)."""
    return text.replace("$", "$$")


def _volume(case: Case, name: str, scratch: Path) -> dict[str, Any]:
    """A copy of a directory of the suite, which the case may change."""
    own = Path(tempfile.mkdtemp(dir=scratch))
    copy = shutil.copytree(case.module.parent / name, own / "content", symlinks=True)
    return {"name": own.name.replace("_", "-").lower(), "hostPath": {"path": str(copy), "type": "Directory"}}


def _finish(case: Case, pod: Pod) -> Result:
    try:
        ended = pod.wait_terminated(timeout=TIMEOUT)
    except AssertionError as error:
        return Result(case, "failed", str(error).partition("\n")[0])
    printed = _printed(pod)
    pod.delete(grace=0)
    wrong = []
    if ended.exit_code != case.exit_code:
        wrong.append(f"exit code {ended.exit_code}, expected {case.exit_code}")
    for stream, expected in (("stdout", case.stdout), ("stderr", case.stderr)):
        if expected is not None and printed[stream] != expected:
            wrong.append(f"{stream} {_short(printed[stream])}, expected {_short(expected)}")
    if wrong and case.stderr is None and printed["stderr"]:
        wrong.append(f"stderr {_short(printed['stderr'])}")
    return Result(case, "failed" if wrong else "ok", "; ".join(wrong))


def _printed(pod: Pod) -> dict[str, str]:
    """What the container wrote to each stream: kubectl shows both as one, its log file keeps them apart."""
    directory = pod.space.agent.data_dir / "logs" / f"{pod.namespace}_{pod.name}_{pod.uid}" / "main"
    return read_log((directory / "0.log").read_text())


def read_log(text: str) -> dict[str, str]:
    """Take a log apart: lines of `TIME STREAM TAG TEXT`, where the tag P marks a part of a line."""
    printed = {"stdout": "", "stderr": ""}
    for line in text.split("\n")[:-1]:
        _, stream, tag, content = line.split(" ", 3)
        printed[stream] += content + ("" if tag == "P" else "\n")
    return printed


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 120 else f"{shown[:120]}…"


def table(results: Sequence[Result]) -> str:
    """Lay the results out for a terminal, and count them."""
    width = max((len(result.case.name) for result in results), default=0)
    lines = [
        f"{result.case.name:{width}}  {result.outcome:7}  {result.detail}".rstrip() for result in results
    ]
    counts = {
        outcome: sum(result.outcome == outcome for result in results)
        for outcome in ("ok", "failed", "skipped")
    }
    lines.append(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return "\n".join(lines)


@contextlib.contextmanager
def own_node() -> Iterator[Workspace]:
    """A control plane, a registry and an agent for one run, all of them gone afterwards."""
    binary = Path(os.environ.get("KRUSTLET_BINARY") or cargo.build(REPOSITORY / "krustlet").path)
    with tempfile.TemporaryDirectory(prefix="conformance-") as root, contextlib.ExitStack() as stack:
        cloud = make_localcloud(Path(root))
        stack.callback(cloud.command, "reset")
        cloud.command("start")
        registry = Registry(cloud, "suite")
        cluster = Cluster(cloud, "suite")
        stack.callback(cluster.close)
        agent = Agent(cluster, binary, Path(root) / "agent", registry.key.public_key, "suite", registry.host)
        stack.callback(agent.remove)
        agent.start()
        space = Workspace(cluster, registry, agent, make_namespace(cluster, registry))
        stack.callback(space.close)
        yield space


def main() -> int:
    """Run a suite; 0 when no case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.wasi", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the .wasm and .json files are, at any depth")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="run only the cases whose names have this part"
    )
    arguments = parser.parse_args()
    try:
        cases = read_suite(arguments.directory)
    except SuiteError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if arguments.names:
        cases = [case for case in cases if any(name in case.name for name in arguments.names)]
    results = []
    with own_node() as space:
        for result in run_suite(space, cases):
            results.append(result)
            sys.stderr.write("." if result.outcome == "ok" else result.outcome[0].upper())
            sys.stderr.flush()
    sys.stdout.write(f"\n{table(results)}\n")
    return 1 if any(result.outcome == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
