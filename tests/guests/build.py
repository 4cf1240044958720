"""Builds the guests of the agent's tests: `python -m tests.guests.build [--version V] [NAME…]`.

Each is built once per machine. Rust guests are compiled as the program compiles its app, `wat/*.wat` is
assembled, and two files are broken on purpose. README.md says what each is for.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
from pathlib import Path

import wasmtime

from components.providers import cache_directory, cargo
from components.providers.compiler import WASM_TARGET, CargoError

HERE = Path(__file__).resolve().parent
RUST = ("cli-guest", "http-guest")
WAT = tuple(sorted(path.stem for path in (HERE / "wat").glob("*.wat")))
# Not WebAssembly, and WebAssembly that ends in the middle.
BROKEN = ("garbage", "truncated")
NAMES = (*RUST, *WAT, *BROKEN)


def build(name: str, version: str = "1") -> Path:
    """Give the path of a guest, built if it is not in the cache.

    A Rust guest tells its version when asked, and so has another digest for each. Raises KeyError for a name
    that is not in NAMES, CargoError when one does not compile.
    """
    if name not in NAMES:
        raise KeyError(f"no guest {name!r}; there are {', '.join(NAMES)}")
    if name in RUST:
        variables = {"GUEST_VERSION": version}
        return Path(cargo.build(HERE, WASM_TARGET, example=name, variables=variables).path)
    if name in WAT:
        content = bytes(wasmtime.wat2wasm((HERE / "wat" / f"{name}.wat").read_text()))
    elif name == "garbage":
        content = random.Random(name).randbytes(4096)  # noqa: S311 - the same bytes every time
    else:
        whole = build("cli-guest", version).read_bytes()
        content = whole[: len(whole) // 2]
    key = hashlib.sha256(content).hexdigest()
    path = cache_directory() / "builds" / key / f"{name}.wasm"
    if not path.is_file():
        _keep(content, path)
    return path


def _keep(content: bytes, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    shutil.move(file.name, path)


def main() -> int:
    """Build guests, all if none is named, and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m tests.guests.build", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*NAMES, []], help=", ".join(NAMES))
    parser.add_argument("--version", default="1", help="what the Rust guests answer when asked for theirs")
    arguments = parser.parse_args()
    try:
        for name in arguments.names or NAMES:
            sys.stdout.write(f"{build(name, arguments.version)}\n")
    except CargoError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
