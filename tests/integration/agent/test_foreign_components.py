"""Components of other toolchains, built from their packages: Python's and JavaScript's are served.

Both bring an interpreter (18 and 13 MB) and import all of WASI 0.2, sockets too, used or not.
Each is built once per machine; where its package cannot be had, the test is skipped and says why.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import requests

from components.providers import cache_directory
from tests.integration.agent.harness import Workspace, layout
from tests.integration.conftest import REPOSITORY

GUESTS = REPOSITORY / "tests" / "guests"
COMPONENTIZE_PY = "componentize-py==0.25.0"
COMPONENTIZE_JS = "@bytecodealliance/componentize-js@0.23.0"
BUILD_SECONDS = 900
# What the agent may keep beside the code that is loaded: compiling happens in a process of its own.
KEPT = 192 << 20

PYTHON = """
from componentize_py_types import Ok
from wit_world import exports
from wit_world.imports.types import Fields, OutgoingBody, OutgoingResponse, ResponseOutparam


class IncomingHandler(exports.IncomingHandler):
    def handle(self, request, response_out):
        incoming = request.consume()
        with incoming.stream() as stream:
            said = stream.blocking_read(4096)
        response = OutgoingResponse(Fields.from_list([("content-type", b"text/plain")]))
        body = response.body()
        ResponseOutparam.set(response_out, Ok(response))
        with body.write() as stream:
            stream.blocking_write_and_flush(b"python " + request.path_with_query().encode() + b" " + said)
        OutgoingBody.finish(body, None)
"""

JAVASCRIPT = """
addEventListener("fetch", (event) => event.respondWith((async () => {
  const { pathname, search } = new URL(event.request.url);
  return new Response(`javascript ${pathname}${search} ${await event.request.text()}`);
})()));
"""

# The engine of componentize-js exports the handler of this version, whatever the world asks for.
JAVASCRIPT_WASI = "0.2.10"


class UnavailableError(Exception):
    """The package cannot be installed here."""


def _install(command: Sequence[str | Path], directory: Path) -> None:
    try:
        _run(command, directory)
    except (OSError, subprocess.SubprocessError) as error:
        last = getattr(error, "stderr", None) or error
        raise UnavailableError(f"{command[0]} could not install {command[-1]}: {str(last)[-500:]}") from error


def _run(command: Sequence[str | Path], directory: Path, **environment: str) -> str:
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=True,
    ).stdout


def _wit(directory: Path, version: str = "") -> Path:
    """WASI's interfaces, from the crate that the Rust guests use, and the world wasi:http/proxy."""
    described = json.loads(_run(["cargo", "metadata", "--format-version=1", "--locked"], GUESTS))
    crate = next(package for package in described["packages"] if package["name"] == "wasip2")
    made = directory / "wit"
    shutil.copytree(Path(crate["manifest_path"]).parent / "wit" / "deps", made / "deps")
    http = (made / "deps" / "http.wit").read_text()
    present = http.split("package wasi:http@", 1)[1].split(";", 1)[0]
    version = version or present
    for file in (made / "deps").rglob("*.wit"):
        file.write_text(file.read_text().replace(present, version))
    (made / "world.wit").write_text(
        f"package guests:foreign;\n\nworld proxy {{\n  include wasi:http/proxy@{version};\n}}\n"
    )
    return made


def _python(directory: Path, output: Path) -> None:
    packages = directory / "packages"
    _install(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", packages, COMPONENTIZE_PY], directory
    )
    (directory / "app.py").write_text(PYTHON)
    tool = packages / "bin" / "componentize-py"
    command = [str(tool), "-d", str(_wit(directory)), "-w", "proxy", "componentize", "app", "-o", str(output)]
    _run(command, directory, PYTHONPATH=str(packages))


def _javascript(directory: Path, output: Path) -> None:
    (directory / "package.json").write_text('{"private": true}')
    _install(["npm", "install", "--no-audit", "--no-fund", "--silent", COMPONENTIZE_JS], directory)
    (directory / "app.js").write_text(JAVASCRIPT)
    tool = directory / "node_modules" / ".bin" / "componentize-js"
    wit = _wit(directory, JAVASCRIPT_WASI)
    _run([tool, "app.js", "--wit", wit, "--world-name", "proxy", "--out", output], directory)


def _built(language: str, build: Callable[[Path, Path], None]) -> bytes:
    """The component, from the cache or built."""
    inputs = [PYTHON, JAVASCRIPT, JAVASCRIPT_WASI, COMPONENTIZE_PY, COMPONENTIZE_JS]
    inputs += [inspect.getsource(_wit), inspect.getsource(build), (GUESTS / "Cargo.lock").read_text()]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    component = cache_directory() / "builds" / f"foreign-{key}" / f"{language}.wasm"
    if not component.is_file():
        with tempfile.TemporaryDirectory() as directory:
            made = Path(directory) / "made.wasm"
            try:
                build(Path(directory), made)
            except UnavailableError as error:
                pytest.skip(str(error))
            except subprocess.CalledProcessError as error:
                pytest.fail(f"{error}\n{error.stdout}\n{error.stderr}")
            component.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, component)
    return component.read_bytes()


@pytest.mark.parametrize(("language", "build"), [("python", _python), ("javascript", _javascript)])
def test_a_component_of_another_toolchain_is_served_and_leaves_no_compiler_behind(
    space: Workspace, language: str, build: Callable[[Path, Path], None]
) -> None:
    content = _built(language, build)
    image = space.registry.push(language, layout(content))
    before = space.agent.resident_bytes()
    pod = space.serve(image=image, resources={"limits": {"memory": "256Mi"}}).wait_ready(timeout=300)
    for number in range(3):
        answer = requests.post(f"{pod.url}/say?n={number}", data="hello", timeout=60)
        assert (answer.status_code, answer.text) == (200, f"{language} /say?n={number} hello")
    assert space.agent.resident_bytes() - before < 4 * len(content) + KEPT
