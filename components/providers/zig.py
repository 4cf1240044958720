"""Links programs for an older glibc than this machine's, or for another machine: zig, through cargo-zigbuild.

Both are packages of PyPI, pinned in zig.txt and installed into the cache when they are first needed: 400 MB
that no build for this machine asks for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from components.providers import ProviderError, cache_directory

LOCK_FILE = Path(__file__).with_name("zig.txt")
# That of Debian 11 and Ubuntu 20.04: programs for it run on every Debian and Ubuntu of the last years.
OLDEST_GLIBC = "2.31"

# Section types of an ELF file (https://refspecs.linuxbase.org/LSB_5.0.0/LSB-Core-generic/LSB-Core-generic/symversion.html).
_DYNSYM, _VERNEED, _VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF


def installed() -> Path:
    """Give the directory with both packages, made if it is missing. Raises ProviderError."""
    key = hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]
    directory = cache_directory() / "tools" / f"zig-{key}"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".zig-") as scratch:
                _install(Path(scratch) / "zig")
                (Path(scratch) / "zig").rename(directory)
    return directory


def _install(target: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
    ]
    command += ["--require-hashes", "--requirement", str(LOCK_FILE), "--target", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ProviderError(f"zig, which links for other machines, cannot be installed with pip:\n{said}")


def environment(directory: Path) -> dict[str, str | None]:
    """Give the variables with which cargo-zigbuild finds this zig, and writes into our cache alone."""
    scratch = cache_directory() / "zig"
    return {
        "CARGO_ZIGBUILD_ZIG_PATH": str(directory / "ziglang" / "zig"),
        "CARGO_ZIGBUILD_CACHE_DIR": str(scratch),
        "ZIG_GLOBAL_CACHE_DIR": str(scratch / "global"),
        "ZIG_LOCAL_CACHE_DIR": str(scratch / "local"),
    }


def versions(file: Path) -> Iterator[tuple[str, str]]:
    """Give the symbols that a 64-bit little-endian ELF file takes from libraries, each with its version.

    What is no such file has none. Raises ProviderError for one that is damaged.
    """
    content = file.read_bytes()
    if content[:6] != b"\x7fELF\2\1":
        return
    try:
        yield from _versions(content)
    except (struct.error, IndexError, ValueError) as error:
        raise ProviderError(f"{file} is no whole ELF file: {error}") from None


def _versions(content: bytes) -> Iterator[tuple[str, str]]:
    (start,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    # Each of type, offset, size, link and info.
    sections = [struct.unpack_from("<4xI16xQQII", content, start + size * i) for i in range(count)]
    of_type = {section[0]: section for section in sections}
    if not {_DYNSYM, _VERNEED, _VERSYM} <= of_type.keys():
        return

    def text(section: tuple[int, ...], offset: int) -> str:
        begin = sections[section[3]][1] + offset
        return content[begin : content.index(b"\0", begin)].decode("ascii", "replace")

    needed = of_type[_VERNEED]
    names: dict[int, str] = {}
    place = needed[1]
    for _ in range(needed[4]):
        entries, first, following = struct.unpack_from("<2xH4xII", content, place)
        entry = place + first
        for _ in range(entries):
            index, name, step = struct.unpack_from("<6xHII", content, entry)
            names[index] = text(needed, name)
            entry += step
        place += following
    symbols, indices = of_type[_DYNSYM], of_type[_VERSYM]
    for i in range(symbols[2] // 24):
        (name,) = struct.unpack_from("<I", content, symbols[1] + 24 * i)
        (index,) = struct.unpack_from("<H", content, indices[1] + 2 * i)
        if index & 0x7FFF in names:
            yield text(symbols, name), names[index & 0x7FFF]


def newer(file: Path, glibc: str) -> str:
    """Name the first symbol that a program needs of a newer glibc than this one, "" when there is none."""
    most = _numbers(glibc)
    for symbol, version in sorted(set(versions(file))):
        library, _, number = version.partition("_")
        if library == "GLIBC" and number[:1].isdigit() and _numbers(number) > most:
            return f"{symbol}@{version}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def strip(program: Path, tools: Path) -> Path:
    """Take the symbols out of a program into PROGRAM.debug, which a debugger finds by that name.

    `tools` is the directory of the Rust toolchain's own programs, whose objcopy knows every machine's files.
    """
    objcopy = tools / "rust-objcopy"
    # It is shipped without saying where its own library is: the compiler sets this for it too.
    variables = {**os.environ, "LD_LIBRARY_PATH": str(tools.parents[2])}
    debug = program.with_name(f"{program.name}.debug")
    for arguments in (
        ["--only-keep-debug", str(program), str(debug)],
        ["--strip-all", f"--add-gnu-debuglink={debug}", str(program)],
    ):
        try:
            subprocess.run([objcopy, *arguments], env=variables, capture_output=True, text=True, check=True)
        except OSError as error:
            raise ProviderError(f"{objcopy} cannot be run: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            raise ProviderError(f"{objcopy} {arguments[0]} of {program} failed: {error.stderr}") from None
    return debug
