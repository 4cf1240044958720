"""What the supervisor runs for each program: record the process, wait if this is a restart, become the
program.

supervisord's own configuration language expands, splits and unquotes; a program's argument list and
environment are therefore kept as JSON (programs/NAME.json, written by supervisor.py) and never pass through
it. The record (run/NAME.json) is how the next start finds a process that a killed supervisor left behind.

Imports little: it runs before everything else does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from localcloud.backends.processes import MARK, start_time

CANNOT_EXECUTE = 203  # systemd's EXIT_EXEC
# Between two tries of a program that this cannot even read.
_DAMAGED_SECONDS = 5.0


def main() -> int:
    directory, name = Path(os.environ["LOCALCLOUD_SUPERVISOR"]), sys.argv[1]
    definition = directory / "programs" / f"{name}.json"
    try:
        program = json.loads(definition.read_text())
    except (OSError, ValueError) as error:
        print(f"cannot read {definition}: {error}", file=sys.stderr)  # noqa: T201
        time.sleep(_DAMAGED_SECONDS)
        return CANNOT_EXECUTE
    run = directory / "run"
    if (run / f"{name}.json").exists():
        _record(run, name, waiting=True)
        time.sleep(program["restart_delay"])
    if not _record(run, name, waiting=False):
        # The next start would not know that it is a restart, and crash without a pause.
        time.sleep(program["restart_delay"])

    environment = {
        key: os.environ[key] for key in ("PATH", "HOME", "USER", "LANG", "TMPDIR") if key in os.environ
    }
    environment |= program["environment"]
    environment[MARK] = program["mark"]
    os.umask(program["umask"])
    try:
        os.chdir(program["directory"])
        os.execvpe(program["command"][0], program["command"], environment)  # noqa: S606
    except OSError as error:
        print(f"cannot run {error.filename}: {error.strerror}", file=sys.stderr)  # noqa: T201
    return CANNOT_EXECUTE


def _record(run: Path, name: str, *, waiting: bool) -> bool:
    """Atomic, so that a kill in the middle leaves the earlier record. False where the disk is full."""
    temporary = run / f".{name}.{os.getpid()}"
    content = json.dumps({"pid": os.getpid(), "started": start_time(os.getpid()), "waiting": waiting})
    try:
        temporary.write_text(content)
        temporary.replace(run / f"{name}.json")
    except OSError as error:
        print(f"cannot write {run / name}.json: {error.strerror}", file=sys.stderr)  # noqa: T201
        temporary.unlink(missing_ok=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
