"""Measures the running stack: throughput beside `wasmtime serve`, time from created to Ready, density.

Figures are ratios in one run where a peer exists, and each peer's command line is printed. Linux only, as it
reads the agent's memory and CPU time from /proc. Needs wrk on PATH.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from kubernetes import client, config, watch

from localcloud.backends.processes import wait_until
from scripts.lib import paths

NAMESPACE = "bench"
FIRST_PORT = 20000


class BenchError(Exception):
    """A measurement cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Load:
    """What wrk saw: requests per second, and percentiles of the latency in milliseconds."""

    rate: float
    p50: float
    p99: float


def percentile(values: list[float], part: float) -> float:
    """The nearest-rank percentile, part in 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def _wasmtime() -> Path:
    """`wasmtime` of the version that the agent is built with, compiled once into the cache."""
    lock = (paths.REPOSITORY / "krustlet" / "Cargo.lock").read_text(encoding="utf-8")
    found = re.search(r'name = "wasmtime"\nversion = "([^"]+)"', lock)
    if found is None:
        raise BenchError("krustlet/Cargo.lock names no wasmtime")
    version = found.group(1)
    root = paths.CACHE / "tools" / f"wasmtime-cli-{version}"
    program = root / "bin" / "wasmtime"
    if not program.exists():
        print(f"compiling wasmtime-cli {version}, once …", flush=True)
        command = ["cargo", "install", "wasmtime-cli", "--version", version, "--locked", "--root", str(root)]
        with tempfile.TemporaryDirectory() as target:
            subprocess.run(command, env={**os.environ, "CARGO_TARGET_DIR": target}, check=True)
    return program


def _load(url: str, seconds: int, connections: int = 50) -> tuple[str, Load]:
    threads = str(min(2, connections))
    command = ["wrk", "--threads", threads, "--connections", str(connections), "--duration", f"{seconds}s"]
    command += ["--latency", url]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    latency = dict(re.findall(r"(\d+)%\s+([\d.]+(?:us|ms|s))\n", printed))
    if rate is None or "99" not in latency or "Non-2xx" in printed:
        raise BenchError(f"{' '.join(command)} did not measure:\n{printed}")
    return " ".join(command), Load(
        float(rate.group(1)), _milliseconds(latency["50"]), _milliseconds(latency["99"])
    )


def _milliseconds(latency: str) -> float:
    """What wrk calls 12.34us, 1.23ms or 1.23s."""
    for unit, factor in (("us", 0.001), ("ms", 1.0), ("s", 1000.0)):
        if latency.endswith(unit):
            return float(latency.removesuffix(unit)) * factor
    raise BenchError(f"wrk printed a latency in an unknown unit: {latency}")


@contextlib.contextmanager
def _peer(component: Path) -> Iterator[tuple[str, str]]:
    """`wasmtime serve` on a free port: its command line and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(_wasmtime()), "serve", "--addr", f"127.0.0.1:{port}", str(component)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _until(lambda: _is_healthy(url), "wasmtime serve to answer", 30)
        yield " ".join(command), url
    finally:
        process.terminate()
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/healthz", timeout=1).ok
    except requests.RequestException:
        return False


def _until(condition: Callable[[], bool], what: str, timeout: float) -> None:
    if not wait_until(condition, timeout, 0.05):
        raise BenchError(f"waited {timeout:.0f} s in vain for {what}")


def _pod(outputs: dict[str, Any], name: str, port: int) -> client.V1Pod:
    return client.V1Pod(
        metadata=client.V1ObjectMeta(name=name, labels={"bench": "yes"}),
        spec=client.V1PodSpec(
            automount_service_account_token=False,
            node_selector={"kubernetes.io/hostname": outputs["node"]},
            tolerations=[client.V1Toleration(key="kubernetes.io/arch", operator="Exists")],
            termination_grace_period_seconds=0,
            containers=[
                client.V1Container(
                    name="app",
                    image=outputs["image"],
                    ports=[client.V1ContainerPort(container_port=port)],
                )
            ],
        ),
    )


class Pods:
    """Creates pods and hears through a watch when each of them is Ready."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        self.outputs = outputs
        self.api = client.CoreV1Api()
        self.ready: dict[str, float] = {}
        self._changed = threading.Condition()
        with contextlib.suppress(client.ApiException):
            self.api.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=NAMESPACE)))
        _until(self._service_account, "the namespace to be usable", 30)
        threading.Thread(target=self._watch, daemon=True).start()

    def _service_account(self) -> bool:
        try:
            self.api.read_namespaced_service_account("default", NAMESPACE)
        except client.ApiException:
            return False
        return True

    def _watch(self) -> None:
        for event in watch.Watch().stream(
            self.api.list_namespaced_pod, NAMESPACE, label_selector="bench=yes"
        ):
            conditions = event["object"].status.conditions or []
            if any(condition.type == "Ready" and condition.status == "True" for condition in conditions):
                with self._changed:
                    self.ready.setdefault(event["object"].metadata.name, time.monotonic())
                    self._changed.notify_all()

    def create(self, name: str, port: int) -> float:
        """Creates a pod; gives the time before the request."""
        start = time.monotonic()
        self.api.create_namespaced_pod(NAMESPACE, _pod(self.outputs, name, port))
        return start

    def wait(self, names: list[str], timeout: float) -> None:
        """Waits until all of them were Ready."""
        with self._changed:
            if not self._changed.wait_for(lambda: all(name in self.ready for name in names), timeout):
                missing = [name for name in names if name not in self.ready]
                raise BenchError(f"{len(missing)} of {len(names)} pods were not Ready within {timeout:.0f} s")

    def remove(self) -> None:
        """Deletes every pod of the benchmark and waits until they are gone."""
        self.api.delete_collection_namespaced_pod(NAMESPACE, grace_period_seconds=0)
        _until(lambda: not self.api.list_namespaced_pod(NAMESPACE, limit=1).items, "the pods to go", 180)


def throughput(outputs: dict[str, Any], rounds: int, seconds: int) -> None:
    """The same component, served by the node and by `wasmtime serve`, in turn.

    By a pod of its own without a CPU limit: the stack's own has one, and `wasmtime serve` knows none.
    """
    if shutil.which("wrk") is None:
        raise BenchError("wrk is needed to make the load: apt-get install wrk, or brew install wrk")
    command = [
        sys.executable,
        "-m",
        "components.providers.cargo",
        "wasm_app",
        "--target",
        "wasm32-unknown-unknown",
    ]
    built = subprocess.run(command, cwd=paths.REPOSITORY, capture_output=True, text=True, check=True).stdout
    component = Path(built.splitlines()[-1])
    pods = Pods(outputs)
    pods.create("throughput", FIRST_PORT)
    pods.wait(["throughput"], 60)
    mine = f"http://{urlsplit(outputs['url']).hostname}:{FIRST_PORT}/primorial/30"
    ratios, tails = [], []
    with _peer(component) as (line, url):
        print(f"peer: {line}")
        peer = f"{url}/primorial/30"
        for number in range(rounds + 1):
            generator, ours = _load(mine, seconds)
            _, theirs = _load(peer, seconds)
            if number == 0:
                print(f"load: {generator}\n  (the first round warms up and is not counted)")
                continue
            ratios.append(ours.rate / theirs.rate)
            tails.append(ours.p99 / theirs.p99)
            print(
                f"  krustlet {ours.rate:8.0f}/s p99 {ours.p99:6.2f} ms"
                f"   wasmtime serve {theirs.rate:8.0f}/s p99 {theirs.p99:6.2f} ms"
            )
        _, ours = _load(mine, seconds, connections=1)
        _, theirs = _load(peer, seconds, connections=1)
    pods.remove()
    print(
        f"throughput: {statistics.median(ratios):.2f} x wasmtime serve"
        f" ({min(ratios):.2f} to {max(ratios):.2f}); p99: {statistics.median(tails):.2f} x"
        f" ({min(tails):.2f} to {max(tails):.2f})"
    )
    print(
        f"one request at a time, each by an instance of its own: p50 {ours.p50:.3f} ms, p99 {ours.p99:.3f} ms"
        f" (wasmtime serve {theirs.p50:.3f} ms, {theirs.p99:.3f} ms)"
    )


def start_time(outputs: dict[str, Any], count: int) -> None:
    """From a pod's creation to Ready, its module cached, one pod after the other."""
    pods = Pods(outputs)
    taken = []
    for number in range(count):
        name = f"start-{number}"
        begun = pods.create(name, FIRST_PORT + number)
        pods.wait([name], 60)
        taken.append((pods.ready[name] - begun) * 1000)
    pods.remove()
    print(
        f"created to Ready, {count} pods one after the other, through a watch:"
        f" p50 {percentile(taken, 0.5):.0f} ms, p99 {percentile(taken, 0.99):.0f} ms"
    )


def _agent() -> int:
    home = os.environ["LOCALCLOUD_HOME"]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if Path(words[0].decode()).name == "krustlet" and home.encode() in b" ".join(words):
                return int(process.name)
    raise BenchError("no krustlet of this stack runs on this machine")


def _resident(pid: int) -> float:
    """Resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found.group(1)) / 1000 if found else 0.0


def _cpu(pid: int) -> float:
    """Seconds of CPU time since the process started."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def density(outputs: dict[str, Any], count: int, idle_seconds: int) -> None:
    """Many idle pods on one node: how soon all are Ready, and what each costs."""
    status = client.CoreV1Api().read_node(outputs["node"]).status
    room = int(((status and status.allocatable) or {}).get("pods", 0))
    if room <= count:
        raise BenchError(
            f"the node takes {room} pods; once: pulumi config set maxPods {count + 100} && ./scripts/up"
        )
    agent = _agent()
    before = _resident(agent)
    pods = Pods(outputs)
    names = [f"dense-{number}" for number in range(count)]
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pods.create, names, range(FIRST_PORT, FIRST_PORT + count)))
    pods.wait(names, 600)
    took = max(pods.ready[name] for name in names) - begun
    after = _resident(agent)
    # The Events of so many starts are still being sent: the agent is idle once that is over.
    time.sleep(idle_seconds)
    used = _cpu(agent)
    time.sleep(idle_seconds)
    idle = (_cpu(agent) - used) / idle_seconds
    pods.remove()
    print(
        f"{count} pods: all Ready {took:.1f} s after the first was created;"
        f" agent {before:.0f} MB before, {after:.0f} MB after:"
        f" {(after - before) / count * 1000:.0f} kB a pod;"
        f" idle CPU {idle * 100:.2f} % of a core over {idle_seconds} s"
    )


def main() -> int:
    """Runs the measurements that were asked for; gives the exit status."""
    parser = argparse.ArgumentParser(prog="./scripts/bench", description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=["throughput", "start", "density", []], help="all, unless given"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the throughput measurement")
    parser.add_argument("--seconds", type=int, default=8, help="length of each load")
    parser.add_argument("--pods", type=int, default=1000, help="pods of the density measurement")
    options = parser.parse_args()
    command = ["pulumi", "stack", "output", "--json", "--stack", "local"]
    outputs = json.loads(
        subprocess.run(command, cwd=paths.REPOSITORY, capture_output=True, check=True).stdout
    )
    config.load_kube_config()
    chosen = options.only or ["throughput", "start", "density"]
    try:
        if "throughput" in chosen:
            throughput(outputs, options.rounds, options.seconds)
        if "start" in chosen:
            start_time(outputs, 100)
        if "density" in chosen:
            density(outputs, options.pods, 30)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
