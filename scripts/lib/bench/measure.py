"""What every question needs: arithmetic, the load, the first answer, what processes cost. Linux only."""

import contextlib
import http.client
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HEALTH, PRIMORIAL, FACTOR = "/healthz", "/primorial/30", "/factor/18446744073709551557"
ANSWERS = {
    HEALTH: b'{"status":"ok"}',
    PRIMORIAL: b'{"n":30,"primorial":"6469693230","digits":10,"primes":[2,3,5,7,11,13,17,19,23,29]}',
    FACTOR: b'{"n":"18446744073709551557","factors":[{"prime":"18446744073709551557","exponent":1}]}',
}
"""What each peer is asked, and the one right answer."""

Address = tuple[str, int]


class BenchError(Exception):
    """A measurement cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Load:
    """What wrk saw: requests, requests a second, latency in ms, and how many got no answer in time."""

    requests: int
    rate: float
    p50: float
    p99: float
    timeouts: int


def percentile(values: Iterable[float], part: float) -> float:
    """The nearest-rank percentile: the least of the values that `part` (0 to 1) of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds and their spread, with the rounds themselves."""
    return {
        "median": significant(statistics.median(values)),
        "low": significant(min(values)),
        "high": significant(max(values)),
        "rounds": [significant(value) for value in values],
    }


def significant(value: float, digits: int = 4) -> float:
    """A figure without the digits that it does not have."""
    return float(f"{value:.{digits}g}")


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ours by theirs, each round by the same round, so that what slowed both cancels out."""
    pairs = zip(ours["rounds"], theirs["rounds"], strict=True)
    return summary([own / other for own, other in pairs])


def rotated(items: Sequence[T], by: int) -> list[T]:
    """Another one goes first in each round."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def cores() -> tuple[list[int], list[int]]:
    """The cores of those who serve, and the cores of the load: half and half, where there are two."""
    have = sorted(os.sched_getaffinity(0))
    half = max(1, len(have) // 2)
    return have[:half], have[half:] or have


def wrk_command(url: str, seconds: int, connections: int) -> list[str]:
    """The load: keep-alive connections on cores apart from those of the servers."""
    on = cores()[1]
    threads = min(len(on), connections)
    command = ["taskset", "--cpu-list", ",".join(map(str, on)), "wrk", "--threads", str(threads)]
    command += ["--connections", str(connections), "--duration", f"{seconds}s", "--timeout", "10s"]
    return [*command, "--latency", url]


def load(url: str, seconds: int, connections: int) -> Load:
    """Makes a load and reads what wrk printed. Raises BenchError."""
    command = wrk_command(url, seconds, connections)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return read_wrk(" ".join(command), answer.stdout + answer.stderr)


def read_wrk(command: str, printed: str) -> Load:
    """Reads wrk's report; what is not an answer to every request is an error, and not a figure."""
    count = re.search(r"(\d+) requests in", printed)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    latency = dict(re.findall(r"(\d+)%\s+([\d.]+(?:us|ms|s|m))\n", printed))
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", printed)
    broken = sum(map(int, errors.groups()[:3])) if errors else 0
    if count is None or rate is None or "99" not in latency or "Non-2xx" in printed or broken:
        raise BenchError(f"{command} did not measure:\n{printed}")
    return Load(
        int(count.group(1)),
        float(rate.group(1)),
        milliseconds(latency["50"]),
        milliseconds(latency["99"]),
        int(errors.group(4)) if errors else 0,
    )


def milliseconds(latency: str) -> float:
    """What wrk calls 12.34us, 1.23ms, 1.23s or 1.20m."""
    for unit, factor in (("us", 0.001), ("ms", 1.0), ("s", 1000.0), ("m", 60_000.0)):
        if latency.endswith(unit):
            return float(latency.removesuffix(unit)) * factor
    raise BenchError(f"wrk printed a latency in an unknown unit: {latency}")


def get(address: Address, path: str, timeout: float = 5) -> bytes | None:
    """The body of a 200, else None."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    else:
        return body if answer.status == 200 else None
    finally:
        connection.close()


def first_answer(address: Address, path: str = HEALTH, timeout: float = 60) -> float:
    """Asks until the answer is right; gives the moment (monotonic). Raises BenchError."""
    deadline = time.monotonic() + timeout
    while get(address, path) != ANSWERS[path]:
        if time.monotonic() > deadline:
            raise BenchError(f"no right answer from {address[0]}:{address[1]}{path} in {timeout:.0f} s")
        # Rarely enough to leave the processor to what is being started.
        time.sleep(0.001)
    return time.monotonic()


def until(condition: Callable[[], bool], what: str, timeout: float) -> None:
    """Waits for something. Raises BenchError."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.05)


def processes() -> dict[int, tuple[int, list[str]]]:
    """Every process: its parent and its arguments, the program first; none of a kernel thread."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            found[int(entry.name)] = (int(_stat(int(entry.name))[1]), words)
    return found


def family(roots: Callable[[int, list[str]], bool]) -> set[int]:
    """The processes that `roots` chooses by id and arguments, and all that they started."""
    known = processes()
    chosen = {pid for pid, (_, words) in known.items() if roots(pid, words)}
    while more := {pid for pid, (parent, _) in known.items() if parent in chosen} - chosen:
        chosen |= more
    return chosen


def memory(pids: Iterable[int]) -> float:
    """Their memory in MB, with a page that several share counted once (proportional set size)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
            total += int(found.group(1)) if found else 0
    return total / 1000


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat after the name: state, parent and so on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


def cpu(pids: Iterable[int]) -> float:
    """The seconds of CPU time that they have taken since they started."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = _stat(pid)
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def pinned(pids: Iterable[int], on: Iterable[int]) -> Any:
    """Keeps every thread of processes that run already on some cores, and lets them go afterwards."""
    everywhere, chosen, pids = os.sched_getaffinity(0), set(on), list(pids)

    def pin(to: set[int]) -> None:
        for pid in pids:
            for thread in Path(f"/proc/{pid}/task").glob("*"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread.name), to)

    pin(chosen)
    try:
        yield
    finally:
        pin(everywhere)
