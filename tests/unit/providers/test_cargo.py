"""What decides about a build, and what comes of it; the compiler is played by small programs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pulumi
import pytest

from components.providers import cargo

VERSION = "rustc 1.95.0 (abc)\nhost: x86_64-unknown-linux-gnu\ncommit-hash: abc\n"
TOOLCHAIN = cargo.Toolchain(VERSION, (), {}, ("--remap-path-prefix=/home/somebody=/cargo",))


@pytest.fixture
def crate(tmp_path: Path) -> Path:
    """Make a crate in a git checkout, with a toolchain file above it."""
    directory = tmp_path / "checkout" / "app"
    (directory / "src").mkdir(parents=True)
    (directory / "Cargo.toml").write_text('[package]\nname = "app"\n')
    (directory / "Cargo.lock").write_text("version = 4\n")
    (directory / "src" / "main.rs").write_text("fn main() {}\n")
    (directory / ".gitignore").write_text("/target\n*.log\n")
    (directory.parent / "rust-toolchain.toml").write_text('[toolchain]\nchannel = "1.95.0"\n')
    subprocess.run(["git", "init", "-q"], cwd=directory.parent, check=True)
    return directory


def hashed(crate: Path, **changes: object) -> str:
    """Hash a crate with the usual toolchain, or one that differs."""
    toolchain = changes.get("toolchain", TOOLCHAIN)
    assert isinstance(toolchain, cargo.Toolchain)
    return cargo.source_hash(
        crate, str(changes.get("target", "")), str(changes.get("profile", "release")), toolchain
    )


def test_an_ignored_file_does_not_decide_about_the_build(crate: Path) -> None:
    before = hashed(crate)
    (crate / "target").mkdir()
    (crate / "target" / "app").write_text("object code")
    (crate / "build.log").write_text("noise")
    assert hashed(crate) == before


@pytest.mark.parametrize(
    "path", ["src/main.rs", "Cargo.toml", "Cargo.lock", "src/new.rs", "../rust-toolchain.toml"]
)
def test_a_source_the_lock_file_and_the_toolchain_file_decide(crate: Path, path: str) -> None:
    before = hashed(crate)
    (crate / path).write_text("something else\n")
    assert hashed(crate) != before


def test_target_profile_and_compiler_decide(crate: Path) -> None:
    other = cargo.Toolchain(VERSION.replace("1.95", "1.96"), (), {}, TOOLCHAIN.flags)
    hashes = {
        hashed(crate),
        hashed(crate, target="x86_64-unknown-linux-gnu"),
        hashed(crate, profile="dev"),
        hashed(crate, toolchain=other),
    }
    assert len(hashes) == 4


def test_the_place_of_the_checkout_and_of_cargo_s_home_does_not_decide(crate: Path) -> None:
    before = hashed(crate)
    moved = crate.parents[1] / "elsewhere"
    crate.parent.rename(moved)
    elsewhere = cargo.Toolchain(VERSION, (), {}, ("--remap-path-prefix=/home/nobody=/cargo",))
    assert hashed(moved / "app", toolchain=elsewhere) == before


def test_a_file_that_was_renamed_decides(crate: Path) -> None:
    before = hashed(crate)
    (crate / "src" / "main.rs").rename(crate / "src" / "other.rs")
    assert hashed(crate) != before


def test_a_crate_outside_of_git_is_hashed_by_all_its_files_but_cargo_s_target(crate: Path) -> None:
    subprocess.run(["rm", "-rf", ".git"], cwd=crate.parent, check=True)
    (crate / "target").mkdir()
    (crate / "target" / "app").write_text("object code")
    names = {path.name for path in cargo.source_files(crate)}
    assert names == {".gitignore", "Cargo.toml", "Cargo.lock", "main.rs", "rust-toolchain.toml"}


def play(directory: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Put programs of these names, given as shell scripts, alone in front of PATH."""
    directory.mkdir(exist_ok=True)
    for name, text in programs.items():
        path = directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.fixture
def compiler(crate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Play cargo and rustc; give the file in which each build of cargo leaves a line."""
    counter, made = tmp_path / "builds", tmp_path / "app.wasm"
    made.write_bytes(b"\0asm")
    message = json.dumps(
        {
            "reason": "compiler-artifact",
            "manifest_path": str(crate / "Cargo.toml"),
            "filenames": [str(made)],
            "executable": None,
        }
    )
    play(
        tmp_path / "bin",
        monkeypatch,
        rustc=f"printf '{VERSION}'",
        cargo=f"echo built >>{counter}\ncat <<'E'\n{message}\nE",
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return counter


def test_unchanged_sources_build_nothing(crate: Path, compiler: Path) -> None:
    first = cargo.build(crate)
    assert cargo.build(crate) == first
    assert compiler.read_text() == "built\n"
    (crate / "src" / "main.rs").write_text("fn main() { loop {} }\n")
    cargo.build(crate)
    assert compiler.read_text() == "built\nbuilt\n"


def test_what_is_built_is_kept_in_the_cache_with_sum_and_size(
    crate: Path, compiler: Path, tmp_path: Path
) -> None:
    built = cargo.build(crate)
    assert compiler.exists()
    assert Path(built.path).is_relative_to(tmp_path / "cache" / "awesome-wasm" / "builds")
    assert (built.size, built.sha256[:8]) == (4, "cd5d4935")


def test_cargo_s_own_message_becomes_the_error(
    crate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "; ".join(f"echo 'line {number}' >&2" for number in range(100))
    play(tmp_path / "bin", monkeypatch, rustc=f"printf '{VERSION}'", cargo=f"{lines}; exit 101")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(cargo.CargoError) as caught:
        cargo.build(crate)
    message = str(caught.value)
    assert "line 99" in message
    assert "line 59" not in message
    assert not (tmp_path / "cache" / "awesome-wasm" / "builds").exists()


def test_without_the_wasm_library_the_commands_that_bring_it_are_named(
    crate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysroot = tmp_path / "sysroot"
    sysroot.mkdir()
    play(
        tmp_path / "bin",
        monkeypatch,
        rustc=f"[ $1 = -vV ] && printf '{VERSION}' || echo {sysroot}",
        rustup="exit 1",
    )
    monkeypatch.setattr(cargo, "DEBIAN_RUSTC", tmp_path / "none")
    with pytest.raises(cargo.CargoError, match=r"rustup target add wasm32.*apt-get install rustc-web"):
        cargo.toolchain_for(crate, cargo.WASM_TARGET)


def test_rustup_is_asked_for_the_wasm_library_first(
    crate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysroot = tmp_path / "sysroot"
    library = sysroot / "lib/rustlib/wasm32-unknown-unknown/lib"
    play(
        tmp_path / "bin",
        monkeypatch,
        rustc=f"[ $1 = -vV ] && printf '{VERSION}' || echo {sysroot}",
        rustup=f"mkdir -p {library} && touch {library}/libstd-1.rlib",
    )
    toolchain = cargo.toolchain_for(crate, cargo.WASM_TARGET)
    assert toolchain.arguments == ("--target", cargo.WASM_TARGET)
    assert toolchain.environment == {}


def test_debian_s_compiler_builds_the_library_from_source(
    crate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian = tmp_path / "usr"
    (debian / "lib/rustlib/src/rust/library/std").mkdir(parents=True)
    (debian / "lib/rustlib/src/rust/library/std/Cargo.toml").write_text("")
    script = f"[ $1 = -vV ] && printf '{VERSION.replace('1.95.0', '1.96.0')}' || echo {debian}"
    play(tmp_path / "bin", monkeypatch, rustc=f"[ $1 = -vV ] && printf '{VERSION}' || echo {tmp_path}/none")
    play(tmp_path / "debian", monkeypatch, rustc=script)
    play(tmp_path / "bin", monkeypatch, rustup="exit 1")
    monkeypatch.setattr(cargo, "DEBIAN_RUSTC", tmp_path / "debian" / "rustc")
    toolchain = cargo.toolchain_for(crate, cargo.WASM_TARGET)
    assert toolchain.environment["RUSTC"] == str(tmp_path / "debian" / "rustc")
    assert toolchain.environment["RUSTC_BOOTSTRAP"] == "1"
    assert "-Zbuild-std=std,panic_abort" in toolchain.arguments
    assert "1.96.0" in toolchain.version


BUILD = {"target": "", "profile": "release"}


def test_check_builds_so_that_a_preview_knows_the_bytes(crate: Path, compiler: Path) -> None:
    provider, props = cargo.CargoBuildProvider(), {"crate": str(crate), **BUILD}
    made = provider.create(provider.check({}, props).inputs).outs
    assert made is not None
    # A comment: it is compiled again, and the same bytes come out.
    (crate / "src" / "main.rs").write_text("fn main() {} // nothing new\n")
    inputs = provider.check({}, props).inputs
    assert len(compiler.read_text().splitlines()) == 2
    assert provider.diff("app", made, inputs).changes is False
    assert provider.diff("app", made, {**inputs, "sha256": "another"}).changes is True


def test_a_build_that_is_gone_from_the_cache_is_made_again_and_is_no_change(
    crate: Path, compiler: Path
) -> None:
    provider, props = cargo.CargoBuildProvider(), {"crate": str(crate), **BUILD}
    made = provider.create(provider.check({}, props).inputs).outs
    assert made is not None
    Path(made["path"]).unlink()
    assert provider.read("app", made).id == "app"
    assert provider.diff("app", made, provider.check({}, props).inputs).changes is False
    assert Path(made["path"]).is_file()
    assert compiler.exists()


def test_what_cargo_says_is_what_a_preview_says(
    crate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = "echo 'error: it does not compile' >&2; exit 101"
    play(tmp_path / "bin", monkeypatch, cargo=refusal, rustc=f"printf '{VERSION}'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = cargo.CargoBuildProvider().check({}, {"crate": str(crate), **BUILD})
    assert "it does not compile" in result.failures[0].reason


def test_this_machine_s_own_target_is_no_other_build(crate: Path, compiler: Path) -> None:
    host = cargo.host(crate)
    assert cargo.build(crate, host) == cargo.build(crate, "")
    assert len(compiler.read_text().splitlines()) == 1


@pytest.mark.parametrize("missing", ["Cargo.toml", "Cargo.lock"])
def test_check_names_a_file_that_is_missing(crate: Path, missing: str) -> None:
    (crate / missing).unlink()
    result = cargo.CargoBuildProvider().check({}, {"crate": str(crate), "target": "", "profile": "release"})
    assert missing in result.failures[0].reason


def test_check_lets_what_is_unknown_pass() -> None:
    props = {"crate": pulumi.runtime.rpc.UNKNOWN, "target": "", "profile": "release"}
    assert cargo.CargoBuildProvider().check({}, props).inputs == props


def test_another_place_of_the_crate_is_no_change(tmp_path: Path) -> None:
    olds = {"crate": "a", "target": "", "profile": "release", "sha256": "1", "path": str(tmp_path / "x")}
    provider = cargo.CargoBuildProvider()
    assert provider.diff("id", olds, {**olds, "crate": "b"}).changes is True, "there is no file"
    (tmp_path / "x").touch()
    assert provider.diff("id", olds, {**olds, "crate": "b"}).changes is False
    result = provider.diff("id", olds, {**olds, "sha256": "2"})
    assert (result.changes, result.replaces) == (True, None)
