"""Which compiler is taken and what it is told; the tools are played by small programs."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.providers import cargo, compiler

VERSION = "rustc 1.95.0 (abc)\nhost: x86_64-unknown-linux-gnu\ncommit-hash: abc\n"
WASM_FACTS = {'target_arch="wasm32"', 'panic="abort"', "debug_assertions"}


def play(directory: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Put programs of these names, given as shell scripts, alone in front of PATH."""
    directory.mkdir(exist_ok=True)
    for name, text in programs.items():
        path = directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def rustc(sysroot: Path, version: str = VERSION) -> str:
    """Play rustc: what it tells of itself, where it lies, and what holds for wasm."""
    facts = shlex.quote("\n".join(WASM_FACTS))
    return f"case $2 in cfg) echo {facts};; sysroot) echo {sysroot};; *) printf '{version}';; esac"


def configured(settings: dict[str, Any]) -> str:
    """Play a cargo with this configuration."""
    return f"echo {shlex.quote(json.dumps(settings))}"


def test_without_the_wasm_library_the_commands_that_bring_it_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path), cargo="echo {}", rustup="exit 1")
    monkeypatch.setattr(compiler, "DEBIAN_RUSTC", tmp_path / "none")
    with pytest.raises(compiler.CargoError, match=r"rustup target add wasm32.*apt-get install rustc-web"):
        compiler.toolchain_for(tmp_path, compiler.WASM_TARGET)


def test_rustup_is_asked_for_the_wasm_library_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib/rustlib/wasm32-unknown-unknown/lib"
    rustup = f"mkdir -p {library} && touch {library}/libstd-1.rlib"
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path), cargo="echo {}", rustup=rustup)
    toolchain = compiler.toolchain_for(tmp_path, compiler.WASM_TARGET)
    assert toolchain.arguments == ("--target", compiler.WASM_TARGET)
    assert "RUSTC" not in toolchain.environment


def test_debian_s_compiler_builds_the_library_from_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian = tmp_path / "usr"
    (debian / "lib/rustlib/src/rust/library/std").mkdir(parents=True)
    (debian / "lib/rustlib/src/rust/library/std/Cargo.toml").write_text("")
    script = rustc(debian, VERSION.replace("1.95.0", "1.96.0"))
    play(tmp_path / "debian", monkeypatch, rustc=script)
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path / "none"), cargo="echo {}", rustup="exit 1")
    monkeypatch.setattr(compiler, "DEBIAN_RUSTC", tmp_path / "debian" / "rustc")
    toolchain = compiler.toolchain_for(tmp_path, compiler.WASM_TARGET)
    assert toolchain.environment["RUSTC"] == str(tmp_path / "debian" / "rustc")
    assert toolchain.environment["RUSTC_BOOTSTRAP"] == "1"
    assert "-Zbuild-std=std,panic_abort" in toolchain.arguments
    assert "1.96.0" in toolchain.facts[0]


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ('cfg(target_arch = "wasm32")', True),
        ('cfg(target_arch="x86_64")', False),
        ("cfg(debug_assertions)", True),
        ("cfg(unix)", False),
        ("cfg(true)", True),
        ('cfg(all(target_arch="wasm32", not(unix)))', True),
        ('cfg(any(unix, all(panic = "abort", target_arch="wasm32")))', True),
        ("cfg(not(any(unix, debug_assertions)))", False),
        ("cfg(all())", True),
        ("cfg(any())", False),
        ("cfg(all(unix", False),
        ("cfg(some(unix))", False),
    ],
)
def test_cfg_is_read_as_cargo_reads_it(expression: str, *, holds: bool) -> None:
    assert compiler.holds(expression, WASM_FACTS) is holds


WASM_TABLE = {"wasm32-unknown-unknown": {"rustflags": "-C triple"}}
CFG_TABLE = {'cfg(target_arch="wasm32")': {"rustflags": ["-C", "cfg"]}}
OTHER_TABLE = {"cfg(unix)": {"rustflags": ["-C", "unix"]}}
BUILD = {"build": {"rustflags": ["-C", "build"]}}


@pytest.mark.parametrize(
    ("settings", "variables", "flags"),
    [
        ({}, {}, []),
        (BUILD, {}, ["-C", "build"]),
        ({**BUILD, "target": OTHER_TABLE}, {}, ["-C", "build"]),
        ({**BUILD, "target": CFG_TABLE}, {}, ["-C", "cfg"]),
        ({**BUILD, "target": {**WASM_TABLE, **CFG_TABLE}}, {}, ["-C", "triple", "-C", "cfg"]),
        (BUILD, {"CARGO_BUILD_RUSTFLAGS": "-C variable"}, ["-C", "build", "-C", "variable"]),
        (BUILD, {"CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS": "-C own"}, ["-C", "own"]),
        ({"target": WASM_TABLE}, {"RUSTFLAGS": " -C  all "}, ["-C", "all"]),
        ({}, {"RUSTFLAGS": "-C all", "CARGO_ENCODED_RUSTFLAGS": "--cfg\x1fa b"}, ["--cfg", "a b"]),
    ],
)
def test_the_user_s_flags_are_those_that_cargo_takes_and_ours_come_after_them(
    settings: dict[str, Any],
    variables: dict[str, str],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "lib/rustlib/wasm32-unknown-unknown/lib").mkdir(parents=True)
    (tmp_path / "lib/rustlib/wasm32-unknown-unknown/lib/libstd-1.rlib").touch()
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path), cargo=configured(settings))
    for name in ("RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = compiler.toolchain_for(tmp_path, compiler.WASM_TARGET).environment["CARGO_ENCODED_RUSTFLAGS"]
    assert given is not None
    found = given.split("\x1f")
    assert found[: len(flags)] == flags
    assert all(flag.startswith(("-Clink", "--remap-path-prefix=")) for flag in found[len(flags) :])


@pytest.mark.parametrize("where", ["variable", "configuration", "neither"])
def test_another_target_of_the_user_is_not_this_machine_s(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"build": {"target": "wasm32-unknown-unknown"}} if where == "configuration" else {}
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path), cargo=configured(settings))
    if where == "variable":
        monkeypatch.setenv("CARGO_BUILD_TARGET", "wasm32-unknown-unknown")
    toolchain = compiler.toolchain_for(tmp_path)
    assert toolchain.environment == {"CARGO_BUILD_TARGET": None}
    assert toolchain.triple == "x86_64-unknown-linux-gnu"
    named = ("--target", toolchain.triple) if where == "configuration" else ()
    assert toolchain.arguments == named
    assert toolchain == compiler.toolchain_for(tmp_path, toolchain.triple), "to name it is to name nothing"


@pytest.mark.parametrize("tool", ["rustc", "cargo"])
def test_a_tool_that_is_missing_is_named(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"rustc": rustc(tmp_path), "cargo": "echo {}"}
    del programs[tool]
    play(tmp_path / "bin", monkeypatch, **programs)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    with pytest.raises(compiler.CargoError, match=f"{tool} is not on PATH: install Rust"):
        compiler.toolchain_for(tmp_path)


def test_the_compiler_that_a_toolchain_file_names_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path), cargo="echo {}")
    crate = tmp_path / "checkout" / "app"
    crate.mkdir(parents=True)
    found = [compiler.toolchain_for(crate).facts]
    (crate.parent / "rust-toolchain.toml").write_text('[toolchain]\nchannel = "1.95.0"\n')
    found.append(compiler.toolchain_for(crate).facts)
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path, VERSION.replace("abc", "def")))
    found.append(compiler.toolchain_for(crate).facts)
    assert len(set(found)) == 3
    crate.parent.rename(tmp_path / "elsewhere")
    assert compiler.toolchain_for(tmp_path / "elsewhere" / "app").facts == found[-1]


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("CARGO_PROFILE_RELEASE_OPT_LEVEL", True),
        ("RUSTFLAGS", True),
        ("RUSTC_WRAPPER", True),
        ("CARGO_BUILD_RUSTC_WRAPPER", True),
        ("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER", True),
        ("CARGO_SOMETHING_NEW", True),
        ("CARGO_BUILD_TARGET", False),
        ("CARGO_TARGET_DIR", False),
        ("CARGO_TERM_VERBOSE", False),
        ("RUST_BACKTRACE", False),
    ],
)
def test_a_variable_of_cargo_s_decides_unless_it_is_known_not_to(
    name: str, *, decides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path / "bin", monkeypatch, rustc=rustc(tmp_path), cargo="echo {}")
    monkeypatch.delenv(name, raising=False)
    before = compiler.toolchain_for(tmp_path).facts
    monkeypatch.setenv(name, "1")
    assert (compiler.toolchain_for(tmp_path).facts != before) is decides


@pytest.mark.parametrize(
    ("package", "own", "given"),
    [
        ("/home/me/shared", "", "-C metadata=a-1.0-a -C opt-level=2 it's me.rs"),
        ("/home/me/shared", "echo", "echo -C metadata=a-1.0-a -C opt-level=2 it's me.rs"),
        ("/home/me/.cargo/registry/src/a", "", "-C metadata=7f -C opt-level=2 it's me.rs"),
        ("/usr/lib/rustlib/src/rust/library/std", "", "-C metadata=7f -C opt-level=2 it's me.rs"),
        (None, "", "-C metadata=7f -C opt-level=2 it's me.rs"),
    ],
)
def test_a_local_crate_is_identified_by_its_name_and_the_user_s_wrapper_still_runs(
    package: str | None, own: str, given: str
) -> None:
    variables = {
        "HOME": "/home/me",
        "CARGO_PKG_NAME": "a",
        "CARGO_PKG_VERSION": "1.0",
        "CARGO_CRATE_NAME": "a",
    }
    variables |= {"PATH": "/usr/bin:/bin", "AWESOME_WASM_RUSTC_WRAPPER": own}
    if package is not None:
        variables["CARGO_MANIFEST_DIR"] = package
    command = [str(cargo.WRAPPER), "echo", "-C", "metadata=7f", "-C", "opt-level=2", "it's me.rs"]
    answer = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert answer.stdout == given + "\n"
