"""Builds a Rust crate with cargo: the same sources give the same file, and are compiled once per machine.

What is built lies in the cache together with what cargo has read for it, so that a second clone with the same
sources builds nothing, and a change of anything that was read is seen.
`python -m components.providers.cargo CRATE [--target T]` builds through the same cache and prints the path.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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

from components.providers import (
    ProviderError,
    cache_directory,
    changed,
    freshness,
    inputs,
    is_unknown,
    operation,
    zig,
)
from components.providers.artifacts import interface
from components.providers.cache import place, read_built
from components.providers.compiler import WASM_TARGET, CargoError, Toolchain, run, toolchain_for

# Raised when the way of building changes in a manner that the other facts do not show.
RECIPE = "2"
WRAPPER = Path(__file__).resolve().with_name("rustc_wrapper.sh")
WASM = b"\0asm"
COMPONENT = WASM + b"\x0d\0\1\0"
# e_machine of ELF (https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html) and cputype of Mach-O.
ELF_MACHINES = {3: "i686", 62: "x86_64", 183: "aarch64", 243: "riscv64gc"}
MACH_CPUS = {0x01000007: "x86_64", 0x0100000C: "aarch64"}


# Of a crate's manifest, and what OCI calls it:
# https://github.com/opencontainers/image-spec/blob/main/annotations.md
ANNOTATIONS = {
    "version": "version",
    "description": "description",
    "license": "licenses",
    "repository": "source",
}


@dataclass(frozen=True)
class Built:
    """A file that cargo made: absolute path, hex sha256 and size in bytes.

    `read` is what was read for it, None when that cannot be told.
    """

    path: str
    sha256: str
    size: int
    read: inputs.Inputs | None = field(default=None, compare=False, repr=False)


def target_directory(target: str) -> Path:
    """Give cargo's directory for intermediate files; CARGO_TARGET_DIR is honoured.

    A component shares no object file with native code, so it has a directory of its own: cargo locks a whole
    one, and the app need not wait until the agent is compiled.
    """
    directory = Path(os.environ.get("CARGO_TARGET_DIR") or cache_directory() / "target").absolute()
    return directory / "components" if target == WASM_TARGET else directory


@dataclass(frozen=True)
class Chosen:
    """The one artifact that is wanted of a crate, in cargo's words, and the directory of its lock file.

    A crate is spread when it depends on a directory outside of its workspace. `annotations` are what its
    manifest says of it, by OCI's names.
    """

    package: str
    kind: str
    name: str
    workspace: Path
    is_spread: bool
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Give the arguments with which cargo builds this and nothing else."""
        return ["--package", self.package, f"--{self.kind}", *([] if self.kind == "lib" else [self.name])]

    def is_made_by(self, message: dict[str, Any]) -> bool:
        """Say whether a message of cargo tells of this artifact."""
        if message["reason"] != "compiler-artifact" or message["package_id"] != self.package:
            return False
        kinds, name = message["target"]["kind"], message["target"]["name"]
        return name == self.name and (self.kind in kinds or (self.kind == "lib" and "cdylib" in kinds))


def choose(crate: Path, target: str = "", example: str = "") -> Chosen:
    """Choose what to build of a crate: the library that becomes the component, else the one binary.

    Raises CargoError that says what to do when there is nothing or too much to choose from.
    """
    if not (crate / "Cargo.toml").is_file():
        raise CargoError(f"{crate} has no Cargo.toml")
    found = json.loads(run(["cargo", "metadata", "--no-deps", "--format-version", "1"], crate))
    workspace = Path(found["workspace_root"])
    manifests = {Path(package["manifest_path"]): package for package in found["packages"]}
    package = manifests.get(crate / "Cargo.toml")
    if package is None:
        members = ", ".join(sorted(os.path.relpath(manifest.parent, crate) for manifest in manifests))
        raise CargoError(
            f"{crate} is a workspace and no package: give the directory of a member, one of {members}"
        )
    if not (workspace / "Cargo.lock").is_file():
        raise CargoError(f"{workspace} has no Cargo.lock: run `cargo generate-lockfile` there and commit it")
    places = [
        Path(one["path"]) for member in found["packages"] for one in member["dependencies"] if "path" in one
    ]
    is_spread = not all(place.is_relative_to(workspace) for place in places)
    annotations = {
        f"org.opencontainers.image.{name}": " ".join(package[key].split())
        for key, name in ANNOTATIONS.items()
        if package.get(key)
    }
    if example:
        return Chosen(package["id"], "example", example, workspace, is_spread)
    if target == WASM_TARGET:
        for one in package["targets"]:
            if "cdylib" in one["kind"]:
                return Chosen(package["id"], "lib", one["name"], workspace, is_spread, annotations)
    binaries = [one for one in package["targets"] if one["kind"] == ["bin"]]
    # One that asks for features is not built without them.
    names = [one["name"] for one in binaries if not one.get("required-features")]
    if package.get("default_run"):
        names = [package["default_run"]]
    if len(names) > 1:
        raise CargoError(
            f"{crate} has several binaries, {', '.join(sorted(names))}: "
            f'choose one by `default-run = "{min(names)}"` in [package] of its Cargo.toml'
        )
    if not names:
        raise CargoError(f"{crate} has neither a binary nor a cdylib: there is nothing to run")
    return Chosen(package["id"], "bin", names[0], workspace, is_spread, annotations)


def build(
    crate: Path,
    target: str = "",
    profile: str = "release",
    example: str = "",
    variables: dict[str, str] | None = None,
) -> Built:
    """Build a crate, or take what an earlier build left in the cache that would read the same today.

    `crate` is the directory of a package's Cargo.toml; with `example` that one is built in place of its
    binary or component. `variables` are added to the environment. Raises CargoError.
    """
    return job_for(crate, target, profile, example, variables).built()


def job_for(
    crate: Path,
    target: str = "",
    profile: str = "release",
    example: str = "",
    variables: dict[str, str] | None = None,
) -> Job:
    """Find out what there is to build; arguments and errors as `build`."""
    crate = crate.resolve()
    return Job(
        crate,
        choose(crate, target, example),
        toolchain_for(crate, target, target_directory(target)),
        profile,
        target_directory(target),
        {**os.environ, **(variables or {})},
    )


def _hash(*facts: str) -> str:
    return hashlib.sha256("\0".join(facts).encode(errors="surrogateescape")).hexdigest()


def _short(*facts: str) -> str:
    return _hash(*facts)[:12]


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    path = cache_directory() / "inputs" / f"{_hash(str(directory))}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Job:
    """One thing to build: `outputs` is cargo's target directory, `environment` the user's."""

    crate: Path
    chosen: Chosen
    toolchain: Toolchain
    profile: str
    outputs: Path
    environment: Mapping[str, str | None]

    @property
    def records(self) -> Path:
        """Give the directory of what builds have read that differ in nothing but that."""
        place = os.path.relpath(self.chosen.workspace, self.crate)
        facts = [RECIPE, self.chosen.kind, self.chosen.name, place, self.profile, self.toolchain.triple]
        if self.wrapper:
            facts.append(WRAPPER.read_text(encoding="utf-8"))
        return cache_directory() / "inputs" / _hash(*facts, *self.toolchain.arguments, *self.toolchain.facts)

    @property
    def wrapper(self) -> dict[str, str | None]:
        """Give what lets a component whose sources are spread be the same wherever they are."""
        is_needed = self.chosen.is_spread and self.toolchain.triple == WASM_TARGET
        return {"RUSTC_WRAPPER": str(WRAPPER)} if is_needed else {}

    def facts(self, built: Built) -> dict[str, str]:
        """Give what decided about the bytes, each part of it short; what cannot be told is unknown."""
        found = {"toolchain": self.toolchain.facts[0].partition("\n")[0]}
        found["configuration"] = _short(*self.toolchain.facts[1:])
        manifest = tomllib.loads((self.chosen.workspace / "Cargo.toml").read_text(encoding="utf-8"))
        profile = manifest.pop("profile", {}).get(self.profile, {})
        found["profile"] = " ".join(
            [self.profile, *(f"{key}={json.dumps(profile[key])}" for key in sorted(profile))]
        )
        found["lock file"] = _short((self.chosen.workspace / "Cargo.lock").read_text(encoding="utf-8"))
        if built.read is None:
            return {**found, "source": "unknown"}
        own = [
            os.path.relpath(self.chosen.workspace / name, self.crate) for name in ("Cargo.lock", "Cargo.toml")
        ]
        rest = json.dumps(manifest, sort_keys=True, default=str)
        files = (f"{name}={sum_}" for name, sum_ in sorted(built.read.files.items()) if name not in own)
        return {**found, "source": _short(rest, *files)}

    def built(self) -> Built:
        """Take the build from the cache, or make it."""
        kept = self.kept()
        if kept is not None:
            return kept
        # Cargo's own lock ends before the file is copied, and another clone's build would overwrite it.
        with _lock(self.outputs):
            return self.kept() or self.make()

    def kept(self) -> Built | None:
        """Give the file of the build that `recorded` finds."""
        found = self.recorded()
        return None if found is None else found[1]

    def recorded(self) -> tuple[Path, Built] | None:
        """Find the record of a build whose inputs are unchanged, and whose file is what it is said to be."""
        digest = functools.cache(inputs.digest)
        for path in sorted(self.records.glob("*.json")):
            record = inputs.read(path)
            if record is None or not inputs.unchanged(record[0], self.crate, self.environment, digest):
                continue
            file = place(record[1]["sha256"], record[1]["name"])
            if file.is_file() and not fault(file, self.toolchain.triple, self.toolchain.glibc):
                built = measure(file)
                if built.sha256 == record[1]["sha256"]:
                    return path, replace(built, read=record[0])
        return None

    def make(self) -> Built:
        """Let cargo build, keep the file, and record what was read for it."""
        memory = cache_directory() / "inputs" / f"{_hash(str(self.outputs))}.json"
        started = time.time_ns()
        try:
            build = self.compile()
            read = inputs.collect(build)
            doubtful = freshness.doubtful(build, read, self.records.name, memory)
        except CargoError as error:
            # Perhaps another clone's dependency, which has not what this one's sources want of it.
            doubtful = freshness.taken(error.output)
            if not doubtful:
                raise
            try:
                _touch(doubtful)
            except CargoError as why:
                raise CargoError(f"{error}\nPerhaps because {why}") from None
        if doubtful:
            _touch(doubtful)
            started = time.time_ns()
            build = self.compile()
            read = inputs.collect(build)
        kept = self.keep(build.result)
        built = {"name": build.result.name, "sha256": kept.sha256}
        # What was written while the compiler ran may have been read before or after.
        if read is not None and not any(_changed_since(started, self.crate / name) for name in read.files):
            inputs.write(read, self.records / f"{_hash(json.dumps(vars(read), sort_keys=True))}.json", built)
            freshness.remember(build, read, self.records.name, memory)
        return replace(kept, read=read)

    def keep(self, result: Path) -> Built:
        """Put what was built into the cache, and beside it the symbols of a program for other machines."""
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            made = Path(shutil.copy2(result, scratch))
            files = [made]
            if self.toolchain.glibc:
                files.append(zig.strip(made, self.toolchain.tools))
            wrong = fault(made, self.toolchain.triple, self.toolchain.glibc)
            if wrong:
                raise CargoError(f"what cargo made of {self.crate} is of no use: {wrong}")
            kept = place(measure(made).sha256, made.name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            # Renamed: what is killed half way leaves no half file under the final name.
            for file in reversed(files):
                file.replace(kept.with_name(file.name))
        return measure(kept)

    def compile(self) -> inputs.Build:
        """Run cargo."""
        command = [*self.toolchain.command, "--locked", "--profile", self.profile, *self.chosen.arguments]
        settings: dict[str, str | None] = {
            **self.environment,
            **self.toolchain.environment,
            **self.wrapper,
            "CARGO_TARGET_DIR": str(self.outputs),
            # Whatever the user's configuration says: what is written there is read here.
            "CARGO_BUILD_BUILD_DIR": str(self.outputs),
            "CARGO_BUILD_DEP_INFO_BASEDIR": "/",
            "CARGO_TERM_COLOR": "never",
        }
        command += [*self.toolchain.arguments, "--message-format", "json-render-diagnostics"]
        output = run(command, self.crate, settings)
        messages = inputs.messages_of(output)
        result = _result(messages, self.chosen)
        return inputs.Build(
            messages, result, self.chosen.workspace, self.crate, self.outputs, self.environment
        )


def _touch(sources: set[Path]) -> None:
    for path in sorted(sources):
        try:
            path.touch()
        except OSError as error:
            raise CargoError(
                f"cargo takes what it has made of {path} for fresh by the file's time, which cannot be set "
                f"({error.strerror}): run `touch` on it"
            ) from None


def _changed_since(moment: int, path: Path) -> bool:
    return path.exists() and path.stat().st_ctime_ns >= moment


def measure(path: Path) -> Built:
    """Give a file's absolute path, sha256 and size."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Built(str(path), digest.hexdigest(), path.stat().st_size)


def described(path: Path) -> str:
    """Say what a built file is by its first bytes."""
    with path.open("rb") as file:
        head = file.read(20)
    if head[:4] == WASM:
        return "a WebAssembly component" if head[:8] == COMPONENT else "a core WebAssembly module"
    if head[:4] == b"\x7fELF" and len(head) == 20:
        machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
        return f"an ELF file for {ELF_MACHINES.get(machine, machine)}"
    if head[:4] == b"\xcf\xfa\xed\xfe":
        cpu = int.from_bytes(head[4:8], "little")
        return f"a Mach-O file for {MACH_CPUS.get(cpu, cpu)}"
    return "no program"


def fault(path: Path, triple: str, glibc: str = "") -> str:
    """Say in which way a file is not what a Rust target and a glibc ask for; "" when it is."""
    architecture = triple.partition("-")[0]
    if triple == WASM_TARGET:
        wanted = "a WebAssembly component"
    elif "-linux-" in triple and architecture in ELF_MACHINES.values():
        wanted = f"an ELF file for {architecture}"
    elif "-apple-" in triple and architecture in MACH_CPUS.values():
        wanted = f"a Mach-O file for {architecture}"
    else:
        return ""
    found = described(path)
    if found != wanted:
        return f"{path} is {found}, and {wanted} was asked for"
    if triple != WASM_TARGET and not os.access(path, os.X_OK):
        return f"{path} may not be executed"
    symbol = zig.newer(path, glibc) if glibc else ""
    return f"{path} needs {symbol}, and a glibc {glibc} was asked for" if symbol else ""


def _result(messages: list[dict[str, Any]], chosen: Chosen) -> Path:
    for message in messages:
        if chosen.is_made_by(message):
            for name in [message["executable"]] if message["executable"] else message["filenames"]:
                if message["executable"] or name.endswith(".wasm"):
                    return Path(name)
    raise CargoError(f"nothing to run came out of cargo for {chosen.name}")


DESCRIBED = ("origin", "imports", "exports")


class CargoBuildProvider(ResourceProvider):
    """CRUD of one cargo build; what is built stays in the cache, which no delete touches."""

    serialize_as_secret_always = False

    @operation
    def check(self, olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Build, so that a preview knows what comes out, and shows cargo's errors.

        What is in the cache already costs no time; what was removed from it is there again afterwards. Of
        what the bytes were made, and what they import, is said when they change: a comment is no change.
        """
        if any(is_unknown(news[key]) for key in ("crate", "target", "profile")):
            return CheckResult(news, [])
        try:
            job = job_for(Path(news["crate"]), news["target"], news["profile"])
            built = job.built()
        except ProviderError as error:
            return CheckResult(news, [CheckFailure("crate", str(error))])
        said = {key: olds[key] for key in DESCRIBED if key in olds}
        if olds.get("sha256") != built.sha256 or "origin" not in said:
            said = {"origin": job.facts(built)}
            if job.toolchain.triple == WASM_TARGET:
                found = interface(read_built(built.sha256))
                said |= {"imports": list(found.imports), "exports": list(found.exports)}
        said["annotations"] = job.chosen.annotations
        return CheckResult({**news, "sha256": built.sha256, "size": built.size, **said}, [])

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Other bytes or another version are a change: not a comment in a source, not another place.

        An older program's state says where the file lay, which is nobody's business.
        """
        result = changed(olds, news, replace=set(), update={"sha256", "annotations"})
        return DiffResult(changes="path" in olds or result.changes)

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Take what the check has built."""
        return CreateResult(Path(props["crate"]).name, props)

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """The cache is not the cloud's: what is missing in it the next check builds again."""
        return ReadResult(id_, props)

    @operation
    def update(self, _id: str, _olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Take what the check has built."""
        return UpdateResult(news)


class CargoBuild(pulumi.dynamic.Resource, module="cargo", name="Build"):
    """A crate built with cargo; a component says what it `imports` and `exports`.

    `origin` has the sums of what the bytes were made from. The file is in the cache, under its sum.
    """

    crate: pulumi.Output[str]
    target: pulumi.Output[str]
    profile: pulumi.Output[str]
    sha256: pulumi.Output[str]
    size: pulumi.Output[int]
    annotations: pulumi.Output[dict[str, str]]

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
                "sha256": None,
                "size": None,
                "annotations": None,
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
    except ProviderError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
