"""Builds a Rust crate with cargo: the same sources give the same file, and are compiled once per machine.

What is built lies in the cache under the hash of everything that decides about it, so that a second clone
with the same sources builds nothing. `python -m components.providers.cargo CRATE [--target T]` builds through
the same cache and prints the path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pulumi
from pulumi.dynamic import (
    CheckFailure,
    CheckResult,
    CreateResult,
    DiffResult,
    ReadResult,
    ResourceProvider,
    UpdateResult,
)

from components.providers import ProviderError, is_unknown, operation

WASM_TARGET = "wasm32-unknown-unknown"
# Debian's own compiler for the web, for machines where rustup cannot bring the target.
DEBIAN_RUSTC = Path("/usr/bin/rustc")
DEBIAN_PACKAGES = "rustc-web rust-web-src"
ERROR_LINES = 40
# Raised when the way of building changes in a manner that the other inputs do not show.
RECIPE = "1"


class CargoError(ProviderError):
    """The crate cannot be built; the message ends with cargo's own."""


@dataclass(frozen=True)
class Toolchain:
    """How to compile for one target: cargo arguments, environment, and what `rustc -vV` says."""

    version: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """A file that cargo made: absolute path, hex sha256 and size in bytes."""

    path: str
    sha256: str
    size: int


def cache_directory() -> Path:
    """Give the project's cache, `${XDG_CACHE_HOME:-~/.cache}/awesome-wasm`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path in this variable is invalid and is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "awesome-wasm"


def target_directory(target: str) -> Path:
    """Give cargo's directory for intermediate files; CARGO_TARGET_DIR is honoured.

    A component shares no object file with native code, so it has a directory of its own: cargo locks a whole
    one, and the app need not wait until the agent is compiled.
    """
    directory = Path(os.environ.get("CARGO_TARGET_DIR") or cache_directory() / "target")
    return directory / "components" if target == WASM_TARGET else directory


def run(arguments: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a program and return its standard output.

    Raises CargoError with the end of its standard error when it is missing or fails.
    """
    try:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise CargoError(
            f"{arguments[0]} is not on PATH: install Rust with rustup (https://rustup.rs)"
        ) from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-ERROR_LINES:])
        raise CargoError(f"`{' '.join(arguments[:3])}` failed in {cwd.name}:\n{tail}")
    return done.stdout


def source_files(crate: Path) -> list[Path]:
    """List the files that decide about the build: tracked or not ignored ones, and rust-toolchain.toml.

    Outside of a git checkout (a source archive) every file but cargo's own `target` counts.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        listed = subprocess.run(command, cwd=crate, capture_output=True, check=False)
    except FileNotFoundError:
        listed = None  # a source archive, on a machine without git
    if listed is not None and listed.returncode == 0:
        files = {crate / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name}
    else:
        files = {path for path in crate.rglob("*") if "target" not in path.relative_to(crate).parts}
    for directory in (crate, *crate.parents):
        for name in ("rust-toolchain.toml", "rust-toolchain"):
            if (directory / name).is_file():
                return sorted({path for path in files if path.is_file()} | {directory / name})
    return sorted(path for path in files if path.is_file())


def _names_in_checkout(crate: Path, files: list[Path]) -> list[tuple[str, Path]]:
    return sorted((os.path.relpath(path, crate), path) for path in files)


def source_hash(crate: Path, target: str, profile: str, toolchain: Toolchain) -> str:
    """Hash what decides about the file that cargo makes, hex; independent of where the checkout lies."""
    digest = hashlib.sha256()
    facts = [RECIPE, target, profile, toolchain.version, *toolchain.arguments]
    # Absolute directories in the flags are there to be taken out of the result; they decide about nothing.
    facts += [flag for flag in toolchain.flags if not flag.startswith(("--remap-path-prefix", "-Clink-arg"))]
    for fact in facts:
        digest.update(fact.encode() + b"\0")
    for name, path in _names_in_checkout(crate, source_files(crate)):
        # The toolchain file stands above the crate; how far above does not matter.
        label = Path(name).name if name.startswith("..") else name
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{label}\0{content}\0".encode())
    return digest.hexdigest()


def host(crate: Path) -> str:
    """Give the Rust target of this machine. To ask for it by name is to ask for nothing."""
    return _fact(run(["rustc", "-vV"], crate), "host")


def toolchain_for(crate: Path, target: str) -> Toolchain:
    """Find out how to compile for a target ("" is this machine).

    For wasm: the target that rustup has or can add, else Debian's compiler and sources for the web. Raises
    CargoError that names the command to run when there is neither.
    """
    version = run(["rustc", "-vV"], crate)
    if target != WASM_TARGET:
        arguments = ("--target", target) if target else ()
        # Native dependencies are big. They are compiled with the flags that `cargo test` uses, and so only
        # once.
        flags = os.environ.get("CARGO_ENCODED_RUSTFLAGS") or os.environ.get("RUSTFLAGS", "").replace(
            " ", "\x1f"
        )
        return Toolchain(version, arguments, {}, tuple(flag for flag in flags.split("\x1f") if flag))
    sysroot = Path(run(["rustc", "--print", "sysroot"], crate).strip())
    host = _fact(version, "host")
    tools = sysroot / "lib" / "rustlib" / host / "bin"
    flags_for_all = (
        f"-Clinker={tools / 'wasm-component-ld'}",
        f"-Clink-arg=--wasm-ld-path={tools / 'gcc-ld' / 'wasm-ld'}",
        f"--remap-path-prefix={crate.parent}=/build",
        f"--remap-path-prefix={_cargo_home()}=/cargo",
    )
    if _has_wasm_library(sysroot) or _add_wasm_library(crate, sysroot):
        # A toolchain with the sources of std installed would write their place on this machine into panic
        # messages.
        std = f"--remap-path-prefix={sysroot}/lib/rustlib/src/rust=/rustc/{_fact(version, 'commit-hash')}"
        return Toolchain(version, ("--target", target), {}, (*flags_for_all, std))
    return _debian_toolchain(crate, target, flags_for_all)


def _fact(version: str, name: str) -> str:
    for line in version.splitlines():
        if line.startswith(f"{name}: "):
            return line.removeprefix(f"{name}: ")
    raise CargoError(f"`rustc -vV` does not tell its {name}")


def _cargo_home() -> Path:
    return Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")


def _has_wasm_library(sysroot: Path) -> bool:
    return any((sysroot / "lib" / "rustlib" / WASM_TARGET / "lib").glob("libstd-*"))


def _add_wasm_library(crate: Path, sysroot: Path) -> bool:
    if shutil.which("rustup") is None:
        return False
    subprocess.run(["rustup", "target", "add", WASM_TARGET], cwd=crate, capture_output=True, check=False)
    return _has_wasm_library(sysroot)


def _debian_toolchain(crate: Path, target: str, flags: tuple[str, ...]) -> Toolchain:
    if not DEBIAN_RUSTC.is_file():
        raise _no_library(target)
    version = run([str(DEBIAN_RUSTC), "-vV"], crate)
    sysroot = Path(run([str(DEBIAN_RUSTC), "--print", "sysroot"], crate).strip())
    library = sysroot / "lib" / "rustlib" / "src" / "rust"
    if not (library / "library" / "std" / "Cargo.toml").is_file():
        raise _no_library(target)
    arguments = ("--target", target, "-Zbuild-std=std,panic_abort")
    environment = {"RUSTC": str(DEBIAN_RUSTC), "RUSTC_BOOTSTRAP": "1"}
    return Toolchain(version, arguments, environment, (*flags, f"--remap-path-prefix={library}=/rust"))


def _no_library(target: str) -> CargoError:
    return CargoError(
        f"there is no standard library for {target}: run `rustup target add {target}`, "
        f"or on Debian `apt-get install {DEBIAN_PACKAGES}` as root"
    )


def build(crate: Path, target: str = "", profile: str = "release") -> Built:
    """Build a crate, or take what an earlier build of the same sources left in the cache.

    `crate` is the directory of a Cargo.toml with a Cargo.lock. Raises CargoError.
    """
    crate = crate.resolve()
    target = "" if target == host(crate) else target
    toolchain = toolchain_for(crate, target)
    key = source_hash(crate, target, profile, toolchain)
    directory = cache_directory() / "builds" / key
    kept = [path for path in directory.glob("*") if path.is_file()]
    if kept:
        return measure(kept[0])
    made = _compile(crate, target, profile, toolchain)
    directory.mkdir(parents=True, exist_ok=True)
    # A directory of its own and a rename: a build that is killed half way leaves no half file under the final
    # name.
    with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
        copy = Path(scratch) / made.name
        shutil.copy2(made, copy)
        copy.replace(directory / made.name)
    return measure(directory / made.name)


def measure(path: Path) -> Built:
    """Give a file's absolute path, sha256 and size."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Built(str(path), digest.hexdigest(), path.stat().st_size)


def _compile(crate: Path, target: str, profile: str, toolchain: Toolchain) -> Path:
    environment = {
        **toolchain.environment,
        "CARGO_TARGET_DIR": str(target_directory(target)),
        "CARGO_TERM_COLOR": "never",
    }
    if toolchain.flags:
        environment["CARGO_ENCODED_RUSTFLAGS"] = "\x1f".join(toolchain.flags)
    output = run(
        [
            "cargo",
            "build",
            "--locked",
            "--profile",
            profile,
            "--message-format",
            "json-render-diagnostics",
            *toolchain.arguments,
        ],
        crate,
        environment,
    )
    manifest = str(crate / "Cargo.toml")
    for line in reversed(output.splitlines()):
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact" or message.get("manifest_path") != manifest:
            continue
        if message.get("executable"):
            return Path(message["executable"])
        for name in message["filenames"]:
            if name.endswith(".wasm"):
                return Path(name)
    raise CargoError(f"{crate.name} has neither a binary nor a cdylib: nothing to run came out of cargo")


class CargoBuildProvider(ResourceProvider):
    """CRUD of one cargo build; what is built stays in the cache, which no delete touches."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Build, so that a preview knows whether other bytes come out, and shows cargo's errors.

        What is in the cache already costs no time; what was removed from it is there again afterwards.
        """
        if any(is_unknown(news[key]) for key in ("crate", "target", "profile")):
            return CheckResult(news, [])
        crate = Path(news["crate"]).resolve()
        if not (crate / "Cargo.toml").is_file():
            return CheckResult(news, [CheckFailure("crate", f"{news['crate']} has no Cargo.toml")])
        if not (crate / "Cargo.lock").is_file():
            reason = f"{news['crate']} has no Cargo.lock: run `cargo generate-lockfile` there and commit it"
            return CheckResult(news, [CheckFailure("crate", reason)])
        try:
            built = build(crate, news["target"], news["profile"])
        except CargoError as error:
            return CheckResult(news, [CheckFailure("crate", str(error))])
        return CheckResult({**news, "sha256": built.sha256}, [])

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Other bytes are a change, and nothing else is: not a comment in a source, not another place."""
        is_there = Path(olds["path"]).is_file()
        return DiffResult(changes=not is_there or olds["sha256"] != news.get("sha256"))

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Build."""
        built = build(Path(props["crate"]), props["target"], props["profile"])
        return CreateResult(Path(props["crate"]).name, {**props, **asdict(built)})

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """The cache is not the cloud's: what is missing in it the next check builds again."""
        return ReadResult(id_, props)

    @operation
    def update(self, _id: str, _olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Build again."""
        built = build(Path(news["crate"]), news["target"], news["profile"])
        return UpdateResult({**news, **asdict(built)})


class CargoBuild(pulumi.dynamic.Resource, module="cargo", name="Build"):
    """A crate built with cargo."""

    path: pulumi.Output[str]
    sha256: pulumi.Output[str]
    size: pulumi.Output[int]

    def __init__(
        self,
        resource_name: str,
        crate: pulumi.Input[str],
        target: pulumi.Input[str] = "",
        profile: pulumi.Input[str] = "release",
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Build `crate` (a directory, relative to the program's) for `target` ("" is this machine)."""
        super().__init__(
            CargoBuildProvider(),
            resource_name,
            {
                "crate": crate,
                "target": target,
                "profile": profile,
                "path": None,
                "sha256": None,
                "size": None,
            },
            opts,
        )


def main() -> int:
    """Build a crate through the cache and print where the file is."""
    parser = argparse.ArgumentParser(prog="python -m components.providers.cargo", description=main.__doc__)
    parser.add_argument("crate", type=Path)
    parser.add_argument("--target", default="", help="a Rust target; default: this machine")
    parser.add_argument("--profile", default="release")
    arguments = parser.parse_args()
    try:
        sys.stdout.write(build(arguments.crate, arguments.target, arguments.profile).path + "\n")
    except CargoError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
