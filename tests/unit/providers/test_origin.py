"""What is said of a build: the same for the same source, of the commit that touched it, and complete."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.providers import cargo, origin
from components.providers.compiler import WASM_TARGET
from tests.unit.conftest import REPOSITORY
from tests.unit.providers.test_cargo import NATIVE, PACKAGE, plant

LIBRARY = {"Cargo.toml": PACKAGE.format(name="part"), "src/lib.rs": "pub fn part() {}\n"}
MANIFEST = NATIVE["Cargo.toml"] + '[dependencies]\npart = { path = "../part" }\n[workspace]\n'
LOCK = (
    'version = 4\n[[package]]\nname = "part"\nversion = "0.1.0"\n'
    '[[package]]\nname = "program"\nversion = "0.1.0"\ndependencies = ["part"]\n'
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give this file a cache of its own."""
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        patch.delenv("CARGO_TARGET_DIR", raising=False)
        patch.delenv("GITHUB_ACTIONS", raising=False)
        yield directory


def program(root: Path) -> Path:
    """Plant a program with a path dependency beside it; give its crate."""
    source = {"Cargo.toml": MANIFEST, "Cargo.lock": LOCK, "src/main.rs": "fn main() { part::part() }\n"}
    plant(root, {f"program/{name}": text for name, text in source.items()} | {"README.md": "A program.\n"})
    plant(root / "part", LIBRARY)
    return root / "program"


def git(root: Path, *arguments: str) -> str:
    """Run git as somebody."""
    who = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com")
    answer = subprocess.run(["git", *who, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def commit(root: Path) -> str:
    """Commit everything; give the commit."""
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A change")
    return git(root, "rev-parse", "HEAD")


def attested(crate: Path, target: str = "", profile: str = "dev") -> dict[str, Any]:
    """Build a crate and give what is attested of it."""
    job = cargo.job_for(crate, target, profile)
    return {kind: json.loads(text) for kind, text in origin.predicates(job, job.built()).items()}


def source_of(crate: Path) -> dict[str, Any] | None:
    """Give the commit of a crate's provenance, as it is written there."""
    found = attested(crate)[origin.PROVENANCE]["buildDefinition"]["resolvedDependencies"]
    return next((item for item in found if item["name"] == "source"), None) if "name" in found[0] else None


# First: with a cache of this file's own the app would be compiled again.
def test_the_app_s_bill_of_materials_has_what_is_compiled_in_and_nothing_of_its_tests() -> None:
    found = attested(REPOSITORY / "wasm_app", WASM_TARGET, "release")
    bill = found[origin.SBOM]
    components = {item["name"]: item for item in bill["components"]}
    assert "wasip2" in components
    assert not {"serde_json", "sha2", "base64"} & components.keys(), "dev-dependencies"
    lock = (REPOSITORY / "wasm_app" / "Cargo.lock").read_text()
    for item in components.values():
        assert item["hashes"][0]["content"] in lock
        assert item["purl"] == f"pkg:cargo/{item['name']}@{item['version'].replace('+', '%2B')}"
    refs = {item["ref"] for item in bill["dependencies"]}
    assert refs == {item["bom-ref"] for item in [*components.values(), bill["metadata"]["component"]]}
    assert all(set(item["dependsOn"]) <= refs for item in bill["dependencies"])
    crates = {item.get("uri") for item in found[origin.PROVENANCE]["buildDefinition"]["resolvedDependencies"]}
    assert {item["purl"] for item in components.values()} <= crates


def test_the_same_source_is_attested_in_the_same_bytes_wherever_and_whenever_it_is_built(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = attested(program(home / "one"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "another cache"))
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    before = os.umask(0o077)
    try:
        crate = program(home / "two" / "deeper")
        for path in (home / "two").rglob("*"):
            os.utime(path, (1e9, 1e9))
        two = attested(crate)
    finally:
        os.umask(before)
    # A program of this machine has inside where it was compiled; a component has not.
    for found in (one, two):
        found[origin.SBOM]["metadata"]["component"].pop("hashes")
    assert one == two
    assert str(home) not in json.dumps(one)


def test_a_program_names_the_commit_that_last_touched_what_was_read_and_not_a_later_one(home: Path) -> None:
    root = home / "repository"
    crate = program(root)
    assert source_of(crate) is None, "no repository"
    git(root, "init", "--quiet")
    assert source_of(crate) is None, "no commit yet"
    first = commit(root)
    clean = {"name": "source", "digest": {"gitCommit": first}, "annotations": {"dirty": False}}
    assert source_of(crate) == clean
    (root / "README.md").write_text("Another text.\n")
    assert source_of(crate) == clean, "nothing that was read is another"
    assert commit(root) != first
    assert source_of(crate) == clean, "a commit that does not touch it"
    (root / "part" / "src" / "lib.rs").write_text("pub fn part() {} // another\n")
    assert source_of(crate) == {**clean, "annotations": {"dirty": True}}
    second = commit(root)
    assert source_of(crate) == {**clean, "digest": {"gitCommit": second}}


@pytest.mark.parametrize("ignored", [False, True])
def test_a_file_that_no_commit_has_makes_the_source_dirty(home: Path, ignored: bool) -> None:
    root = home / f"ignored-{ignored}"
    crate = program(root)
    if ignored:
        (root / ".gitignore").write_text("/program/src/more.rs\n")
    git(root, "init", "--quiet")
    commit(root)
    (crate / "src" / "more.rs").write_text("" if ignored else "()")
    if ignored:
        (crate / "src" / "main.rs").write_text("mod more;\nfn main() { part::part() }\n")
        commit(root)
    else:
        (crate / "src" / "main.rs").write_text('fn main() { part::part(); let () = include!("more.rs"); }\n')
        git(root, "commit", "--all", "--quiet", "--message", "Use what is not there")
    found = source_of(crate)
    assert found
    assert found["annotations"] == {"dirty": True}


def test_every_file_that_was_read_is_there_with_its_sum(home: Path) -> None:
    crate = program(home / "inputs")
    found = attested(crate)[origin.PROVENANCE]["buildDefinition"]["resolvedDependencies"]
    sums = {item.get("name"): item.get("digest", {}).get("sha256") for item in found}
    for name in ("src/main.rs", "Cargo.toml", "Cargo.lock", "../part/src/lib.rs", "../part/Cargo.toml"):
        assert sums[name] == cargo.measure(crate / name).sha256
    assert found[-1]["uri"].startswith("pkg:generic/rustc@")


def test_a_workflow_of_github_s_is_a_builder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", "o/r/.github/workflows/up.yml@refs/heads/main")
    assert origin.builder() == "https://github.com/o/r/.github/workflows/up.yml@refs/heads/main"
    monkeypatch.delenv("GITHUB_WORKFLOW_REF")
    assert origin.builder() == origin.OWN_MACHINE
