"""The questions: each takes the peers that are there and gives what goes into the JSON.

Peers take turns in every round, another one first each time, and are warm before the first figure.
"""

import gzip
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kubernetes.client import ApiException

from scripts.lib import verify
from scripts.lib.bench import measure
from scripts.lib.bench.measure import ANSWERS, FACTOR, HEALTH, PRIMORIAL, BenchError, significant, summary
from scripts.lib.bench.peers import Docker, Node, Peer

LINK_MBIT = 100
PATIENCE = 250  # seconds for the start of all instances of a peer


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds of loads, seconds of each, starts, and numbers of instances."""

    rounds: int
    seconds: int
    connections: tuple[int, ...]
    starts: int
    instances: tuple[int, ...]
    idle_seconds: int


EFFORTS = {
    "quick": Effort(2, 1, (1, 50), 5, (1, 10), 2),
    "containers": Effort(3, 2, (1, 50, 500), 30, (1, 10, 100), 4),
    "full": Effort(5, 2, (1, 50, 500), 50, (1, 10, 100, 1000), 6),
}


def say(text: str) -> None:
    """What is at work, as a full run takes its time."""
    print(f"  … {text}", flush=True)


def size(peers: Sequence[Peer], files: dict[str, Path], image: str) -> dict[str, Any]:
    """Bytes of the app alone and of what a registry stores for it, and their time on such a link."""
    registry = verify.Registry(image)
    raw = registry.manifest(registry.digest)
    manifest = json.loads(raw)
    stored = len(raw) + manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"])
    found = {"node": {"app": manifest["layers"][0]["size"], "pushed": stored}}
    for peer in peers:
        if isinstance(peer, Docker):
            layer = len(gzip.compress(peer.engine.save(peer.image), 6))
            found[peer.name] = {"app": files["native"].stat().st_size, "pushed": layer}
    if "native" in files:
        found["process"] = {"app": files["native"].stat().st_size}
    for one in found.values():
        if "pushed" in one:
            one["computed_pull_ms"] = significant(one["pushed"] * 8 / LINK_MBIT / 1000)
    return found


def start(peers: Sequence[Peer], effort: Effort) -> dict[str, Any]:
    """From asking for an instance to its first right answer, one after the other, with all of it cached."""
    launches: dict[str, tuple[Peer, Callable[[int], None]]] = {
        peer.name: (peer, peer.launch) for peer in peers
    }
    for peer in peers:
        if isinstance(peer, Docker):
            launches["docker run"] = (peer, peer.run)
    taken: dict[str, list[float]] = {name: [] for name in launches}
    ready = []
    for number in range(effort.starts + 1):
        for name in measure.rotated(list(launches), number):
            peer, launch = launches[name]
            begun = time.monotonic()
            launch(number)
            took = measure.first_answer(peer.address(number)) - begun
            if isinstance(peer, Node):
                seen: dict[int, float] = peer.ready
                measure.until(partial(seen.__contains__, number), "a pod to be Ready", 60)
                ready.append((seen[number] - begun) * 1000)
            peer.remove([number])
            if number:  # the first round warms up
                taken[name].append(took * 1000)
    found = {name: _distribution(times) for name, times in taken.items()}
    if ready:
        found["node ready"] = _distribution(ready[1:])
    return found


def _distribution(times: list[float]) -> dict[str, Any]:
    return {
        "p50": significant(measure.percentile(times, 0.5)),
        "p99": significant(measure.percentile(times, 0.99)),
        "count": len(times),
        "rounds": [significant(one) for one in times],
    }


def density(peers: Sequence[Peer], effort: Effort) -> dict[str, Any]:
    """Memory of platform and idle instances together, and what processor they take while nobody asks."""
    return {peer.name: _density(peer, effort) for peer in peers}


def _density(peer: Peer, effort: Effort) -> dict[str, Any]:
    before = measure.memory(peer.processes())
    found: dict[str, Any] = {
        "platform_mb": significant(before),
        "total_mb": {},
        "up_seconds": {},
        "idle_cpu_percent": {},
    }
    if isinstance(peer, Node):
        found["control_plane_mb"] = significant(measure.memory(peer.control_plane()))
    up = launched = 0
    try:
        for count in effort.instances:
            each = (found["total_mb"][str(up)] - before) / up if up else 0.0
            wait = found["up_seconds"][str(up)] / up * count if up else 0.0
            if each * count > 0.7 * _available() or wait > PATIENCE:
                found["stopped"] = (
                    f"{count} would take {each * count / 1000:.0f} GB and {wait:.0f} s to start"
                )
                break
            say(f"{peer.title}: {count} idle")
            begun, launched = time.monotonic(), count
            try:
                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(peer.launch, range(up, count)))
                last = max(measure.first_answer(peer.address(one)) for one in range(up, count))
            except (BenchError, OSError, ApiException) as error:
                found["stopped"] = f"{count} do not start ({str(error)[:200]})"
                break
            found["up_seconds"][str(count)] = significant(last - begun)
            up = count
            # The events and logs of so many starts are still being written.
            time.sleep(effort.idle_seconds / 2)
            used, began = measure.cpu(peer.processes()), time.monotonic()
            time.sleep(effort.idle_seconds)
            idle = (measure.cpu(peer.processes()) - used) / (time.monotonic() - began)
            found["total_mb"][str(count)] = significant(measure.memory(peer.processes()))
            found["idle_cpu_percent"][str(count)] = significant(idle * 100)
        if up == 0:
            raise BenchError(f"{peer.title}: {found['stopped']}")
        found["instance_kb"] = significant((found["total_mb"][str(up)] - before) / up * 1000)
    finally:
        peer.remove(range(launched))
    return found


def _available() -> float:
    """Memory that can be had, in MB."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("MemAvailable"))


def throughput(peers: Sequence[Peer], effort: Effort) -> dict[str, Any]:
    """Requests a second, latency and CPU time, one instance of each peer, servers and load on cores apart."""
    for peer in peers:
        peer.launch(0)
    try:
        for peer in peers:
            for path, right in ANSWERS.items():
                measure.first_answer(peer.address(0))
                if (answer := measure.get(peer.address(0), path)) != right:
                    raise BenchError(f"{peer.title} answers {path} with {answer!r}")
        found: dict[str, Any] = {}
        for path in (HEALTH, PRIMORIAL, FACTOR):
            for connections in effort.connections:
                say(f"{path} at {connections} connections")
                found.setdefault(path, {})[str(connections)] = _loads(peers, path, connections, effort)
        return found
    finally:
        for peer in peers:
            peer.remove([0])


def _loads(peers: Sequence[Peer], path: str, connections: int, effort: Effort) -> dict[str, Any]:
    seen: dict[str, list[tuple[measure.Load, float]]] = {peer.name: [] for peer in peers}
    for number in range(effort.rounds + 1):
        for peer in measure.rotated(peers, number):
            host, port = peer.address(0)
            pids = peer.processes()
            with measure.pinned(pids, measure.cores()[0]):
                used = measure.cpu(pids)
                # The first round warms up.
                loaded = measure.load(
                    f"http://{host}:{port}{path}", effort.seconds if number else 1, connections
                )
                spent = measure.cpu(pids) - used
            if number:
                seen[peer.name].append((loaded, spent / loaded.requests * 1e6))
    return {
        name: {
            "rate": summary([one.rate for one, _ in loads]),
            "p50_ms": summary([one.p50 for one, _ in loads]),
            "p99_ms": summary([one.p99 for one, _ in loads]),
            "cpu_seconds_per_million": summary([spent for _, spent in loads]),
            "timeouts": sum(one.timeouts for one, _ in loads),
        }
        for name, loads in seen.items()
    }


TARGETS = (
    ("requests per second against `wasmtime serve`, 50 connections", HEALTH, "50", "wasmtime", "2.5"),
    ("requests per second against Docker, /healthz, 50 connections", HEALTH, "50", "docker", "0.3"),
    ("requests per second against Docker, /primorial/30, 50 connections", PRIMORIAL, "50", "docker", ""),
    ("requests per second against native, /factor, 50 connections", FACTOR, "50", "process", "0.7"),
)


def ratios(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Our node by each peer that a target names: requests a second in the same rounds, starts, memory."""
    found: list[dict[str, Any]] = []

    def add(what: str, target: str, value: dict[str, Any]) -> None:
        found.append({"what": what, "target": target, **value})

    for what, path, connections, peer, target in TARGETS:
        loads = data.get("throughput", {}).get(path, {}).get(connections, {})
        if {"node", peer} <= loads.keys():
            add(what, target, measure.ratio(loads["node"]["rate"], loads[peer]["rate"]))
    begun = data.get("start", {})
    for peer, target in (
        ("docker run", "0.1"),
        ("docker", ""),
        ("runtime", ""),
        ("process", ""),
        ("wasmtime", ""),
    ):
        if {"node", peer} <= begun.keys():
            add(
                f"created to first right answer against {peer}",
                target,
                measure.ratio(begun["node"], begun[peer]),
            )
    idle = data.get("density", {})
    for peer in ("docker", "runtime", "process", "wasmtime"):
        if {"node", peer} <= idle.keys():
            most = max(idle["node"]["total_mb"].keys() & idle[peer]["total_mb"].keys(), key=int)
            value = idle["node"]["total_mb"][most] / idle[peer]["total_mb"][most]
            target = "0.033" if (peer, most) == ("docker", "1000") else ""
            add(
                f"memory of {most} idle instances, platform included, against {peer}",
                target,
                summary([value]),
            )
    return found
