"""Each cell of the table in docs/supply-chain.md, by the command that stands there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests

from components.providers.signature import generate_key
from scripts.lib import interop, paths, toolchain
from scripts.lib.bench import peers as bench_peers
from scripts.lib.interop import CELLS, Cell
from tests.e2e.test_trust import Bench, bench, pod, run_image
from tests.integration.agent.harness import free_port
from tests.waiting import until

__all__ = ["bench", "pod"]
PUBLISHES = os.environ.get("AWESOME_WASM_INTEROP") == "publish"
# Peers that come from crates.io, and take a while to compile: who wants their cells installs them.
WKG = "0.16.1"


def program(tool: str) -> tuple[Path, str]:
    """Where a tool is, and its version. Skips the test where it is not on this machine."""
    if tool == "wasmtime":
        try:
            found = bench_peers.wasmtime()
        except bench_peers.AbsentError as error:
            pytest.skip(f"`{error}` was not run")
    elif tool == "wkg":
        root = paths.CACHE / "tools" / f"wkg-{WKG}"
        found = root / "bin" / "wkg"
        if not found.exists():
            pytest.skip(f"`cargo install wkg --version {WKG} --locked --root {root}` was not run")
    else:
        path = shutil.which(tool)
        assert path, f"{tool} is not on PATH: ./scripts/test brings it"
        return Path(path), toolchain.pinned(*PINS[tool])
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    return found, said.split()[1]


PINS = {
    "cosign": ("peers", "github.com/sigstore/cosign/v2"),
    "cosign3": ("cosign3", "github.com/sigstore/cosign/v3"),
    "oras": ("peers", "oras.land/oras"),
    "crane": ("peers", "github.com/google/go-containerregistry"),
}


@contextmanager
def recorded(cell: Cell) -> Iterator[None]:
    """Keep in docs/interop.json what is seen of a cell, where that is asked for."""
    try:
        _, version = program(cell.tool)
        yield
    except pytest.skip.Exception as skipped:
        keep(cell, {"why": str(skipped).replace(str(paths.CACHE), "CACHE")})
        raise
    except BaseException:
        keep(cell, {"why": "it failed"})
        raise
    keep(cell, {"version": version})


def keep(cell: Cell, outcome: dict[str, str]) -> None:
    """Write a cell's outcome."""
    if PUBLISHES:
        seen = interop.read_seen() if interop.SEEN.exists() else {}
        interop.SEEN.write_text(json.dumps({**seen, cell.name: outcome}, indent=2, sort_keys=True) + "\n")


class Desk:
    """A directory with the files of which the commands speak, and the variables."""

    def __init__(self, bench: Bench, cell: Cell) -> None:
        self.bench, self.directory = bench, bench.files
        outputs = bench.stack.outputs()
        image = outputs["image"]
        repository = image.partition("@")[0]
        manifest = json.loads(bench.peers.run("crane", "manifest", image).stdout)
        (layer,) = (layer["digest"] for layer in manifest["layers"])
        self.module = layer
        self.new = f"{bench.repository}/by-{cell.tool}"
        bench.peers.env |= {
            "IMAGE": image,
            "LAYER": f"{repository}@{layer}",
            "NEW": self.new,
            "HOST": repository.partition("/")[0],
            "PORT": str(free_port("127.0.0.1")),
            "COSIGN_PASSWORD": "",
            "PATH": f"{program(cell.tool)[0].parent}{os.pathsep}{bench.peers.env['PATH']}",
        }
        (self.directory / "cosign.pub").write_text(outputs["public_key"])
        root = {"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}
        (self.directory / "root.json").write_text(json.dumps(root))
        config = bench.peers.run("crane", "blob", f"{repository}@{manifest['config']['digest']}").stdout
        (self.directory / "config.json").write_text(config)
        self.run(f"oras blob fetch --plain-http --output app.wasm {repository}@{layer}")

    def run(self, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as a shell does."""
        return self.bench.peers.run("sh", "-euc", command, check=check)


OURS = [cell for cell in CELLS if cell.is_ours]
THEIRS = [cell for cell in CELLS if cell.commands and not cell.is_ours]


def name(cell: Cell) -> str:
    """Name a cell in the report."""
    return cell.tool


@pytest.mark.parametrize("cell", [cell for cell in OURS if cell.tool != "wasmtime"], ids=name)
def test_a_tool_reads_what_the_program_pushed(bench: Bench, cell: Cell) -> None:
    with recorded(cell):
        desk = Desk(bench, cell)
        for command in cell.commands:
            desk.run(command)
        if "pulled.wasm" in cell.commands[-1]:
            pulled = (desk.directory / "pulled.wasm").read_bytes()
            assert f"sha256:{hashlib.sha256(pulled).hexdigest()}" == desk.module
        else:
            (desk.directory / "cosign.pub").write_text(generate_key().public_key)
            for command in cell.commands:
                assert desk.run(command, check=False).returncode != 0, "another key is refused"


@pytest.mark.parametrize("cell", THEIRS, ids=name)
def test_the_node_runs_what_a_tool_pushed_or_signed(bench: Bench, pod: str, cell: Cell) -> None:
    with recorded(cell):
        key = bench.own_key()
        image = bench.push(f"copy-{cell.tool}", flavour=cell.tool.encode())
        bench.peers.env["COPY"] = image
        desk = Desk(bench, cell)
        for command in cell.commands:
            desk.run(command)
        if "$NEW" in cell.commands[0]:
            image = f"{desk.new}@{desk.run('crane digest $NEW:latest').stdout.strip()}"
            bench.sign(image, key)
        run_image(bench.stack, pod, image)
        namespace = bench.stack.outputs()["namespace"]
        bench.stack.kubectl("wait", "--for=condition=Ready", f"pod/{pod}", "-n", namespace, "--timeout=60s")


def test_wasmtime_serves_the_module_that_the_node_serves(bench: Bench) -> None:
    (cell,) = (cell for cell in OURS if cell.tool == "wasmtime")
    with recorded(cell), ExitStack() as ends:
        desk = Desk(bench, cell)
        (command,) = cell.commands
        served = ends.enter_context(
            subprocess.Popen(["sh", "-euc", f"exec {command}"], cwd=desk.directory, env=bench.peers.env)
        )
        ends.callback(served.terminate)
        url = f"http://127.0.0.1:{bench.peers.env['PORT']}/primorial/30"
        theirs = until(lambda: requests.get(url, timeout=5), "wasmtime to answer")
        assert theirs.text == bench.stack.get("/primorial/30").text
