"""What a build by cargo has read, as cargo and rustc report it, and whether all of that still is as it was.

Cargo's own dep-info names every file of the crate and of its path dependencies
(https://doc.rust-lang.org/cargo/reference/build-cache.html#dep-info-files), rustc's names the variables, and
the output of a build script what it asks to be run again for. What came from a registry is pinned by the lock
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

# Cargo takes these for targets of a package as soon as they are there.
DISCOVERED = ("build.rs", "src/lib.rs", "src/main.rs")
MISSING = "missing"


@dataclass(frozen=True)
class Inputs:
    """Files with the sum of their content, directories with that of their names, variables with their value.

    A file is named by its place relative to the crate where it belongs to the same checkout. `place` is the
    crate's own, where the result has it inside.
    """

    files: dict[str, str]
    variables: dict[str, str | None]
    place: str | None


def digest(path: Path) -> str:
    """Give the sha256 of a file's content, or of the names in a directory and below; MISSING for neither."""
    if path.is_dir():
        names = sorted(os.fsencode(found.relative_to(path)) for found in _below(path))
        return hashlib.sha256(b"\0".join(names)).hexdigest()
    if not path.is_file():
        return MISSING
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _below(directory: Path) -> Iterator[Path]:
    """Walk through a directory, links followed, but not through what cargo or git made there."""
    seen: set[str] = set()
    for parent, directories, names in os.walk(directory, followlinks=True):
        here = Path(parent)
        directories[:] = sorted(
            name for name in directories if name != ".git" and not (here / name / "CACHEDIR.TAG").is_file()
        )
        if os.path.realpath(parent) in seen:  # a link to a directory above itself
            directories.clear()
            continue
        seen.add(os.path.realpath(parent))
        yield from (here / name for name in sorted(names) if (here / name).is_file())


def unchanged(
    inputs: Inputs, crate: Path, environment: Mapping[str, str | None], digest_of: Callable[[Path], str]
) -> bool:
    """Say whether a build of the crate would read today what it read then."""
    return (
        inputs.place in (None, str(crate))
        and all(environment.get(name) == value for name, value in inputs.variables.items())
        and all(
            digest_of(Path(os.path.normpath(crate / name))) == sum_ for name, sum_ in inputs.files.items()
        )
    )


@dataclass(frozen=True)
class Build:
    """What one run of cargo has left: its messages, and its result with the dep-info beside that.

    `workspace` has the lock file, `outputs` is cargo's target directory, `environment` what cargo ran in.
    """

    messages: list[dict[str, Any]]
    result: Path
    workspace: Path
    crate: Path
    outputs: Path
    environment: Mapping[str, str | None]

    def local_packages(self) -> set[Path]:
        """Give the directories of the crate and of its path dependencies."""
        return {Path(message["manifest_path"]).parent for message in self.local_artifacts()}

    def local_artifacts(self) -> list[dict[str, Any]]:
        """Give cargo's messages about what is compiled from the crate and its path dependencies."""
        return local_artifacts(self.messages)


def messages_of(output: str) -> list[dict[str, Any]]:
    """Read what cargo prints with `--message-format json`."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def local_artifacts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give those of cargo's messages that are about what is compiled from path dependencies or the crate."""
    return [
        message
        for message in messages
        if message["reason"] == "compiler-artifact"
        and message["package_id"].startswith("path+file:")
        # -Zbuild-std compiles the standard library, which is the compiler's.
        and "/rustlib/src/" not in message["manifest_path"]
    ]


def collect(build: Build) -> Inputs | None:
    """Gather what a build has read.

    None is for one that cannot be told about: an input does not exist, which for cargo too is a reason to
    build again, or cargo has not left what is read here where it lay.
    """
    local = build.local_packages()
    anchor = Path(os.path.commonpath([_checkout(build.workspace), build.crate, *local]))
    asked, sources = _of_build_scripts(build, local), _of_sources(build)
    dep_info = build.result.with_suffix(".d")
    if asked is None or sources is None or not dep_info.is_file():
        return None
    named = {Path("/", name) for name in _makefile(dep_info)} | asked[0]
    paths = {Path(os.path.normpath(path)) for path in named}
    home = Path(build.environment.get("CARGO_HOME") or Path.home() / ".cargo")
    paths = {path for path in paths if not any(path.is_relative_to(made) for made in (build.outputs, home))}
    if not all(path.exists() for path in paths):
        return None
    for directory in [path for path in paths if path.is_dir()]:
        paths |= set(_below(directory))
    paths |= {build.workspace / "Cargo.toml", build.workspace / "Cargo.lock"}
    paths |= {package / name for package in local for name in DISCOVERED}
    # A package inherits from the manifest of its workspace, which may be another one than the crate's.
    above = {directory for package in local for directory in (package, *package.parents)}
    paths |= {directory / "Cargo.toml" for directory in above if directory.is_relative_to(anchor)}
    variables = {name: build.environment.get(name) for name in (*asked[1], *sources)}
    # A variable that cargo set, and that has the checkout's own place in it.
    is_bound = any(
        str(anchor) in value and name not in build.environment and name != "OUT_DIR"
        for name, value in sources.items()
    )
    files = {_label(path, build.crate, anchor): digest(path) for path in paths}
    return Inputs(files, variables, str(build.crate) if is_bound else None)


def _of_build_scripts(build: Build, local: set[Path]) -> tuple[set[Path], set[str]] | None:
    """Give the files and variables for which build scripts, also dependencies', are to be run again."""
    paths: set[Path] = set()
    variables: set[str] = set()
    for message in build.messages:
        if message["reason"] != "build-script-executed":
            continue
        output = Path(message["out_dir"]).parent / "output"
        if not output.is_file():
            return None
        text = output.read_text(encoding="utf-8", errors="surrogateescape")
        found = re.findall(r"^cargo::?rerun-if-(env-)?changed=(.*)$", text, re.MULTILINE)
        variables |= {name for env, name in found if env}
        files = [name for env, name in found if not env]
        package = Path(unquote(urlsplit(message["package_id"].removeprefix("path+")).path))
        if package in local:
            paths |= {package / name for name in files}
            if not found:
                paths.add(package)  # as cargo does for a script that asks for nothing
        else:
            # What lies in the package itself came from the registry with it.
            paths |= {Path(name) for name in files if name.startswith("/")}
    return paths, variables


def _of_sources(build: Build) -> dict[str, str] | None:
    """Give the variables that sources ask for, with the values that rustc saw."""
    variables: dict[str, str] = {}
    for message in build.local_artifacts():
        found = _variables(message)
        if found is None:
            return None
        variables |= found
    return variables


def _checkout(directory: Path) -> Path:
    return next((above for above in (directory, *directory.parents) if (above / ".git").exists()), directory)


def _label(path: Path, crate: Path, anchor: Path) -> str:
    return os.path.relpath(path, crate) if path.is_relative_to(anchor) else str(path)


def _makefile(path: Path) -> list[str]:
    """Read what the one target of a makefile depends on; a space in a name has a backslash before it."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()[0].partition(": ")[2]
    return [word.replace("\\ ", " ") for word in re.split(r"(?<!\\) ", text) if word]


def _variables(message: dict[str, Any]) -> dict[str, str] | None:
    """Read from rustc's dep-info which variables a crate's sources ask for; None when there is none.

    The name of that file has a hash that cargo does not tell for every artifact: those of all builds of a
    crate by this name are read, and a name too many does no harm.
    """
    crate = str(message["target"]["name"]).replace("-", "_")
    found: dict[str, str] = {}
    is_known = False
    for directory in {Path(name).parent for name in message["filenames"]}:
        for path in (*directory.glob("*.d"), *(directory / "deps").glob("*.d")):
            if re.sub(r"-[0-9a-f]{16}$", "", path.stem).replace("-", "_") != crate:
                continue
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            # Cargo's own, beside the result, has no such lines and is one line long.
            is_known = is_known or len(text.splitlines()) > 1
            for line in re.findall(r"^# env-dep:(.*)$", text, re.MULTILINE):
                name, _, value = line.partition("=")
                found[name] = value
    return found if is_known else None


def write(inputs: Inputs, path: Path, built: dict[str, Any]) -> None:
    """Write inputs and what was built from them."""
    write_json({"inputs": vars(inputs), "built": built}, path)


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, sort_keys=True))
    scratch.replace(path)


def read(path: Path) -> tuple[Inputs, dict[str, Any]] | None:
    """Read what `write` has written; None for a file that is none of these."""
    try:
        found = json.loads(path.read_text())
        return Inputs(**found["inputs"]), found["built"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
