"""What a compromised app can reach: each row with the command that shows it."""

import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.lib import verify
from scripts.lib.bench import measure
from scripts.lib.bench.peers import Docker, Peer

UNISTD = (
    "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "/usr/include/aarch64-linux-gnu/asm/unistd_64.h",
    "/usr/include/asm-generic/unistd.h",
)


def sandbox(peers: Sequence[Peer], image: str) -> list[dict[str, Any]]:
    """The rows; a peer's answer is missing where the row does not apply or its tool is not there."""
    for peer in peers:
        peer.launch(0)
    try:
        for peer in peers:
            measure.first_answer(peer.address(0))
        apps = {peer.name: app for peer in peers if (app := _app(peer))}
        guests = [peer.name for peer in peers if peer.name in ("node", "wasmtime")]
        return [
            _row("files at the root that the app sees", "sudo ls -A /proc/PID/root | wc -l", apps, _files)
            | _guests(guests, "none: no import opens one"),
            _row(
                "processes that the app sees",
                "sudo ls -d /proc/PID/root/proc/[0-9]*; sudo readlink /proc/PID/ns/pid",
                apps,
                _processes,
            )
            | _guests(guests, "none"),
            _row("network", "sudo readlink /proc/PID/ns/net /proc/self/ns/net", apps, _network)
            | _guests(guests, "answers requests; no import connects"),
            _row("user and capabilities", "grep -E '^(Uid|CapEff)' /proc/PID/status", apps, _rights)
            | _guests(guests, "none of its own"),
            _row("system calls that the app may make", _CALLS, apps, _allowed(peers))
            | _guests(guests, f"none; it imports {_imports(image)}"),
            _row(
                "system calls that its process makes while it answers",
                "sudo strace -f -c -p PID, under 50 connections for 3 s",
                {peer.name: _server(peer) for peer in peers},
                _used(peers),
            ),
        ]
    finally:
        for peer in peers:
            peer.remove([0])


_CALLS = "all: grep -c '#define __NR_' asm/unistd_64.h; Docker: linux.seccomp in the container's config.json"


def _row(what: str, command: str, apps: dict[str, int], ask: Callable[[str, int], str]) -> dict[str, Any]:
    return {"what": what, "command": command, **{name: ask(name, pid) for name, pid in apps.items()}}


def _guests(names: list[str], answer: str) -> dict[str, str]:
    return dict.fromkeys(names, answer)


def _app(peer: Peer) -> int | None:
    """The process that is the app itself; a guest of wasm has none."""
    if peer.name in ("node", "wasmtime"):
        return None
    if isinstance(peer, Docker):
        return int(peer.engine.inspect("bench-0")["State"]["Pid"])
    return min(peer.processes())


def _server(peer: Peer) -> int:
    """The process that answers."""
    return _app(peer) or min(peer.processes())


def _files(_: str, pid: int) -> str:
    return str(len(list(Path(f"/proc/{pid}/root/").iterdir())))


def _same(pid: int, namespace: str) -> bool:
    return Path(f"/proc/{pid}/ns/{namespace}").readlink() == Path(f"/proc/self/ns/{namespace}").readlink()


def _processes(_: str, pid: int) -> str:
    if _same(pid, "pid"):
        return f"{len(measure.processes())}, the host's"
    inside = Path(f"/proc/{pid}/root/proc")
    return f"{len(list(inside.glob('[0-9]*')))}, its own" if inside.is_dir() else "its own"


def _network(_: str, pid: int) -> str:
    return "the host's, as it is started here" if _same(pid, "net") else "its own"


def _rights(_: str, pid: int) -> str:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        if ":\t" in line
    )
    held = int(status["CapEff"], 16).bit_count()
    return f"uid {status['Uid'].split()[0]}, {held} capabilities"


def _calls() -> set[str]:
    """The names of the system calls of this machine's headers; none where there are none."""
    for header in map(Path, UNISTD):
        if header.is_file():
            text = header.read_text(encoding="ascii")
            return set(re.findall(r"^#define __NR_(\w+)\s+\d+", text, re.MULTILINE))
    return set()


def _allowed(peers: Sequence[Peer]) -> Callable[[str, int], str]:
    engines = {peer.name: peer.engine for peer in peers if isinstance(peer, Docker)}

    def ask(name: str, pid: int) -> str:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        if "\nSeccomp:\t2" not in status or name not in engines:
            return f"all {len(_calls()) or 'of the kernel'}, no filter"
        number = engines[name].inspect("bench-0")["Id"]
        for file in (engines[name].directory / "exec").glob(f"**/{number}/config.json"):
            rules = json.loads(file.read_text(encoding="utf-8"))["linux"]["seccomp"]["syscalls"]
            calls = {call for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for call in rule["names"]}
            # The filter names those of other processors too.
            return f"{len(calls & (_calls() or calls))}, by Docker's filter; some with conditions"
        return "filtered"

    return ask


def _imports(image: str) -> str:
    """What the artifact's configuration says that the component imports."""
    registry = verify.Registry(image)
    manifest = json.loads(registry.manifest(registry.digest))
    config = json.loads(registry.blob(manifest["config"]["digest"]))
    return ", ".join(str(name).partition("@")[0] for name in config["component"]["imports"])


def _used(peers: Sequence[Peer]) -> Callable[[str, int], str]:
    addresses = {peer.name: peer.address(0) for peer in peers}

    def ask(name: str, pid: int) -> str:
        if shutil.which("strace") is None:
            return "apt-get install strace"
        command = ["strace", "-f", "-c", "-p", str(pid)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        host, port = addresses[name]
        wrk = [
            "wrk",
            "--connections",
            "50",
            "--threads",
            "1",
            "--duration",
            "3s",
            f"http://{host}:{port}/healthz",
        ]
        load = threading.Thread(target=subprocess.run, args=(wrk,), kwargs={"capture_output": True})
        time.sleep(0.5)  # until strace holds every thread
        load.start()
        load.join()
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=30)[1]
        calls = re.findall(r"^ *[\d.]+ .*\s([a-z]\w+)$", printed, re.MULTILINE)
        named = sorted({call for call in calls if call != "total"})
        return f"{len(named)}: {', '.join(named)}" if named else "strace may not look"

    return ask
