"""The commands of scripts/: up, down, env, test, verify, bench, preview, drift, bundle, clean."""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# What is ignored from the start stays so: `nohup`, and a shell's background jobs.
ENDING = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) != signal.SIG_IGN
]
for number in ENDING:
    # Until there is something to clean up, an interrupt ends this without a word.
    signal.signal(number, signal.SIG_DFL)
if not Path(os.environ.get("HOME", "")).is_absolute():
    os.environ.pop("HOME", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.dont_write_bytecode = True
try:
    from scripts.lib import paths
except RuntimeError as unknown_home:
    sys.exit(f"error: {unknown_home}; set HOME")
# Compiled Python goes to the cache, so that a run leaves nothing in the checkout.
sys.pycache_prefix = str(paths.CACHE / "pycache")
sys.dont_write_bytecode = False

from scripts.lib import clean as cleaning  # noqa: E402
from scripts.lib import commands, environment, terminal  # noqa: E402
from scripts.lib.steps import StepError  # noqa: E402

PROGRAMS = ("verify", "bench", "preview", "drift", "bundle")
"""Commands that are programs of their own, with arguments of their own."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end a run the way an interrupt does: what was started is ended with it."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts")
    names = parser.add_subparsers(dest="command", required=True)
    up = names.add_parser("up", prog="./scripts/up", description=commands.up.__doc__)
    up.add_argument(
        "--plan", metavar="FILE", help="do what ./scripts/preview --save-plan FILE planned, or nothing"
    )
    up.add_argument(
        "--timings", action="store_true", help="say at the end where the time went, and the cache's sizes"
    )
    clean = names.add_parser("clean", prog="./scripts/clean", description=cleaning.clean.__doc__)
    clean.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    down = names.add_parser("down", prog="./scripts/down", description=commands.down.__doc__)
    down.add_argument(
        "--force", action="store_true", help="remove everything also where `pulumi destroy` fails"
    )
    env = names.add_parser("env", prog="./scripts/env", description=commands.env.__doc__)
    env.add_argument(
        "--google",
        action="store_true",
        help="for a stack on Google Cloud: the tools, and nothing of localcloud",
    )
    test = names.add_parser("test", prog="./scripts/test", description=commands.test.__doc__)
    test.add_argument(
        "only",
        nargs="*",
        choices=[*commands.SUITES, *commands.ON_REQUEST, []],
        help=f"suites to run; unless given all but {', '.join(commands.ON_REQUEST)}",
    )
    for name in PROGRAMS:
        names.add_parser(name, prog=f"./scripts/{name}", add_help=False)
    return parser


def main() -> int:
    """Runs one command and gives its exit status."""
    for number in ENDING:
        signal.signal(number, _terminate)
    terminal.set_up()
    given = environment.clean()
    # Go, rustup and others know no other way to find it.
    os.environ["HOME"] = str(Path.home())
    parser = _parser()
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command not in PROGRAMS:
        parser.error(f"{arguments.command} does not know {' '.join(rest)}")
    try:
        match arguments.command:
            case "up":
                commands.up(plan=arguments.plan, show_timings=arguments.timings)
            case "down":
                commands.down(force=arguments.force)
            case "env":
                commands.env(given, google=arguments.google)
            case "clean":
                cleaning.clean(dry_run=arguments.dry_run)
            case "test":
                commands.test(arguments.only or list(commands.SUITES))
            case name:
                return commands.bundle(rest) if name == "bundle" else commands.program(name, rest)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # The disk or the rights of a place that any step may meet.
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        print("\ninterrupted; run the same command again to carry on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
