"""Programs for an older glibc and for another machine, with the real zig; what they need is read off them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.providers import ProviderError, cache_directory, cargo, compiler, zig
from tests.unit.providers.test_compiler import VERSION, play, rustc

GNU = "x86_64-unknown-linux-gnu"
# A child process needs a new glibc where it is there; the file's name is in the panic's message.
SOURCE = """\
fn main() {
    let done = std::process::Command::new("true").status();
    assert!(done.is_ok_and(|status| status.success()), "the child failed");
    print!("{} {}", env!("CARGO_PKG_NAME"), include!(concat!(env!("OUT_DIR"), "/made.rs")));
}
"""
SCRIPT = """\
fn main() {
    let directory = std::env::var("OUT_DIR").unwrap();
    let text = "{ let made: Result<u8, u8> = Ok(7); made.expect(\\"made by a script\\") }";
    std::fs::write(format!("{directory}/made.rs"), text).unwrap();
}
"""
FILES = {
    "Cargo.toml": '[package]\nname = "program"\nversion = "0.1.0"\nedition = "2021"\n',
    "Cargo.lock": 'version = 4\n\n[[package]]\nname = "program"\nversion = "0.1.0"\n',
    "src/main.rs": SOURCE,
    "build.rs": SCRIPT,
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at this machine's own ELF files")


def needs(program: Path) -> set[tuple[str, str]]:
    """What binutils says that a program takes, and of which version."""
    shown = subprocess.run(["objdump", "-T", program], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\t[0-9a-f]{16} +\(?(\w[\w.]*)\)? +(\S+)$", shown, re.MULTILINE)
    return {(name, version) for version, name in found if version != "Base"}


@linux
@pytest.mark.parametrize("name", ["sh", "curl", "git", "cc", "python3"])
def test_what_a_program_needs_is_what_binutils_reads(name: str) -> None:
    program = Path(shutil.which(name) or pytest.skip(f"no {name} here")).resolve()
    found = set(zig.versions(program))
    assert found == needs(program)
    numbers = {version.removeprefix("GLIBC_") for _, version in found if version.startswith("GLIBC_2")}
    newest = max(numbers, key=lambda number: [int(part) for part in number.split(".")])
    assert zig.newer(program, newest) == ""
    refused = zig.newer(program, "2.1")
    assert tuple(refused.split("@")) in found
    assert zig.newer(program, "3") == ""


@linux
@pytest.mark.parametrize("length", [64, 100, 1000, -64])
def test_a_program_that_is_not_whole_is_said_to_be_so(length: int, tmp_path: Path) -> None:
    damaged = tmp_path / "program"
    damaged.write_bytes(Path(sys.executable).resolve().read_bytes()[:length])
    with pytest.raises(ProviderError, match="is no whole ELF file"):
        zig.newer(damaged, "2.31")


@pytest.mark.parametrize(
    ("target", "triple", "glibc"),
    [
        (f"{GNU}.2.31", GNU, "2.31"),
        (f"{GNU}.2.28", GNU, "2.28"),
        ("aarch64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "2.31"),
        ("aarch64-unknown-linux-gnu.2.36", "aarch64-unknown-linux-gnu", "2.36"),
        ("", GNU, ""),
        ("x86_64-unknown-linux-musl", "x86_64-unknown-linux-musl", ""),
    ],
)
def test_zig_links_for_a_glibc_that_is_named_and_for_another_linux(
    target: str, triple: str, glibc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def installed() -> Path:
        asked.append(tmp_path)
        return tmp_path

    monkeypatch.setattr(zig, "installed", installed)
    found = []
    for name, host in (("here", GNU), ("there", "aarch64-apple-darwin")):
        root = tmp_path / name
        for one in (GNU, "aarch64-unknown-linux-gnu"):
            (root / f"lib/rustlib/{one}/lib").mkdir(parents=True)
            (root / f"lib/rustlib/{one}/lib/libstd-1.rlib").touch()
        version = VERSION.replace(GNU, host)
        play(root / "bin", monkeypatch, rustc=rustc(root, version), cargo="echo {}")
        found.append(compiler.toolchain_for(tmp_path, target))
        if not target:  # another machine's is another
            found *= 2
            break
    here, there = found
    assert (here.triple, here.glibc) == (triple, glibc)
    assert bool(asked) is bool(glibc)
    if glibc:
        assert here.arguments == there.arguments == ("--target", f"{triple}.{glibc}")
        assert here.facts == there.facts, "from whatever machine, it is the same build"
    else:
        assert here.command == ("cargo", "build")
        assert compiler.toolchain_for(tmp_path, here.triple).command == ("cargo", "build")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this file's own, which has the user's zig and what zig has made."""
    directory = tmp_path_factory.mktemp("home")
    packages, scratch = zig.installed(), cache_directory() / "zig"
    scratch.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        (cache_directory() / "tools").mkdir(parents=True)
        (cache_directory() / "tools" / packages.name).symlink_to(packages)
        (cache_directory() / "zig").symlink_to(scratch)
        yield directory


def plant(root: Path) -> Path:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@linux
def test_the_same_sources_give_the_same_program_for_an_old_glibc_from_two_machines(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    for place in ("one", "another/and deeper"):
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(home / place / "cache"))
            patch.setenv("CARGO_TARGET_DIR", str(home / place / "target"))
            cache_directory().mkdir(parents=True)
            for name in ("tools", "zig"):
                (cache_directory() / name).symlink_to(home / "cache" / "awesome-wasm" / name)
            built.append(cargo.build(plant(home / place / "program"), f"{GNU}.2.31"))
    assert built[0].sha256 == built[1].sha256
    assert built[0].path != built[1].path
    program = Path(built[0].path)
    assert zig.newer(program, "2.31") == ""
    assert str(home).encode() not in program.read_bytes()
    assert not has_symbols(program)
    assert has_symbols(program.with_name("program.debug"))
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert said == "program 7"


def has_symbols(file: Path) -> bool:
    shown = subprocess.run(["objdump", "-t", file], capture_output=True, text=True, check=True).stdout
    return "no symbols" not in shown


@linux
def test_a_program_that_needs_a_newer_glibc_is_refused_with_the_symbol(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy2(Path(shutil.which("curl") or sys.executable).resolve(), program)
    head = cargo.described(program)
    assert "ELF" in head
    triple = f"{head.rsplit(' ', 1)[-1]}-unknown-linux-gnu"
    assert cargo.fault(program, triple, "2.99") == ""
    assert re.search(r"needs \w+@GLIBC_2\.\d+.*glibc 2\.1 was asked for", cargo.fault(program, triple, "2.1"))
