"""Measures the app as a pod on the stack's node, beside containers, a native process and `wasmtime serve`.

quick takes about two minutes, containers ten, full twenty-five; or name the questions. Needs wrk. A peer that
is not installed is named with how to install it. Figures are medians of rounds in one run, and no figure is
compared with an older one.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException

from scripts.lib import paths
from scripts.lib.bench import guard, questions, report
from scripts.lib.bench.change import change
from scripts.lib.bench.measure import BenchError, cores, first_answer, wrk_command
from scripts.lib.bench.peers import (
    AbsentError,
    Docker,
    Native,
    Node,
    Peer,
    Runtime,
    WasmtimeServe,
    component,
    native,
)
from scripts.lib.bench.sandbox import sandbox

QUESTIONS = ("size", "start", "density", "throughput", "sandbox", "change")
PEERS = (Node, Docker, Runtime, Native, WasmtimeServe)
# More work than this beside a run, in processes that want a core, shows in its figures.
QUIET = 0.5


def machine() -> dict[str, Any]:
    """What the figures were taken on, and whether it had other work."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "") if sys.platform == "linux" else ""
    load = os.getloadavg()[0]
    return {
        "processor": model.group(1) if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release().partition("-")[0],
        "system": system,
        "load_before": load,
        "quiet": load < QUIET,
    }


def versions() -> dict[str, str]:
    """What was measured, each by its own word; what is not there is left out."""
    asked = {
        "commit": ["git", "describe", "--always", "--dirty"],
        "rustc": ["rustc", "--version"],
        "docker": ["dockerd", "--version"],
        "containerd": ["containerd", "--version"],
        "runc": ["runc", "--version"],
        "crun": ["crun", "--version"],
        "wrk": ["wrk", "-v"],
    }
    found = {}
    for name, command in asked.items():
        with contextlib.suppress(OSError):
            answer = subprocess.run(
                command, cwd=paths.REPOSITORY, capture_output=True, text=True, check=False
            )
            found[name] = (answer.stdout or answer.stderr).partition("\n")[0].strip()
    found["kubernetes"] = str(client.VersionApi().get_code().git_version)
    lock = (paths.REPOSITORY / "krustlet" / "Cargo.lock").read_text(encoding="utf-8")
    if wasmtime := re.search(r'name = "wasmtime"\nversion = "([^"]+)"', lock):
        found["wasmtime"] = wasmtime.group(1)
    return found


def _open(
    directory: Path, outputs: dict[str, Any], wanted: list[str], files: dict[str, Path]
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are on this machine, and how to install those that are not."""
    makers: dict[str, Callable[[], Peer]] = {
        "node": lambda: Node(directory, outputs),
        "docker": lambda: Docker(directory, files["native"]),
        "runtime": lambda: Runtime(directory, files["native"]),
        "process": lambda: Native(directory, files["native"]),
        "wasmtime": lambda: WasmtimeServe(directory, component()),
    }
    peers, absent = [], {}
    for name in wanted:
        try:
            peer = makers[name]()
            peers.append(peer)
            # What does not answer at all is known before the first figure.
            peer.launch(0)
            first_answer(peer.address(0))
            peer.remove([0])
        except AbsentError as error:
            absent[name] = str(error)
            print(f"not measured: {name}; to install: {error}", flush=True)
    return peers, absent


def measured(options: argparse.Namespace, outputs: dict[str, Any]) -> dict[str, Any]:
    """Asks the questions. Raises BenchError."""
    mode = options.what[0] if options.what and options.what[0] in questions.EFFORTS else "containers"
    # It changes the sources and the stack, for minutes: only for who asks for everything, or for it.
    usual = [name for name in QUESTIONS if name != "change" or mode == "full"]
    asked = [name for name in options.what if name in QUESTIONS] or usual
    given = {key: value for key in ("rounds", "seconds", "starts") if (value := getattr(options, key))}
    effort = replace(questions.EFFORTS[mode], **given)
    absent = {}
    if "throughput" in asked and shutil.which("wrk") is None:
        if mode != "quick":
            raise BenchError("wrk is needed to make the load: apt-get install wrk")
        absent["wrk"] = "apt-get install wrk"
        asked.remove("throughput")
    begun = time.monotonic()
    data: dict[str, Any] = {
        "mode": mode,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "effort": asdict(effort),
        "load": " ".join(wrk_command("http://ADDRESS:PORT/PATH", effort.seconds, 50)),
        "server_cores": cores()[0],
        "link_mbit": questions.LINK_MBIT,
        "failed": {},
    }
    if not data["machine"]["quiet"]:
        print(
            f"the machine has other work, {data['machine']['load_before']:.1f} processes: the figures show it"
        )
    with guard.place() as directory, contextlib.ExitStack() as closing:
        files = {}
        if {"docker", "runtime", "process"} & set(options.peers):
            files["native"] = Path(shutil.copy2(native(), directory / "native"))
        peers, without = _open(directory, outputs, options.peers, files)
        data["absent"] = absent | without
        for peer in peers:
            closing.callback(peer.close)
        data["peers"] = {peer.name: {"title": peer.title, "command": peer.command} for peer in peers}
        for peer in peers:
            print(f"{peer.title}: {peer.command}", flush=True)
        image = str(outputs["image"])
        ask: dict[str, Callable[[], Any]] = {
            "size": lambda: questions.size(peers, files, image),
            "start": lambda: questions.start(peers, effort),
            "density": lambda: questions.density(peers, effort),
            "throughput": lambda: questions.throughput(peers, effort),
            "sandbox": lambda: sandbox(peers, image),
            "change": lambda: change(peers, outputs, min(3, effort.rounds)),
        }
        for name in asked:
            print(f"{name}:", flush=True)
            try:
                data[name] = ask[name]()
            except (BenchError, ApiException, subprocess.CalledProcessError) as error:
                # The answers to the others are not lost with it.
                data["failed"][name] = str(error)
                print(f"error: {name}: {error}", file=sys.stderr, flush=True)
    data["ratios"] = questions.ratios(data)
    data["seconds"] = round(time.monotonic() - begun)
    text = (
        json.dumps(data)
        .replace(str(directory), "DIRECTORY")
        .replace(str(paths.CACHE), "~/.cache/awesome-wasm")
    )
    return dict(json.loads(text))


def main() -> int:
    """Runs what was asked for; gives the exit status."""
    parser = argparse.ArgumentParser(prog="./scripts/bench", description=__doc__)
    what = [*questions.EFFORTS, *QUESTIONS, "report"]
    parser.add_argument(
        "what",
        nargs="*",
        choices=[*what, []],
        help="how much, or which questions; report: docs/ from its JSON",
    )
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS], metavar="PEER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--publish", action="store_true", help="write docs/benchmarks.* and the plots")
    for name in ("rounds", "seconds", "starts"):
        parser.add_argument(f"--{name}", type=int, help=f"other {name} than the mode's")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = [peer.name for peer in PEERS]
    if options.what == ["report"]:
        report.publish()
        return 0
    command = ["pulumi", "stack", "output", "--json", "--stack", "local"]
    outputs = json.loads(
        subprocess.run(command, cwd=paths.REPOSITORY, capture_output=True, check=True).stdout
    )
    config.load_kube_config()
    try:
        data = measured(options, outputs)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{report.tables(data)}")
    text = json.dumps(data, indent=1) + "\n"
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    if options.publish:
        report.JSON.write_text(text, encoding="utf-8")
        report.publish()
    return 1 if data["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
