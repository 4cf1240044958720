"""What each of the commands does, step by step."""

import argparse
import contextlib
import functools
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from scripts.lib import environment, paths, prerequisites, pulumi, rust, toolchain, venv
from scripts.lib.steps import Log, StepError, lock, step

CRATES = ("krustlet", "wasm_app")


def _set_up(*, tests: bool) -> None:
    """Everything that ./scripts/up and ./scripts/test need before localcloud starts."""
    prerequisites.check_places()
    prerequisites.check()
    toolchain.ensure(tests=tests)
    venv.ensure()
    rust.ensure_wasm_target()


def _python(log: Log, *, env: Mapping[str, str], arguments: list[str]) -> None:
    log.run([environment.python(), *arguments], env=env)


def _compile() -> None:
    """Compiles both crates into the cache that `pulumi up` looks in, so that the long wait has a name."""
    env = environment.before_localcloud()
    for crate in CRATES:
        arguments = ["-m", "components.providers.cargo", crate]
        if crate == "wasm_app":
            arguments += ["--target", rust.TARGET]
        step(f"compile {crate}", functools.partial(_python, env=env, arguments=arguments))


def _is_cloud_lost() -> bool:
    """Whether what localcloud knew is gone: then nothing of the stack exists any more."""
    return not (paths.LOCALCLOUD_HOME / "config.json").exists()


def _run_lock() -> AbstractContextManager[None]:
    """One command at a time makes or removes this clone's run."""
    return lock(
        paths.LOGS / "up.lock",
        "another ./scripts/up or ./scripts/down is at work in this clone; waiting for it",
    )


def up(*, plan: str | None = None) -> None:
    """From a bare clone to an answered curl: tools, localcloud, pulumi up, verification."""
    if plan is not None and not Path(plan).is_file():
        raise StepError(f"there is no plan {plan}; ./scripts/preview --save-plan {plan} makes it")
    prerequisites.warn_of_disk()
    _set_up(tests=False)
    _compile()
    with _run_lock():
        if pulumi.is_known() and _is_cloud_lost():
            print(f"{paths.LOCALCLOUD_HOME} is gone, and with it all of the stack; it is made anew")
            pulumi.remove_files()
        start = environment.before_localcloud()
        step(
            "start localcloud", functools.partial(_python, env=start, arguments=["-m", "localcloud", "start"])
        )
        env = environment.complete()
        step("pulumi up", lambda log: pulumi.up(log, env, plan))
        outputs = pulumi.outputs(env)
        pulumi.write_kubeconfig(outputs, environment.KUBECONFIG)
    # What was killed a moment ago is on its way back.
    verified = program("verify", ["--wait", "60"])
    if verified != 0:
        raise StepError("the stack is up, but scripts/verify found a fault; see the table above")
    url = outputs["url"]
    print(f'\nUp. Try:\n  curl {url}/primorial/30\n  eval "$(./scripts/env)"   # pulumi, kubectl by hand')


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
            _set_up(tests=False)
    print(environment.exports(environment.for_google() if google else environment.complete(), given))


def _stack(arguments: list[str]) -> str:
    """The stack that a program is asked for: any but ours is on Google."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stack", default=environment.STACK)
    return str(parser.parse_known_args(arguments)[0].stack)


def program(name: str, arguments: list[str]) -> int:
    """Runs a program of scripts/lib in the environment of the stack; gives its exit status."""
    asks_for_help = {"-h", "--help"} & set(arguments)
    if asks_for_help:
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


CARGO = ("cargo", "--quiet")
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


ON_REQUEST: dict[str, list[Suite]] = {
    "official": [Suite(("python", "-m", "scripts.lib.official"))],
}
"""Suites that need what not every machine has: they run when they are named, and fail where it is missing."""


def test(names: list[str]) -> None:
    """Sets up as ./scripts/up does and runs every test, quickest first; ends at the first that fails."""
    _set_up(tests=True)
    _compile()
    env = environment.before_localcloud(tests=True)
    for name in names:
        for suite in (SUITES | ON_REQUEST)[name]:
            print(f"\n── {name}: {' '.join(suite.command)}", flush=True)
            result = subprocess.run(suite.command, cwd=suite.directory, env=env, check=False)
            if result.returncode != 0:
                raise StepError(f"{name}: {' '.join(suite.command)} exited with {result.returncode}")
    print("\nall green")
