"""Which compiler makes what, with which flags: those of the configuration and the environment, and ours."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.providers import ProviderError, zig

WASM_TARGET = "wasm32-unknown-unknown"
# As cargo-zigbuild writes it: a Rust target, and the oldest glibc that the program is to run with.
GNU_TARGET = re.compile(r"([a-z0-9_]+-[a-z0-9_]+-linux-gnu)(?:\.(\d+\.\d+))?")
# Debian's own compiler for the web, for machines where rustup cannot bring the target.
DEBIAN_RUSTC = Path("/usr/bin/rustc")
DEBIAN_PACKAGES = "rustc-web rust-web-src"
ERROR_LINES = 40
# What decides about nothing that is compiled: where cargo writes, what it shows, how it downloads.
UNRELATED_TABLES = re.compile(
    r"alias|cargo-new|credential-alias|doc|future-incompat-report|http|install|net|registr(ies|y)|source|term|cache"
)
UNRELATED_BUILD_KEYS = {"jobs", "target", "target-dir", "build-dir", "dep-info-basedir"}
UNRELATED_VARIABLES = re.compile(
    r"CARGO|RUSTUP_.*|RUST_(BACKTRACE|LOG|LIB_BACKTRACE)|CARGO_(HOME|LOG|TARGET_DIR)"
    r"|CARGO_(TERM|HTTP|NET|REGISTRY|REGISTRIES|ALIAS|INSTALL|CACHE)_.*"
    r"|CARGO_BUILD_(JOBS|TARGET|TARGET_DIR|BUILD_DIR|DEP_INFO_BASEDIR)"
)


class CargoError(ProviderError):
    """The crate cannot be built; the message ends with cargo's own.

    `output` is what the failed program printed on its standard output.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Toolchain:
    """How to compile for one target.

    `triple` is the target's full name, `facts` what decides about the result beside the sources: what
    `rustc -vV` says, configuration, variables. A variable of `environment` that is None is unset. `glibc` is
    the newest that the program may need, "" for this machine's; `tools` has the toolchain's own programs.
    """

    triple: str
    arguments: tuple[str, ...]
    environment: dict[str, str | None]
    facts: tuple[str, ...]
    command: tuple[str, ...] = ("cargo", "build")
    glibc: str = ""
    tools: Path = Path()


def run(arguments: list[str], cwd: Path, environment: Mapping[str, str | None] | None = None) -> str:
    """Run a program and return its standard output; a variable that is None is unset for it.

    Raises CargoError with the end of its standard error when it is missing or fails.
    """
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env={name: value for name, value in variables.items() if value is not None},
            capture_output=True,
            # Of the tools, whatever the terminal's own encoding is; a file name may be anything.
            encoding="utf-8",
            errors="backslashreplace",
            check=False,
        )
    except FileNotFoundError:
        raise CargoError(
            f"{arguments[0]} is not on PATH: install Rust with rustup (https://rustup.rs)"
        ) from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-ERROR_LINES:])
        raise CargoError(f"`{' '.join(arguments[:3])}` failed in {cwd.name}:\n{tail}", done.stdout)
    return done.stdout


def configuration(crate: Path) -> dict[str, Any]:
    """Give cargo's merged configuration for a crate: that of all directories above it and of cargo's home.

    Cargo alone knows which files those are, and what they include. The command is an unstable one, which a
    stable cargo runs for the sake of RUSTC_BOOTSTRAP; nothing is compiled with that variable.
    """
    command = ["cargo", "-Zunstable-options", "config", "get", "--format", "json"]
    found: dict[str, Any] = json.loads(run(command, crate, {"RUSTC_BOOTSTRAP": "1"}))
    return found


def host(crate: Path) -> str:
    """Give the Rust target of this machine. To ask for it by name is to ask for nothing."""
    return _fact(run(["rustc", "-vV"], crate), "host")


def toolchain_for(crate: Path, target: str = "", outputs: Path = Path()) -> Toolchain:
    """Find out how to compile a crate for a target ("" is this machine) in a directory of cargo's.

    For a Linux that is not this machine's, or with a glibc that is named: zig links. What the compiler has no
    standard library for: the one that rustup can add, else Debian's compiler and sources for the web. Raises
    CargoError that names the command to run when there is neither.
    """
    settings = configuration(crate)
    compiler = _compiler(settings)
    version = run([compiler, "-vV"], crate)
    if target == WASM_TARGET:
        return _for_wasm(crate, settings, compiler, version)
    gnu = GNU_TARGET.fullmatch(target)
    if gnu and (gnu.group(2) or target != _fact(version, "host")):
        library = _library(crate, compiler, version, gnu.group(1), "panic_unwind")
        return _for_linux(crate, settings, library, gnu, outputs)
    triple = target or _fact(version, "host")
    is_host = triple == _fact(version, "host")
    # What the user set for other crates is not what was asked for here. Without a target cargo shares what it
    # compiles with `cargo test`, so one is named only where the configuration does, which no variable undoes.
    named = not is_host or "target" in settings.get("build", {})
    libc = " ".join(platform.libc_ver()) if is_host else ""
    return Toolchain(
        triple,
        ("--target", triple) if named else (),
        {"CARGO_BUILD_TARGET": None},
        (version, libc, *_decisive(crate, settings)),
    )


@dataclass(frozen=True)
class _Library:
    """The compiler that has a standard library for a target, and what it takes to use that.

    `place` is what stands for the library's sources in what is compiled.
    """

    compiler: str
    version: str
    tools: Path
    place: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _library(crate: Path, compiler: str, version: str, target: str, panic: str) -> _Library:
    sysroot = Path(run([compiler, "--print", "sysroot"], crate).strip())
    tools = sysroot / "lib" / "rustlib" / _fact(version, "host") / "bin"
    if _has_library(sysroot, target) or _add_library(crate, sysroot, target):
        # A toolchain with the sources of std installed would write their place into panic messages.
        place = f"{sysroot}/lib/rustlib/src/rust=/rustc/{_fact(version, 'commit-hash')}"
        return _Library(compiler, version, tools, place)
    library = _debian_library(crate, target)
    debian = str(DEBIAN_RUSTC)
    return _Library(
        debian,
        run([debian, "-vV"], crate),
        tools,
        f"{library}=/rust",
        (f"-Zbuild-std=std,{panic}",),
        (("RUSTC", debian), ("RUSTC_BOOTSTRAP", "1")),
    )


def _remapped(crate: Path, *others: str) -> list[str]:
    """Give the flags by which the same sources in another directory give the same bytes.

    Of several prefixes that match, the last one is used: a file is named by its place relative to the crate,
    also a dependency beside it.
    """
    places = [f"{directory}=/build{level or ''}" for level, directory in enumerate(crate.parents)][-2::-1]
    return [f"--remap-path-prefix={place}" for place in (*places, f"{_cargo_home()}=/cargo", *others)]


def _for_linux(
    crate: Path, settings: dict[str, Any], library: _Library, gnu: re.Match[str], outputs: Path
) -> Toolchain:
    triple, glibc = gnu.group(1), gnu.group(2) or zig.OLDEST_GLIBC
    packages = zig.installed()
    # What build scripts write lies in cargo's directory.
    remapped = _remapped(crate, f"{outputs}=/target", library.place)
    flags = [*_users_flags(crate, settings, library.compiler, triple), *remapped]
    # The compiler's own machine is none of the result's affair: it is the same from each.
    told = "\n".join(line for line in library.version.splitlines() if not line.startswith("host: "))
    return Toolchain(
        triple,
        ("--target", f"{triple}.{glibc}", *library.arguments),
        {
            "CARGO_BUILD_TARGET": None,
            "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags),
            # Zig's linker knows to strip all or nothing; what is stripped goes into a file of its own.
            "CARGO_PROFILE_RELEASE_STRIP": "none",
            **dict(library.environment),
            **zig.environment(packages),
        },
        (told, glibc, packages.name, *_decisive(crate, settings)),
        (str(packages / "bin" / "cargo-zigbuild"), "zigbuild"),
        glibc,
        library.tools,
    )


def _for_wasm(crate: Path, settings: dict[str, Any], compiler: str, version: str) -> Toolchain:
    library = _library(crate, compiler, version, WASM_TARGET, "panic_abort")
    flags = [
        *_users_flags(crate, settings, library.compiler, WASM_TARGET),
        f"-Clinker={library.tools / 'wasm-component-ld'}",
        f"-Clink-arg=--wasm-ld-path={library.tools / 'gcc-ld' / 'wasm-ld'}",
        *_remapped(crate, library.place),
    ]
    environment: dict[str, str | None] = {
        "CARGO_BUILD_TARGET": None,
        "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags),
        **dict(library.environment),
    }
    # What rustc_wrapper.sh runs, where that takes its place.
    own = os.environ.get("RUSTC_WRAPPER") or os.environ.get("CARGO_BUILD_RUSTC_WRAPPER")
    environment["AWESOME_WASM_RUSTC_WRAPPER"] = own or settings.get("build", {}).get("rustc-wrapper")
    arguments = ("--target", WASM_TARGET, *library.arguments)
    return Toolchain(WASM_TARGET, arguments, environment, (library.version, *_decisive(crate, settings)))


def _compiler(settings: dict[str, Any]) -> str:
    named = os.environ.get("RUSTC") or os.environ.get("CARGO_BUILD_RUSTC")
    configured = str(settings.get("build", {}).get("rustc", "rustc"))
    # A relative path is one from the file that says it, which cargo does not tell; it is a fact all the same.
    return named or (configured if Path(configured).is_absolute() or "/" not in configured else "rustc")


def _decisive(crate: Path, settings: dict[str, Any]) -> list[str]:
    """List what of configuration, environment and toolchain files may decide about what is compiled."""
    tables = {name: table for name, table in settings.items() if not UNRELATED_TABLES.fullmatch(name)}
    build = {k: v for k, v in tables.pop("build", {}).items() if k not in UNRELATED_BUILD_KEYS}
    facts = [json.dumps({**tables, "build": build}, sort_keys=True)]
    for name, value in sorted(os.environ.items()):
        if name.startswith(("CARGO", "RUST")) and not UNRELATED_VARIABLES.fullmatch(name):
            facts.append(f"{name}={value}")
    for directory in (crate, *crate.parents):
        for name in ("rust-toolchain.toml", "rust-toolchain"):
            if (directory / name).is_file():
                # The file stands above the crate; how far above does not matter.
                return [*facts, (directory / name).read_text(encoding="utf-8", errors="backslashreplace")]
    return facts


def _users_flags(crate: Path, settings: dict[str, Any], compiler: str, target: str) -> list[str]:
    """Give the flags that cargo would compile for a target with, by its own order: ours come after them.

    https://doc.rust-lang.org/cargo/reference/config.html#buildrustflags
    """
    if "CARGO_ENCODED_RUSTFLAGS" in os.environ:
        return [flag for flag in os.environ["CARGO_ENCODED_RUSTFLAGS"].split("\x1f") if flag]
    if "RUSTFLAGS" in os.environ:
        return os.environ["RUSTFLAGS"].split()
    tables: dict[str, Any] = settings.get("target", {})
    facts: set[str] = set()
    if any(name.startswith("cfg(") for name in tables):
        facts = set(run([compiler, "--print", "cfg", "--target", target], crate).splitlines())
    flags = _list(tables.get(target, {}).get("rustflags", []))
    flags += os.environ.get(f"CARGO_TARGET_{target.upper().replace('-', '_')}_RUSTFLAGS", "").split()
    for name, table in tables.items():
        if name.startswith("cfg(") and holds(name, facts):
            flags += _list(table.get("rustflags", []))
    if flags:
        return flags
    return (
        _list(settings.get("build", {}).get("rustflags", []))
        + os.environ.get("CARGO_BUILD_RUSTFLAGS", "").split()
    )


def _list(value: str | list[str]) -> list[str]:
    return value.split() if isinstance(value, str) else list(value)


def holds(expression: str, facts: set[str]) -> bool:
    """Say whether `cfg(…)` holds for a target of which `rustc --print cfg` gives these lines."""
    tokens = re.findall(r'"[^"]*"|\w+|[(),=]', expression)
    kinds: dict[str, Callable[[list[bool]], bool]] = {
        "cfg": all,
        "all": all,
        "any": any,
        "not": lambda found: not any(found),
    }

    def predicate() -> bool:
        name = tokens.pop(0)
        if tokens[:1] == ["="]:
            tokens.pop(0)
            return f"{name}={tokens.pop(0)}" in facts
        if tokens[:1] != ["("]:
            return name == "true" or name in facts
        tokens.pop(0)
        found = []
        while tokens[0] != ")":
            found.append(predicate())
            if tokens[0] == ",":
                tokens.pop(0)
        tokens.pop(0)
        return kinds[name](found)

    try:
        return predicate()
    except (IndexError, KeyError):
        return False  # cargo itself refuses it, with the place


def _fact(version: str, name: str) -> str:
    for line in version.splitlines():
        if line.startswith(f"{name}: "):
            return line.removeprefix(f"{name}: ")
    raise CargoError(f"`rustc -vV` does not tell its {name}")


def _cargo_home() -> Path:
    return Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")


def _has_library(sysroot: Path, target: str) -> bool:
    return any((sysroot / "lib" / "rustlib" / target / "lib").glob("libstd-*"))


def _add_library(crate: Path, sysroot: Path, target: str) -> bool:
    if shutil.which("rustup") is None:
        return False
    subprocess.run(["rustup", "target", "add", target], cwd=crate, capture_output=True, check=False)
    return _has_library(sysroot, target)


def _debian_library(crate: Path, target: str) -> Path:
    """Give the directory of the standard library's sources that belong to Debian's compiler."""
    if DEBIAN_RUSTC.is_file():
        sysroot = Path(run([str(DEBIAN_RUSTC), "--print", "sysroot"], crate).strip())
        library = sysroot / "lib" / "rustlib" / "src" / "rust"
        if (library / "library" / "std" / "Cargo.toml").is_file():
            return library
    raise CargoError(
        f"there is no standard library for {target}: run `rustup target add {target}`, "
        f"or on Debian `apt-get install {DEBIAN_PACKAGES}` as root"
    )
