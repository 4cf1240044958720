"""What a build was made from: sums for a preview, SLSA provenance and a CycloneDX SBOM for whoever checks it.

Everything is a function of what was read, of the commit that last touched it and of the compiler: no clock,
no host and no path of this machine is in it, so that the same source gives the same bytes.
Sources: https://slsa.dev/spec/v1.0/provenance, https://cyclonedx.org/docs/1.6/json/ and
https://github.com/package-url/purl-spec.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from components.providers.artifacts import canonical
from components.providers.cargo import Built, Job
from components.providers.compiler import run

PROVENANCE = "https://slsa.dev/provenance/v1"
SBOM = "https://cyclonedx.org/bom"
BUILD_TYPE = "https://doc.rust-lang.org/cargo/commands/cargo-build.html"
# Whoever ran the program, on a machine that nobody vouches for.
OWN_MACHINE = "urn:awesome-wasm:pulumi-up"
Document = dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """The commit that last touched what was read, "" for none, and whether what was read is another."""

    name: str
    is_dirty: bool


def commit_of(crate: Path, files: Iterable[Path]) -> Commit | None:
    """Ask git about what was read for a crate; None when that is in no repository, as in an archive."""
    paths = sorted({os.path.realpath(path) for path in files})

    def git(*arguments: str) -> str | None:
        command = ["git", "--literal-pathspecs", "--no-optional-locks", *arguments]
        try:
            answer = subprocess.run(command, cwd=crate, capture_output=True, check=False)
        except OSError:
            return None
        return os.fsdecode(answer.stdout).rstrip("\n") if answer.returncode == 0 else None

    root = git("rev-parse", "--show-toplevel")
    inside = [path for path in paths if root and Path(path).is_relative_to(root)]
    if not inside:
        return None
    name = git("log", "-1", "--format=%H", "--", *inside)
    # What git ignores is in no commit either.
    changed = git("status", "--porcelain", "--ignored", "--untracked-files=all", "--", *inside)
    return Commit(name or "", not name or changed != "" or inside != paths)


def builder() -> str:
    """Name who builds: a workflow of GitHub's, or a machine that nobody vouches for."""
    variables = [os.environ.get(name) for name in ("GITHUB_SERVER_URL", "GITHUB_WORKFLOW_REF")]
    if os.environ.get("GITHUB_ACTIONS") == "true" and all(variables):
        return "/".join(map(str, variables))
    return OWN_MACHINE


@dataclass(frozen=True)
class Dependencies:
    """What cargo resolved for a package: the crates that are compiled into it, and on which each depends."""

    root: Document
    packages: tuple[Document, ...]
    needs: dict[str, tuple[str, ...]]
    checksums: dict[tuple[str, str, str | None], str]

    def checksum(self, package: Document) -> str | None:
        """Give the sum of a crate's file, which the lock file pins; None for a path dependency."""
        return self.checksums.get((package["name"], package["version"], package["source"]))


def dependencies(job: Job) -> Dependencies:
    """Ask cargo, for the target and without what only tests and build scripts need. Raises CargoError."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    found = json.loads(run([*command, "--filter-platform", job.toolchain.triple], job.crate))
    packages = {package["id"]: package for package in found["packages"]}
    needs = {
        node["id"]: tuple(
            sorted(dep["pkg"] for dep in node["deps"] if any(k["kind"] is None for k in dep["dep_kinds"]))
        )
        for node in found["resolve"]["nodes"]
    }
    seen, left = {job.chosen.package}, [job.chosen.package]
    while left:
        fresh = set(needs[left.pop()]) - seen
        seen |= fresh
        left += fresh
    others = sorted((packages[id_] for id_ in seen - {job.chosen.package}), key=purl)
    lock = tomllib.loads((job.chosen.workspace / "Cargo.lock").read_text(encoding="utf-8"))
    checksums = {
        (package["name"], package["version"], package.get("source")): package["checksum"]
        for package in lock.get("package", [])
        if "checksum" in package
    }
    return Dependencies(packages[job.chosen.package], tuple(others), needs, checksums)


def purl(package: Document) -> str:
    """Give the package URL of a crate; one from git says from where."""
    name = f"pkg:cargo/{quote(package['name'], safe='')}@{quote(package['version'], safe='')}"
    source = package.get("source") or ""
    return f"{name}?vcs_url={quote(source, safe='')}" if source.startswith("git+") else name


def provenance(job: Job, built: Built, resolved: Dependencies) -> Document:
    """Give SLSA's predicate: source, inputs with their sums, parameters and builder."""
    read = built.read
    files = {
        name: sum_
        for name, sum_ in sorted(read.files.items() if read else ())
        if (job.crate / name).is_file()
    }
    # Of a file outside of the checkout the name is enough; its place is this machine's.
    inputs = [
        {
            "name": quote(os.fsencode(Path(name).name if Path(name).is_absolute() else name)),
            "digest": {"sha256": sum_},
        }
        for name, sum_ in files.items()
    ]
    version = dict(line.partition(": ")[::2] for line in job.toolchain.facts[0].splitlines())
    rustc: Document = {
        "name": "rustc",
        "uri": f"pkg:generic/rustc@{quote(version.get('release', ''), safe='')}",
    }
    if len(version.get("commit-hash", "")) == 40:
        rustc["digest"] = {"gitCommit": version["commit-hash"]}
    crates = [
        {"uri": purl(package), "digest": {"sha256": sum_}}
        for package in resolved.packages
        if (sum_ := resolved.checksum(package))
    ]
    commit = commit_of(job.crate, (job.crate / name for name in files))
    source: list[Document] = []
    if commit and commit.name:
        source = [
            {
                "name": "source",
                "digest": {"gitCommit": commit.name},
                "annotations": {"dirty": commit.is_dirty},
            }
        ]
        if repository := resolved.root.get("repository"):
            source[0]["uri"] = f"git+{repository}"
    package = f"{resolved.root['name']} {resolved.root['version']}"
    parameters = {"package": package, "target": job.toolchain.triple, "profile": job.profile}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": parameters,
            "internalParameters": job.facts(built),
            "resolvedDependencies": [*source, *inputs, *crates, rustc],
        },
        "runDetails": {"builder": {"id": builder()}},
    }


def sbom(built: Built, resolved: Dependencies) -> Document:
    """Give a CycloneDX document of the crates that are compiled into a file."""

    def component(package: Document, kind: str, sha256: str | None) -> Document:
        found: Document = {
            "type": kind,
            "bom-ref": purl(package),
            "name": package["name"],
            "version": package["version"],
            "purl": purl(package),
        }
        if package.get("description"):
            found["description"] = " ".join(package["description"].split())
        if package.get("license"):
            # Cargo once wrote a slash for OR.
            found["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
        if sha256:
            found["hashes"] = [{"alg": "SHA-256", "content": sha256}]
        return found

    every = (resolved.root, *resolved.packages)
    names = {package["id"]: purl(package) for package in every}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component(resolved.root, "application", built.sha256)},
        "components": [
            component(package, "library", resolved.checksum(package)) for package in resolved.packages
        ],
        "dependencies": [
            {
                "ref": purl(package),
                "dependsOn": [names[id_] for id_ in resolved.needs[package["id"]] if id_ in names],
            }
            for package in every
        ],
    }


def predicates(job: Job, built: Built) -> dict[str, bytes]:
    """Give what is attested of a build, by the predicate's type. Raises CargoError."""
    resolved = dependencies(job)
    return {
        PROVENANCE: canonical(provenance(job, built, resolved)),
        SBOM: canonical(sbom(built, resolved)),
    }
