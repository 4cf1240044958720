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

from components.providers.cargo import (
    WASM_TARGET,
    CargoError,
    Toolchain,
    cache_directory,
    run,
    source_hash,
    target_directory,
    toolchain_for,
)

HERE = Path(__file__).resolve().parent
RUST = ("cli-guest", "http-guest")
WAT = tuple(sorted(path.stem for path in (HERE / "wat").glob("*.wat")))
# Not WebAssembly, and WebAssembly that ends in the middle.
BROKEN = ("garbage", "truncated")
NAMES = (*RUST, *WAT, *BROKEN)


def build(name: str, version: str = "1") -> Path:
    """Give the path of a guest, built if it is not in the cache.

    Guests of one `version` lie in one directory as NAME.wasm. A Rust guest tells its version when asked, and
    so has another digest for each. Raises KeyError for a name that is not in NAMES, CargoError when one does
    not compile.
    """
    if name not in NAMES:
        raise KeyError(f"no guest {name!r}; there are {', '.join(NAMES)}")
    toolchain = toolchain_for(HERE, WASM_TARGET)
    sources = source_hash(HERE, WASM_TARGET, "release", toolchain)
    key = hashlib.sha256(f"{sources} {version}".encode()).hexdigest()
    path = cache_directory() / "builds" / f"guests-{key}" / f"{name}.wasm"
    if path.is_file():
        return path
    if name in RUST:
        for built in _compile(toolchain, version):
            _keep(built.read_bytes(), path.with_name(built.name.replace("_", "-")))
    elif name in WAT:
        _keep(bytes(wasmtime.wat2wasm((HERE / "wat" / f"{name}.wat").read_text())), path)
    elif name == "garbage":
        _keep(random.Random(name).randbytes(4096), path)  # noqa: S311 - the same bytes every time
    else:
        whole = build("cli-guest", version).read_bytes()
        _keep(whole[: len(whole) // 2], path)
    return path


def _compile(toolchain: Toolchain, version: str) -> list[Path]:
    """Compile the Rust guests; cargo notices by itself that GUEST_VERSION has changed."""
    environment = {
        **toolchain.environment,
        "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(toolchain.flags),
        "CARGO_TARGET_DIR": str(target_directory(WASM_TARGET)),
        "GUEST_VERSION": version,
    }
    run(["cargo", "build", "--release", "--locked", "--examples", *toolchain.arguments], HERE, environment)
    made = target_directory(WASM_TARGET) / WASM_TARGET / "release" / "examples"
    return [made / f"{name.replace('-', '_')}.wasm" for name in RUST]


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
