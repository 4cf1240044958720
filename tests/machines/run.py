"""The matrix of odd machines: `up`, `verify` and `down` of a fresh clone in each, on warm caches.

    python tests/machines/run.py            every row, a minute or two each
    python tests/machines/run.py proxy …    these

It is no part of ./scripts/test: what needs no stack is shown by tests/unit/scripts/test_machines.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = "./scripts/up && ./scripts/verify && ./scripts/down"


def _clone(checkout: Path, *options: str) -> None:
    subprocess.run(["git", *options, "clone", "--quiet", REPOSITORY, checkout], check=True)


def _archive(checkout: Path) -> None:
    checkout.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x"], cwd=checkout, input=archive.stdout, check=True)


def _worktree(checkout: Path) -> None:
    main = checkout.with_name("main")
    _clone(main)
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", checkout], cwd=main, check=True)


def _submodule(checkout: Path) -> None:
    parent = checkout.parent
    subprocess.run(["git", "init", "--quiet"], cwd=parent, check=True)
    add: list[str | Path] = [
        "git",
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        REPOSITORY,
        checkout.name,
    ]
    subprocess.run(add, cwd=parent, check=True)


def _locked(checkout: Path) -> None:
    _clone(checkout)
    (checkout / ".git" / "config.lock").touch()


def _below_other_projects(checkout: Path) -> None:
    (checkout.parent / "go.work").write_text("go 1.99\n")
    (checkout.parent / "pyproject.toml").write_text("not TOML\n")
    _clone(checkout)


@dataclass(frozen=True)
class Machine:
    """One row: how the checkout is made and called, and what the user has around it."""

    checkout: str = "awesome-wasm"
    variables: dict[str, str] = field(default_factory=dict)
    make: Callable[[Path], None] = _clone
    prefix: tuple[str, ...] = ()
    commands: str = COMMANDS


PROXY = "http://127.0.0.1:9"  # nobody listens there
MACHINES = {
    "space": Machine("a b"),
    "characters": Machine("a:b#c%41?d=e'f\"g$HOME`h`&;*[i]"),
    "unicode": Machine("höhe-漢字-🦀"),
    "control": Machine("new\nline\ttab"),
    "autocrlf": Machine(make=lambda checkout: _clone(checkout, "-c", "core.autocrlf=true")),
    "python": Machine(
        variables={
            "PYTHONPATH": "/nonexistent",
            "PYTHONHOME": "/nonexistent",
            "PYTHONSTARTUP": "/nonexistent",
            "PYTHONSAFEPATH": "1",
            "PYTHONWARNINGS": "error",
            "VIRTUAL_ENV": "/nonexistent",
        }
    ),
    "pulumi": Machine(
        variables={
            "PULUMI_ACCESS_TOKEN": "theirs",
            "PULUMI_BACKEND_URL": "https://theirs.example",
            "PULUMI_CONFIG_PASSPHRASE": "theirs",
            "PULUMI_STACK": "theirs",
            "PULUMI_IGNORE_AMBIENT_PLUGINS": "true",
            "PULUMI_PYTHON_CMD": "/nonexistent",
        }
    ),
    "google": Machine(
        variables={
            "GOOGLE_CREDENTIALS": "{",
            "GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent",
            "GOOGLE_PROJECT": "theirs",
            "CLOUDSDK_CORE_PROJECT": "theirs",
            "KUBECONFIG": "/nonexistent",
        }
    ),
    "go": Machine(
        variables={"GOFLAGS": "-mod=vendor", "GOOS": "plan9", "GOARCH": "386", "GOPATH": "relative"},
        make=_below_other_projects,
    ),
    "proxy": Machine(
        variables={
            **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), PROXY),
            "ALL_PROXY": "socks5://127.0.0.1:9",
            "NO_PROXY": "theirs.example",
            "no_grpc_proxy": "theirs.example",
        }
    ),
    "ascii": Machine(variables={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
    "latin-1": Machine("höhe", variables={"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}),
    "no-home": Machine(prefix=("env", "-u", "HOME")),
    "umask": Machine(commands=f"umask 077; {COMMANDS}"),
    "tmpdir": Machine(
        commands=f'export TMPDIR="$PWD/../{"t" * 120} {"u" * 60}"; mkdir "$TMPDIR"; {COMMANDS}'
    ),
    "worktree": Machine(make=_worktree),
    "submodule": Machine(make=_submodule),
    "archive": Machine(make=_archive),
    "locked": Machine(make=_locked),
    # Needs the right to make a network namespace.
    "no-route": Machine(prefix=("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")),
    # The sources of the localcloud that runs are no longer those that are there.
    "pulled": Machine(commands="./scripts/up && echo '#' >>localcloud/home.py && " + COMMANDS),
}
# What does not exclude each other, in the time of one row.
MACHINES["together"] = Machine(
    f"{MACHINES['characters'].checkout} {MACHINES['control'].checkout}",
    {
        name: value
        for row in ("python", "pulumi", "google", "proxy", "ascii")
        for name, value in MACHINES[row].variables.items()
    },
    commands=MACHINES["umask"].commands,
)


def run(name: str, root: Path) -> str:
    """Runs one row and gives what is wrong; empty if nothing is."""
    machine = MACHINES[name]
    checkout = root / name / machine.checkout
    checkout.parent.mkdir()
    machine.make(checkout)
    command = [*machine.prefix, "sh", "-c", f'cd "$0"; {machine.commands}', str(checkout)]
    done = subprocess.run(
        command,
        env={**os.environ, **machine.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    said = done.stdout.decode(errors="replace")
    left = [path.name for path in (checkout / ".localcloud", checkout / ".stacks") if path.exists()]
    wrong = [f"exit status {done.returncode}"] if done.returncode else []
    wrong += ["a traceback"] if "Traceback" in said else []
    wrong += [f"{', '.join(left)} left behind"] if left else []
    if wrong:
        subprocess.run([checkout / "scripts" / "down", "--force"], capture_output=True, check=False)
        return f"{'; '.join(wrong)}\n{said}"
    return ""


def main() -> int:
    """Runs the rows that are named; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*MACHINES, []], help="unless given, all")
    failed = 0
    # Where the run's files lie the disk must not be full: TMPDIR says where that is.
    root = Path(tempfile.mkdtemp(prefix="machines-"))
    for name in parser.parse_args().rows or MACHINES:
        wrong = run(name, root)
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '}  {name}  {wrong}", flush=True)  # noqa: T201
    shutil.rmtree(root, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
