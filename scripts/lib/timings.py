"""How long each part of a command takes: this time, usually, and where to read what happens meanwhile."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.lib import paths

# What is shorter is not worth an estimate: it is mostly a look into the cache.
REMEMBERED_SECONDS = 30
# As `pulumi up` prints what it has done with a resource, such as `created (3.21s)`.
_RESOURCE = re.compile(
    r"^ *[-+~]{1,2} +(\S+) +(\S+) +(created|updated|deleted|replaced|refreshed)[^(\n]*\((\d+(?:\.\d+)?)s\)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class About:
    """A step that may last: its usual seconds on two cores, what it does, the page that tells more."""

    seconds: int
    what: str
    page: str


_PAGE = "docs/first-start.md"
ABOUT = {
    "build kubernetes": About(8 * 60, "The control plane that stands for GKE's", _PAGE),
    "build registry": About(90, "The registry that stands for Artifact Registry", _PAGE),
    "build pulumi": About(4 * 60, "The CLI that runs __main__.py", _PAGE),
    "build pulumi-language-python": About(20, "What starts Python for the CLI", _PAGE),
    "build peers": About(4 * 60, "Clients that the tests compare ours with", "docs/supply-chain.md"),
    "build cosign3": About(4 * 60, "A client that the tests compare ours with", "docs/supply-chain.md"),
    "virtual environment": About(20, "The program's and localcloud's libraries", "requirements.in"),
    "take the bundle": About(15, "What another machine has built", _PAGE),
    "compile krustlet": About(10 * 60, "The node agent", "krustlet/README.md"),
    "compile wasm_app": About(75, "The app, for wasm", "wasm_app/src/lib.rs"),
    "pulumi up": About(25, "What is created, in order", "__main__.py"),
}


@dataclass
class Timing:
    """What a part took itself, without the parts in it, in seconds; `kept` is what it has in the cache."""

    name: str
    seconds: float
    kept: Path | None = None


TIMINGS: list[Timing] = []
_inner = [0.0]


@contextlib.contextmanager
def timed(name: str) -> Iterator[Timing]:
    """Measures a part of the command."""
    timing = Timing(name, 0.0)
    TIMINGS.append(timing)
    started = time.monotonic()
    _inner.append(0.0)
    try:
        yield timing
    finally:
        whole = time.monotonic() - started
        timing.seconds = whole - _inner.pop()
        _inner[-1] += whole


def shown(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.1f}s" if seconds < 60 else f"{int(seconds // 60)}m{int(seconds % 60):02}s"


def _memory() -> Path:
    return paths.CACHE / "durations.json"


def _remembered() -> dict[str, float]:
    try:
        found = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    numbers = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in numbers if isinstance(value, int | float)}


def usual(name: str) -> float:
    """How long a step took on this machine the last time that it had something to do, or else on ours."""
    return _remembered().get(name) or ABOUT[name].seconds


def remember(name: str, seconds: float) -> None:
    """Notes how long a step took."""
    if name not in ABOUT or seconds < REMEMBERED_SECONDS:
        return
    # The step is done: a disk that is full since must not undo that.
    with contextlib.suppress(OSError):
        scratch = _memory().with_name(f".durations-{os.getpid()}")
        scratch.write_text(json.dumps({**_remembered(), name: round(seconds, 1)}), encoding="utf-8")
        scratch.replace(_memory())


def size(path: Path) -> int:
    """The bytes that a file or directory has on the disk; a file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(path):
        for name in (*names, "."):
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - half of the time for a big cache
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    if not path.is_dir():
        with contextlib.suppress(OSError):
            return path.lstat().st_blocks * 512
    return sum(seen.values())


def megabytes(count: int) -> str:
    """A size for people."""
    return f"{count / 2**20:,.0f} MB" if count >= 2**20 else f"{count / 2**10:,.0f} kB"


def resources(log: str) -> list[Timing]:
    """What Pulumi's own log says about the longest of its resources."""
    found = [
        Timing(f"{kind.rpartition(':')[2] or kind} {name} {verb}", float(seconds))
        for kind, name, verb, seconds in _RESOURCE.findall(log)
    ]
    return sorted((one for one in found if one.seconds >= 0.5), key=lambda one: -one.seconds)[:10]


def table(within: dict[str, list[Timing]]) -> str:
    """A line for each part: duration, share of the whole, what it has in the cache; `within` are its own."""
    whole = sum(timing.seconds for timing in TIMINGS) or 1.0
    lines = [f"{'':44}{'time':>8}{'share':>8}{'in the cache':>14}"]
    for timing in TIMINGS:
        kept = megabytes(size(timing.kept)) if timing.kept and timing.kept.exists() else ""
        lines.append(f"{timing.name:44}{shown(timing.seconds):>8}{timing.seconds / whole:>8.0%}{kept:>14}")
        # Pulumi works on several at once: together they may last longer than the step.
        lines += [f"  {one.name:42.42}{shown(one.seconds):>8}" for one in within.get(timing.name, [])]
    lines.append(f"{'together':44}{shown(whole):>8}")
    sizes = sorted(((size(path), path) for path in paths.CACHE.glob("*")), reverse=True)
    lines += [f"{'':60}{megabytes(bytes_):>14}  {path}" for bytes_, path in sizes if bytes_ >= 2**20]
    return "\n".join(line.rstrip() for line in lines)
