"""localcloud's command line: `python -m localcloud COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from localcloud import faults, snapshots, sources
from localcloud.api import status_page
from localcloud.backends import confinement, routes
from localcloud.backends.ports import choose_port, owner
from localcloud.backends.processes import end, marked
from localcloud.backends.supervisor import Supervisor, python_program
from localcloud.environment import exports, variables, without_proxy
from localcloud.home import LOOPBACK, Config, Home, HomeError, is_free
from localcloud.logs import show as show_logs
from localcloud.specs import BackendError
from localcloud.store import Json, Record, Store

PROGRAM = "api"
_PRIORITY = 5  # before everything that asks it for tokens, and stopped after it
_HEALTHY_SECONDS = 30.0
_RESTORED_SECONDS = 180.0
_NOT_RUNNING = 3  # the exit status of `status`, as init scripts have it
_BOUND_TO_THE_PORT = ("artifactregistry.repositories", "compute.instances", "container.clusters")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="localcloud", description="Google Cloud on one machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("start", help="start it; returns when it answers and everything in it runs again")
    commands.add_parser("stop", help="end every process of it; what is stored stays")
    status = commands.add_parser("status", help="show what runs and what is stored")
    status.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("reset", help="stop it and delete everything that is stored")
    logs = commands.add_parser("logs", help="show what a part prints; without one, the names of all")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    logs.add_argument(
        "-n", "--lines", type=_count, default=50, metavar="N", help="how many to begin with (50)"
    )
    logs.add_argument("part", nargs="*", metavar="PART", help="as in `status`; the end of a name is enough")
    snapshot = commands.add_parser("snapshot", help="keep everything under a name; without one, list them")
    snapshot.add_argument("name", nargs="?", metavar="NAME")
    restore = commands.add_parser("restore", help="put everything back as it was in a snapshot")
    restore.add_argument("name", metavar="NAME")
    trust = commands.add_parser("trust", help="have VMs run this startup script unconfined, with your rights")
    trust.add_argument("script", type=Path, metavar="FILE")
    faults.add_parser(commands)
    environment = commands.add_parser("env", help="print the shell commands that point clients at it")
    environment.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("serve", help="run the API server in the foreground (used by the supervisor)")
    options = parser.parse_args(arguments)
    home = Home.locate()
    os.environ.update(without_proxy(home))
    run: dict[str, Callable[[], int]] = {
        "start": lambda: start(home),
        "stop": lambda: stop(home),
        "status": lambda: show_status(home, as_json=options.json),
        "reset": lambda: reset(home),
        "logs": lambda: show_logs(home, options.part, lines=options.lines, follow=options.follow),
        "snapshot": lambda: snapshot_everything(home, options.name) if options.name else list_snapshots(home),
        "restore": lambda: restore_everything(home, options.name),
        "trust": lambda: trust_script(home, options.script),
        "faults": lambda: faults.run(home, options),
        "env": lambda: show_environment(home, as_json=options.json),
        "serve": lambda: serve(home),
    }
    try:
        return run[options.command]()
    except (HomeError, BackendError) as error:
        sys.stderr.write(f"localcloud: {error}\n")
        return 1


def trust_script(home: Home, path: Path) -> int:
    """`trust`: what the file holds now, and nothing that is made of it later."""
    try:
        confinement.trust(home, path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise BackendError(f"cannot read the script {path}: {error}") from error
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def start(home: Home) -> int:
    """Start the supervisor and the server, once, however often it is called."""
    with home.lock("start"):
        config = home.config()
        supervisor = Supervisor(home)
        supervised = config is not None and supervisor.is_running()
        if config is not None and supervised and _is_stale(_health(home, config)):
            sys.stdout.write("localcloud is another one than the one that runs; it is started anew\n")
            supervised = False
        if not supervised:
            # A server that outlived its supervisor can keep nothing running, and a supervisor that outlived
            # its directory knows nothing.
            supervisor.stop()
        if config is None or not supervised or _health(home, config) is None:
            if not (supervised and supervisor.status(PROGRAM).live):
                config = _configured(home, config)
            supervisor.start()
            supervisor.add(python_program(home, PROGRAM, "localcloud", "serve", priority=_PRIORITY))
            supervisor.start_program(PROGRAM)
        config = home.require_config()
        _wait_until_restored(home, config)
    for record in _records(home, "compute.instances"):
        if record.body.get("statusMessage"):
            sys.stdout.write(f"{record.name} does not run: {record.body['statusMessage']}\n")
    sys.stdout.write(f"localcloud runs at {config.url} (state: {home.root})\n")
    return 0


def stop(home: Home) -> int:
    """End everything, and make sure of it."""
    config = home.config()
    if config is None:
        sys.stdout.write(f"nothing was started in {home.root}\n")
        return 0
    _end_everything(home, config)
    sys.stdout.write("localcloud is stopped\n")
    return 0


def _end_everything(home: Home, config: Config | None) -> None:
    with home.lock("start"):
        Supervisor(home).stop()
        routes.release_all(home)
        if config is not None and _health(home, config) is not None:
            raise BackendError(f"something still answers for {home.root} at {config.url}")


def reset(home: Home) -> int:
    """Stop, and delete the state directory."""
    if not home.root.exists():
        # It may have been deleted from under a localcloud that runs.
        if left := end(lambda: marked(f"{home.root}#")):
            raise BackendError(f"processes of {home.root} cannot be ended: {', '.join(map(str, left))}")
        routes.release_all(home)
        sys.stdout.write(f"there is nothing in {home.root}\n")
        return 0
    try:
        config = home.config()
    except HomeError:
        config = None  # a damaged one is a reason to come here
    if config is None and not _is_ours(home):
        raise HomeError(f"{home.root} does not look like localcloud's; delete it yourself if it is")
    _end_everything(home, config)
    try:
        shutil.rmtree(home.root)
    except OSError as error:
        raise HomeError(f"cannot delete {error.filename}: {error.strerror}") from error
    sys.stdout.write(f"{home.root} is deleted\n")
    return 0


def snapshot_everything(home: Home, name: str) -> int:
    """Keep a snapshot; what runs is stopped for it and started again."""
    home.require_config()
    running = Supervisor(home).is_running()
    if running:
        stop(home)
    try:
        kept = snapshots.save(home, name)
    finally:
        if running:
            start(home)
    sys.stdout.write(f"snapshot {kept.name}: {kept.path} ({kept.size / 2**20:.0f} MiB)\n")
    return 0


def list_snapshots(home: Home) -> int:
    """Print the names and the sizes of the snapshots."""
    rows = [[item.name, f"{item.size / 2**20:.0f} MiB", str(item.path)] for item in snapshots.listed(home)]
    if rows:
        _table(["SNAPSHOT", "SIZE", "FILE"], rows)
    else:
        sys.stdout.write(f"there is no snapshot in {snapshots.directory(home)}\n")
    return 0


def restore_everything(home: Home, name: str) -> int:
    """Put a snapshot in the place of what is there, and start it."""
    snapshots.require(home, name)
    running = Supervisor(home).is_running()
    if running:
        stop(home)
    try:
        snapshots.restore(home, name)
    except HomeError:
        if running:
            start(home)
        raise
    start(home)
    sys.stdout.write(f"snapshot {name} is restored\n")
    return 0


def _is_ours(home: Home) -> bool:
    """Whether a directory without a good configuration holds what only localcloud makes, or nothing."""
    made = (home.store_path, home.root / "supervisor" / "supervisord.conf")
    return any(path.exists() for path in made) or all(path.suffix == ".lock" for path in home.root.iterdir())


def serve(home: Home) -> int:
    """The API server itself; returns when it is told to stop."""
    # Only this command needs the web server, and the others answer quicker without it.
    import logging  # noqa: PLC0415

    import uvicorn  # noqa: PLC0415

    from localcloud.api.server import Api, application  # noqa: PLC0415
    from localcloud.backends.local import LocalBackends  # noqa: PLC0415

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = home.require_config()
    api = Api(home, LocalBackends(home))
    uvicorn.run(
        application(api),
        host=LOOPBACK,
        port=config.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    # Work in progress is taken up at the next start; waiting for it would outlast the supervisor's patience.
    logging.shutdown()
    os._exit(0)


def show_environment(home: Home, *, as_json: bool) -> int:
    """Print what a shell's `eval` takes, or the variables as JSON."""
    config = home.require_config()
    lines = exports(home, config)
    sys.stdout.write(json.dumps(variables(home, config)) if as_json else lines)
    return 0


def show_status(home: Home, *, as_json: bool) -> int:
    """Print the programs and the resources; the exit status says whether the server answers."""
    config = home.config()
    supervised = Supervisor(home).is_running()
    running = config is not None and supervised and _health(home, config) is not None
    programs: list[dict[str, str | int]] = [
        {"name": item.name, "state": item.state, "pid": item.pid}
        for item in (Supervisor(home).programs() if supervised else [])
    ]
    resources = [
        {"type": name, "name": record.name, "status": record.body.get("status", ""), "key": record.key}
        for kind, name in status_page.SHOWN.items()
        for record in _records(home, kind)
    ]
    report: Json = {
        "running": running,
        "url": config.url if config else "",
        "home": str(home.root),
        "page": status_page.url(config) if config else "",
        "programs": programs,
        "resources": resources,
    }
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        state = f"runs at {config.url}" if config and running else "does not run"
        sys.stdout.write(f"localcloud {state} (state: {home.root})\n")
        if config and running:
            sys.stdout.write(f"in a browser: {status_page.url(config)}\n")
        _table(
            ["PROGRAM", "STATE", "PID"],
            [[str(p["name"]), str(p["state"]), str(p["pid"] or "")] for p in programs],
        )
        _table(["RESOURCE", "NAME", "STATUS"], [[r["type"], r["name"], r["status"]] for r in resources])
    return 0 if running else _NOT_RUNNING


def _records(home: Home, kind: str) -> list[Record]:
    """The user's resources of a kind; what every project has from the first is left out."""
    if not home.store_path.exists():
        return []
    try:
        return [record for record in Store(home.store_path, read_only=True).list(kind) if not record.is_seed]
    except sqlite3.OperationalError:
        return []  # the server is making it just now
    except sqlite3.DatabaseError as error:
        raise HomeError(
            f"{home.store_path} is damaged ({error}); to give the state up: python -m localcloud reset"
        ) from error


def _table(head: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    sys.stdout.write("\n")
    for row in [head, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _configured(home: Home, config: Config | None) -> Config:
    """The configuration, with a port that can be used.

    Raises:
        HomeError: the remembered port is taken, and what is stored depends on it.
    """
    if config is None:
        config = Config(port=choose_port(), token=f"ya29.localcloud-{secrets.token_urlsafe(32)}")
        home.save(config)
    elif not is_free(config.port):
        if any(_records(home, kind) for kind in _BOUND_TO_THE_PORT):
            raise HomeError(
                f"port {config.port} is taken{owner(config.port)}, and the resources in {home.root} depend "
                "on it; end that program and start again, or give the state up: python -m localcloud reset"
            )
        taken = config.port
        config = replace(config, port=choose_port())
        home.save(config)
        sys.stdout.write(f"port {taken} is taken{owner(taken)}; localcloud uses {config.port} from now on\n")
    return config


def _health(home: Home, config: Config) -> Json | None:
    """What the server of this home says about itself; None if it does not answer, or another one does."""
    try:
        with urllib.request.urlopen(f"{config.url}/healthz", timeout=5) as reply:  # noqa: S310
            body: Json = json.loads(reply.read())
    except (OSError, ValueError, urllib.error.HTTPError):
        return None
    return body if body.get("home") == str(home.root) else None


def _is_stale(health: Json | None) -> bool:
    """Whether the server was started from other sources, or runs other tools, than are here now."""
    if health is None:
        return False
    started = health.get("build", {})
    return any(started.get(part) != now for part, now in sources.build().items())


def _wait_until_restored(home: Home, config: Config) -> None:
    """
    Raises:
        BackendError: the server does not come up, or what is in it does not come back, in time.
    """
    answered, end = False, time.monotonic() + _HEALTHY_SECONDS
    while time.monotonic() < end:
        health = _health(home, config)
        if health is not None and health["pending"] == 0:
            return
        if health is not None and not answered:
            answered, end = True, time.monotonic() + _RESTORED_SECONDS
        time.sleep(0.05)
    log = home.logs / f"{PROGRAM}.log"
    if answered:
        raise BackendError(
            f"some resources are still being started after {_RESTORED_SECONDS:.0f} s; see {log}"
        )
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else ""
    raise BackendError(f"the server does not answer at {config.url}; see {log}\n{tail}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
