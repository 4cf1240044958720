"""What each of the commands does, step by step."""

import argparse
import contextlib
import functools
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from scripts.lib import (
    clean,
    environment,
    paths,
    prerequisites,
    pulumi,
    rust,
    steps,
    timings,
    toolchain,
    venv,
)
from scripts.lib.steps import Log, RefusalError, StepError, lock, log_path, plan_steps, step

AGENT = "krustlet"
CRATES = (AGENT, "wasm_app")
CARGO = "components.providers.cargo"
BUNDLE, BUNDLE_KEY = "AWESOME_WASM_BUNDLE", "AWESOME_WASM_BUNDLE_KEY"


def _build(*, tests: bool, own: bool = False, then: Sequence[str]) -> None:
    """Everything that ./scripts/up and ./scripts/test need before localcloud starts, both crates too."""
    with contextlib.ExitStack() as beside:
        _set_up(tests=tests, own=own, then=then, beside=beside)
        _compile()


def _set_up(
    *,
    tests: bool,
    own: bool = False,
    then: Sequence[str] = (),
    beside: contextlib.ExitStack | None = None,
) -> None:
    """The tools.

    With `own` all are built, also what the user has; `then` are the steps that follow. The agent is compiled
    `beside` them, where that is given and the machine has the room: the linkers of both use one core.
    """
    with timings.timed("look for what is needed"):
        prerequisites.check()
        absent = toolchain.missing(tests=tests, own=own)
        prerequisites.check_disk(tools=bool(absent), environment=not venv.is_complete())
    bundle = os.environ.get(BUNDLE, "")
    first = [
        *([] if venv.is_complete() else ["virtual environment"]),
        *(["take the bundle"] if bundle else []),
    ]
    plan_steps([*first, *(f"build {name}" for name in absent), *then])
    venv.ensure()
    if bundle:
        step("take the bundle", functools.partial(_take, bundle))
        absent = toolchain.missing(tests=tests, own=own)
        plan_steps([*first, *(f"build {name}" for name in absent), *then])
    if absent and beside is not None and prerequisites.has_room_for_two():
        print("    the agent is compiled meanwhile")
        command = [environment.python(), "-m", CARGO, AGENT]
        beside.enter_context(steps.beside(f"begin to compile {AGENT}", command, environment.before_tools()))
    with timings.timed("look into the cache"):
        toolchain.ensure(tests=tests, own=own)
        rust.ensure_wasm_target()
        clean.note()


def _take(source: str, log: Log) -> None:
    """Puts what a bundle has of what is missing into the cache."""
    named = {BUNDLE: source, BUNDLE_KEY: os.environ.get(BUNDLE_KEY, "")}
    for name, value in named.items():
        if value and "://" not in value and not value.startswith("-----BEGIN"):
            named[name] = str(Path(value).absolute())
    env = {
        **os.environ,
        **named,
        "PYTHONPATH": str(paths.REPOSITORY),
        "PYTHONPYCACHEPREFIX": str(paths.CACHE / "pycache"),
        "CARGO_TARGET_DIR": str(rust.target_directory()),
    }
    arguments = ["-m", "scripts.lib.bundle", "--take", named[BUNDLE]]
    try:
        _python(log, env=env, arguments=arguments)
    except StepError as error:
        raise RefusalError(f"{BUNDLE}: {log.last_line()}") from error
    for line in log.lines()[1:]:
        print(f"    {line}")


def _python(log: Log, *, env: Mapping[str, str], arguments: list[str]) -> None:
    log.run([environment.python(), *arguments], env=env)


def _compiled(log: Log, *, env: Mapping[str, str], arguments: list[str]) -> Path:
    _python(log, env=env, arguments=["-m", CARGO, *arguments])
    return Path(log.last_line())


def _compile() -> None:
    """Compiles both crates into the cache that `pulumi up` looks in, so that the long wait has a name."""
    env = environment.before_localcloud()
    built = []
    for crate in CRATES:
        arguments = [crate, *(["--target", rust.TARGET] if crate == "wasm_app" else [])]
        built.append(step(f"compile {crate}", functools.partial(_compiled, env=env, arguments=arguments)))
    clean.note(built)


def _is_cloud_lost() -> bool:
    """Whether what localcloud knew is gone: then nothing of the stack exists any more."""
    return not (paths.LOCALCLOUD_HOME / "config.json").exists()


def _run_lock() -> AbstractContextManager[None]:
    """One command at a time makes or removes this clone's run."""
    return lock(
        paths.LOGS / "up.lock",
        "another ./scripts/up or ./scripts/down is at work in this clone; waiting for it",
    )


UP = (*(f"compile {crate}" for crate in CRATES), "start localcloud", "pulumi up")
"""The steps of ./scripts/up once everything is there."""


def up(*, plan: str | None = None, show_timings: bool = False) -> None:
    """From a bare clone to an answered curl: tools, localcloud, pulumi up, verification."""
    if plan is not None and not Path(plan).is_file():
        raise StepError(f"there is no plan {plan}; ./scripts/preview --save-plan {plan} makes it")
    prerequisites.check_places()
    prerequisites.warn_of_disk()
    try:
        with clean.in_use(), timings.timed("everything else"):
            _up(plan)
    finally:
        if show_timings:
            log = log_path("pulumi up")
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            print(f"\n{timings.table({'pulumi up': timings.resources(text)})}")


def _up(plan: str | None) -> None:
    _build(tests=False, then=UP)
    with _run_lock():
        if pulumi.is_known() and _is_cloud_lost():
            print(f"{paths.LOCALCLOUD_HOME} is gone, and with it all of the stack; it is made anew")
            pulumi.remove_files()
        start = environment.before_localcloud()
        step(
            "start localcloud", functools.partial(_python, env=start, arguments=["-m", "localcloud", "start"])
        )
        with timings.timed("ask for the environment"):
            env = environment.complete()
        step("pulumi up", lambda log: pulumi.up(log, env, plan))
        with timings.timed("ask for the outputs"):
            outputs = pulumi.outputs(env)
        pulumi.write_kubeconfig(outputs, environment.KUBECONFIG)
    with timings.timed("verify"):
        # What was killed a moment ago is on its way back.
        verified = program("verify", ["--wait", "60"], env)
    if verified != 0:
        raise StepError("the stack is up, but scripts/verify found a fault; see the table above")
    print("\nUp. Try:", *_how_to_ask(str(outputs["url"])), sep="\n  ")


def _how_to_ask(url: str) -> tuple[str, ...]:
    """Give how the app is asked: at the node's address, or a Service from a port of this machine's."""
    environment = 'eval "$(./scripts/env)"   # pulumi, kubectl by hand'
    parts = urlsplit(url)
    name, _, rest = (parts.hostname or "").partition(".")
    namespace, _, domain = rest.partition(".")
    if domain != "svc":
        return f"curl {url}/primorial/30", environment
    forward = f"kubectl port-forward --namespace {namespace} service/{name} :{parts.port}"
    return environment, f"{forward}   # and curl http://127.0.0.1:PORT/primorial/30, the port that it says"


def bundle(arguments: list[str]) -> int:
    """Builds what is missing, and makes a bundle of all that is built; gives the exit status."""
    prerequisites.check_places()
    with clean.in_use():
        venv.ensure()
        env = {**os.environ, "PYTHONPATH": str(paths.REPOSITORY)}
        command = [environment.python(), "-m", "scripts.lib.bundle", *arguments]
        asked = subprocess.run([*command, "--check"], env=env, check=False).returncode
        if {"-h", "--help"} & set(arguments) or asked != 0:
            return asked
        _build(tests="--tests" in arguments, own=True, then=UP[: len(CRATES)])
        return subprocess.run(command, env={**environment.before_localcloud()}, check=False).returncode


def _remove_run() -> None:
    for path in (paths.LOCALCLOUD_HOME, paths.LOGS):
        shutil.rmtree(path, ignore_errors=True)
    others = pulumi.remove_files()
    if others:
        print(f"kept: {paths.STACKS}, which has the state of {', '.join(sorted(others))} too")


def down(*, force: bool) -> None:
    """Destroys the stack, then stops localcloud and removes every file of the run; caches stay.

    With `force` whatever is there goes, also from under a command that is at work on it.
    """
    with contextlib.nullcontext() if force else _run_lock():
        _down(force=force)


def _down(*, force: bool) -> None:
    nothing = not pulumi.is_known() and not paths.LOCALCLOUD_HOME.exists()
    pulumi.end_orphans()
    start = environment.before_localcloud()
    try:
        if pulumi.is_known() and not _is_cloud_lost():
            step(
                "start localcloud",
                functools.partial(_python, env=start, arguments=["-m", "localcloud", "start"]),
            )
            env = environment.complete()
            step("pulumi destroy", lambda log: pulumi.destroy(log, env))
    except StepError as error:
        if not force:
            raise StepError(f"{error}\n  to remove it all the same: ./scripts/down --force") from error
    step("stop localcloud", functools.partial(_python, env=start, arguments=["-m", "localcloud", "reset"]))
    _remove_run()
    if nothing:
        print("nothing was up")


def env(given: Mapping[str, str], *, google: bool) -> None:
    """Prints the environment for working by hand; what it lacks after a pull is built first."""
    if google or paths.LOCALCLOUD_HOME.exists():
        # Standard output is for the shell's eval, and the steps are for people.
        with contextlib.redirect_stdout(sys.stderr):
            prerequisites.check_places()
            with clean.in_use():
                _set_up(tests=False)
    print(environment.exports(environment.for_google() if google else environment.complete(), given))


def _stack(arguments: list[str]) -> str:
    """The stack that a program is asked for: any but ours is on Google."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stack", default=environment.STACK)
    return str(parser.parse_known_args(arguments)[0].stack)


def program(name: str, arguments: list[str], env: Mapping[str, str] | None = None) -> int:
    """Runs a program of scripts/lib in the environment of the stack, or in `env`; gives its exit status."""
    asks_for_help = {"-h", "--help"} & set(arguments)
    if env is not None:
        pass
    elif asks_for_help:
        env = environment.before_localcloud()
    elif _stack(arguments) == environment.STACK:
        env = environment.complete()
    else:
        env = environment.for_google()
    return subprocess.run(
        [environment.python(), "-m", f"scripts.lib.{name}", *arguments],
        # A terminal that lacks a character shows another one.
        env={**env, "PYTHONIOENCODING": f"{sys.stdout.encoding}:replace"},
        check=False,
    ).returncode


@dataclass(frozen=True)
class Suite:
    """Tests that run together: a program, and the directory that it runs in."""

    command: tuple[str, ...]
    directory: Path = paths.REPOSITORY


def _pytest(directory: str) -> Suite:
    return Suite(("python", "-m", "pytest", "-q", directory))


SUITES: dict[str, list[Suite]] = {
    "lint": [
        Suite(("ruff", "check", ".")),
        Suite(("ruff", "format", "--check", ".")),
        Suite(
            (
                "python",
                "-m",
                "mypy",
                "__main__.py",
                "components",
                "localcloud",
                "policy/rules.py",
                "scripts/lib",
                "tests",
            )
        ),
    ],
    # Google's clients and pulumi have messages of the same names, which one process cannot hold.
    "unit": [_pytest("tests/unit"), _pytest("tests/google_clients")],
    "app": [
        Suite(("cargo", "fmt", "--check"), paths.REPOSITORY / "wasm_app"),
        Suite(("cargo", "fmt", "--check"), paths.REPOSITORY / "tests" / "guests"),
        Suite(("cargo", "fmt", "--check"), paths.REPOSITORY / "bench" / "native"),
        Suite(
            ("cargo", "clippy", "--locked", "--release", "--all-targets", "--", "-D", "warnings"),
            paths.REPOSITORY / "wasm_app",
        ),
        Suite(("cargo", "test", "--locked", "--release"), paths.REPOSITORY / "wasm_app"),
    ],
    "agent": [
        Suite(("cargo", "fmt", "--all", "--check"), paths.REPOSITORY / "krustlet"),
        Suite(
            ("cargo", "clippy", "--locked", "--release", "--workspace", "--all-targets"),
            paths.REPOSITORY / "krustlet",
        ),
        Suite(("cargo", "test", "--locked", "--release", "--workspace"), paths.REPOSITORY / "krustlet"),
    ],
    "integration": [_pytest("tests/integration")],
    "e2e": [_pytest("tests/e2e")],
}


LANES = (("lint", "unit", "integration"), ("app", "agent", "e2e"))
"""What runs one after the other, beside the other lane: tests wait for most of their time."""

ON_REQUEST: dict[str, list[Suite]] = {
    "official": [Suite(("python", "-m", "scripts.lib.official"))],
}
"""Suites that need what not every machine has: they run when they are named, and fail where it is missing."""


def test(names: list[str]) -> None:
    """Sets up as ./scripts/up does and runs every test, in two lanes; ends at the first suite that fails."""
    prerequisites.check_places()
    with clean.in_use():
        _test(names)


def _test(names: list[str]) -> None:
    _build(tests=True, then=UP[: len(CRATES)])
    env = environment.before_localcloud(tests=True)
    lanes = [[(name, suite) for name in lane if name in names for suite in SUITES[name]] for lane in LANES]
    if all(lanes):
        _in_lanes(lanes, env)
        names = [name for name in names if name in ON_REQUEST]
    for name in names:
        for suite in (SUITES | ON_REQUEST)[name]:
            print(f"\n── {name}: {' '.join(suite.command)}", flush=True)
            ended = subprocess.run(suite.command, cwd=suite.directory, env=env, check=False)
            _judge(name, suite, ended.returncode)
    print("\nall green")


def _judge(name: str, suite: Suite, status: int) -> None:
    if status != 0:
        raise StepError(f"{name}: {' '.join(suite.command)} exited with {status}")


def _in_lanes(lanes: Sequence[Sequence[tuple[str, Suite]]], env: Mapping[str, str]) -> None:
    """Runs the suites of each lane one after the other. What one prints is shown whole when it has ended."""
    waiting = [deque(lane) for lane in lanes]
    running: dict[int, tuple[str, Suite, Log, subprocess.Popen[bytes]]] = {}
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def start(lane: int) -> None:
        name, suite = waiting[lane].popleft()
        log = Log(log_path(f"test {name}"))
        print(f"── {name} begins; what it prints is in {log.path} until it ends", flush=True)
        process = log.start(suite.command, cwd=suite.directory, env=env)
        running[lane] = name, suite, log, process

        def wait() -> None:
            process.wait()
            ended.put(lane)

        threading.Thread(target=wait, daemon=True).start()

    try:
        for lane in range(len(lanes)):
            start(lane)
        while running:
            lane = ended.get()
            name, suite, log, process = running.pop(lane)
            print("", f"── {name}:", *log.lines(), sep="\n", flush=True)
            _judge(name, suite, process.returncode)
            if waiting[lane]:
                start(lane)
    finally:
        for _, _, log, process in running.values():
            log.end(process)
