"""From a changed line to the changed answer: `pulumi up`, beside build, import and restart of a container."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts.lib import paths
from scripts.lib.bench import guard, measure
from scripts.lib.bench.measure import BenchError, summary
from scripts.lib.bench.peers import Docker, Peer, native

ROUTES = paths.REPOSITORY / "wasm_app" / "src" / "routes.rs"
LINE = r'r#"{"status":"ok"}"#'
UP = ["pulumi", "up", "--yes", "--skip-preview", "--stack", "local"]


def change(peers: Sequence[Peer], outputs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds until the changed answer, `rounds` times each; sources and stack are then as they were."""
    url = urlsplit(str(outputs["url"]))
    pod = (str(url.hostname), int(url.port or 80))
    ways: dict[str, tuple[measure.Address, Callable[[], None]]] = {"node": (pod, _up)}
    for peer in peers:
        if isinstance(peer, Docker):
            ways[peer.name] = (peer.address(0), partial(_container, peer))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with changeable(peers[0].directory) as write:
        for number in range(rounds):
            answer = write(f"{time.time_ns()}-{number}")
            for name in measure.rotated(list(ways), number):
                address, deploy = ways[name]
                begun = time.monotonic()
                deploy()
                measure.until(partial(_answers, address, answer), f"the changed answer of {name}", 120)
                taken[name].append(time.monotonic() - begun)
    return {name: summary(times) for name, times in taken.items()}


@contextlib.contextmanager
def changeable(directory: Path) -> Iterator[Callable[[str], bytes]]:
    """Gives what writes another answer into the sources; in the end they and the stack are as they were."""
    before = ROUTES.read_text(encoding="utf-8")
    if before.count(LINE) != 1:
        raise BenchError(f"{ROUTES} has not the one line that is changed: {LINE}")

    def write(word: str) -> bytes:
        answer = f'{{"status":"ok","change":"{word}"}}'
        ROUTES.write_text(before.replace(LINE, f'r#"{answer}"#'), encoding="utf-8")
        return answer.encode()

    guard.keep(directory, ROUTES)
    try:
        yield write
    finally:
        ROUTES.write_text(before, encoding="utf-8")
        _up()


def _answers(address: measure.Address, right: bytes) -> bool:
    return measure.get(address, measure.HEALTH) == right


def _up() -> None:
    answer = subprocess.run(UP, cwd=paths.REPOSITORY, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise BenchError(f"{' '.join(UP)}:\n{answer.stdout[-2000:]}{answer.stderr[-2000:]}")


def _container(peer: Docker) -> None:
    """What `docker build` of a Dockerfile FROM scratch does, and the old container's end."""
    built = Path(shutil.copy2(native(), peer.directory / "changed"))
    peer.image = peer.engine.import_image(built)
    peer.remove([0])
    peer.run(0)
