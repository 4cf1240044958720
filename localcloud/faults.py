"""The command `python -m localcloud faults`: what is to go wrong. What there is: localcloud/api/faults.py."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request

from localcloud.home import Home, HomeError
from localcloud.store import Json

KINDS = (
    *("latency", "error", "lost-answer", "failed-operation"),
    *("no-boot", "read-only-registry", "no-control-plane"),
)
_SETTINGS: dict[str, tuple[type, str]] = {
    "method": (str, "of which requests: a method's id, like compute.instances.insert; * stands for any part"),
    "target": (str, "of which instance, repository or cluster, by its name; * stands for any part"),
    "status": (int, "of an error: the answer's status (503)"),
    "retry-after": (int, "of an error: seconds in its Retry-After (1)"),
    "seconds": (float, "how long a latency or the absence of a control plane is (1; until it is cleared)"),
    "times": (int, "how many events are hit; 0 for all (1)"),
    "after": (int, "how many events pass before (0)"),
    "probability": (float, "of each event to be hit (1.0)"),
    "seed": (int, "what chance is drawn from: the same seed is the same run (0)"),
    "name": (str, "what it is called (f1, f2, …)"),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to localcloud's."""
    parser = commands.add_parser("faults", help="make things go wrong, on demand and again in the same way")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make one; prints it")
    add.add_argument("kind", choices=KINDS)
    for name, (kind, text) in _SETTINGS.items():
        add.add_argument(f"--{name}", type=kind, help=text, default=None)
    show = actions.add_parser(
        "list", help="show them, and what each has hit: the number of the event, and what"
    )
    show.add_argument("--json", action="store_true", help="for machines")
    clear = actions.add_parser("clear", help="end one, or all of them")
    clear.add_argument("name", nargs="?", default="")


def run(home: Home, options: argparse.Namespace) -> int:
    """Do what the command says; returns its exit status."""
    if options.action == "add":
        given: Json = {"kind": options.kind}
        for name in _SETTINGS:
            value = getattr(options, name.replace("-", "_"))
            if value is not None:
                given["retryAfter" if name == "retry-after" else name] = value
        sys.stdout.write(json.dumps(_request(home, "POST", "", given), indent=2) + "\n")
    elif options.action == "clear":
        gone = _request(home, "DELETE", f"/{options.name}" if options.name else "")["cleared"]
        sys.stdout.write(f"cleared: {', '.join(gone) or 'nothing'}\n")
    else:
        _show(_request(home, "GET", "")["faults"], as_json=options.json)
    return 0


def _show(faults: list[Json], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(faults, indent=2) + "\n")
        return
    for fault in faults:
        on = fault["method"] if fault["kind"] in KINDS[:4] else fault["target"]
        sys.stdout.write(f"{fault['name']}  {fault['kind']}  {on}  hit {fault['hit']} of {fault['seen']}\n")
        for number, event in fault["hits"]:
            sys.stdout.write(f"    {number}  {event}\n")


def _request(home: Home, method: str, path: str, body: Json | None = None) -> Json:
    config = home.require_config()
    request = urllib.request.Request(  # noqa: S310
        f"{config.url}/localcloud/faults{path}",
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {config.token}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            answer: Json = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        raise HomeError(json.loads(error.read())["error"]["message"]) from error
    except OSError as error:
        raise HomeError(
            f"localcloud does not answer at {config.url}; run: python -m localcloud start"
        ) from error
    return answer
