"""What is built is what a build today would give, and is built once; with real cargo, on tiny crates."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pulumi
import pytest

from components.providers import cache, cargo, inputs
from components.providers.artifacts import Interface
from components.providers.compiler import WASM_TARGET, CargoError

pytestmark = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not on PATH")

LIBRARY = """
#[path = "../nested/lib.rs"]
mod nested;
#[path = "linked/lib.rs"]
mod linked;
mod target;

const PARTS: &[&str] = &[
    shared::TEXT, nested::TEXT, linked::TEXT, target::TEXT, env!("SCRIPT"), env!("CONFIGURED"),
    match option_env!("GREETING") { Some(text) => text, None => "no greeting" },
    if cfg!(flag) { "with the flag" } else { "without the flag" },
    if cfg!(debug_assertions) { "with assertions" } else { "without assertions" },
];

#[unsafe(no_mangle)]
pub extern "C" fn part(index: usize, other: usize) -> *const u8 {
    shared::choose(PARTS, index + other).as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn identity() -> usize {
    format!("{:?}", shared::identity()).len()
}
"""
SCRIPT = """
fn main() {
    println!("cargo::rerun-if-env-changed=COLOUR");
    println!("cargo::rerun-if-changed=wit");
    let mut found = vec![std::env::var("COLOUR").unwrap_or_default()];
    for entry in std::fs::read_dir("wit/deps").unwrap() {
        let path = entry.unwrap().path();
        found.push(format!("{:?}={:?}", path.file_name().unwrap(), std::fs::read(&path).unwrap()));
    }
    found.sort();
    println!("cargo::rustc-env=SCRIPT={}", found.join(" "));
}
"""
PACKAGE = '[package]\nname = "{name}"\nversion = "0.1.0"\nedition = "2024"\n'
TREE = {
    "app/Cargo.toml": PACKAGE.format(name="app")
    + '[lib]\ncrate-type = ["cdylib"]\n[dependencies]\nshared = { path = "../shared" }\n[workspace]\n',
    "app/Cargo.lock": 'version = 4\n[[package]]\nname = "app"\nversion = "0.1.0"\ndependencies = ["shared"]\n'
    '[[package]]\nname = "shared"\nversion = "0.1.0"\n',
    "app/.cargo/config.toml": '[env]\nCONFIGURED = "so"\n',
    "app/.gitignore": "/wit/deps\n",
    "app/README.md": "An app.\n",
    "app/build.rs": SCRIPT,
    "app/wit/deps/generated.wit": "package generated;\n",
    "app/src/lib.rs": LIBRARY,
    "app/src/target/mod.rs": 'pub const TEXT: &str = "target";\n',
    "app/nested/.git/HEAD": "ref: refs/heads/main\n",
    "app/nested/lib.rs": 'pub const TEXT: &str = "nested";\n',
    "elsewhere/lib.rs": 'pub const TEXT: &str = include_str!("text.txt");\n',
    "elsewhere/text.txt": "linked",
    "shared/Cargo.toml": PACKAGE.format(name="shared") + "[features]\nmore = []\n",
    "shared/src/lib.rs": 'pub const TEXT: &str = if cfg!(feature = "more") { "more" } else { "shared" };\n'
    "pub fn choose<'a>(parts: &[&'a str], index: usize) -> &'a str { parts[index] }\n"
    "pub struct Own;\npub fn identity() -> std::any::TypeId { std::any::TypeId::of::<Own>() }\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    """Make a directory hold these files and no others; one that is as it should be keeps its time."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and str(path.relative_to(root)) not in files):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def checkout(root: Path) -> Path:
    """Plant the app, with a source directory that is a link, in a checkout; give the crate."""
    plant(root, TREE)
    (root / "app" / "src" / "linked").symlink_to("../../elsewhere")
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    return root / "app"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give this file a cache of its own, in an environment without variables of cargo's."""
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("CARGO_", "RUST")) and name not in {"CARGO_HOME", "RUSTUP_HOME"}:
                patch.delenv(name)
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        if shutil.which("rustup") is not None:
            patch.setenv("RUSTUP_TOOLCHAIN", toolchain())
        yield directory


def toolchain() -> str:
    """Give the toolchain of this repository, which the directories of these tests lie outside of."""
    command = ["rustup", "show", "active-toolchain"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return answer.stdout.split()[0]


@pytest.fixture(scope="module")
def built(home: Path) -> cargo.Built:
    """Build the app once."""
    return wasm(checkout(home / "outer" / "checkout"))


@pytest.fixture
def app(home: Path, built: cargo.Built) -> Path:
    """Give the app's crate as it was built."""
    assert built.size > 0
    plant(home / "outer", {})
    return checkout(home / "outer" / "checkout")


def wasm(crate: Path) -> cargo.Built:
    return cargo.build(crate, WASM_TARGET, "release")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let nothing be compiled."""

    def refuse(job: cargo.Job) -> inputs.Build:
        raise AssertionError(f"{job.crate} is compiled")

    monkeypatch.setattr(cargo.Job, "compile", refuse)
    return monkeypatch


Change = Callable[[Path, pytest.MonkeyPatch], None]


def write(name: str, text: str, *, seconds: float | None = None) -> Change:
    """Change a file relative to the crate; `seconds` is the time that it then has."""

    def change(crate: Path, _patch: pytest.MonkeyPatch) -> None:
        path = crate / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if seconds is not None:
            os.utime(path, (seconds, seconds))

    return change


def variable(name: str, value: str) -> Change:
    """Set a variable."""
    return lambda _crate, patch: patch.setenv(name, value)


TEXT = 'pub const TEXT: &str = "changed";\n'
CHANGES: dict[str, Change] = {
    "a path dependency": write("../shared/src/lib.rs", TREE["shared/src/lib.rs"].replace('"shared"', '"!"')),
    "a path dependency's features": write(
        "../shared/Cargo.toml",
        TREE["shared/Cargo.toml"].replace("more = []", 'more = []\ndefault = ["more"]'),
    ),
    "a path dependency's file with an older time": write(
        "../shared/src/lib.rs", TREE["shared/src/lib.rs"].replace('"shared"', '"old"'), seconds=1e9
    ),
    "a nested clone": write("nested/lib.rs", TEXT),
    "a linked directory": write("../elsewhere/lib.rs", TEXT),
    "a file that a linked source includes": write("../elsewhere/text.txt", "changed"),
    "a directory called target": write("src/target/mod.rs", TEXT),
    "a source with an older time": write("src/target/mod.rs", TEXT.replace("ch", "Ch"), seconds=1e9),
    "an ignored file": write("wit/deps/generated.wit", "package changed;\n"),
    "a new ignored file": write("wit/deps/new.wit", ""),
    "a file name that is no UTF-8": write("wit/deps/" + os.fsdecode(b"\xff.wit"), ""),
    "the build script": write("build.rs", SCRIPT.replace("vec![", 'vec!["changed".to_string(), ')),
    "a variable of the build script": variable("COLOUR", "blue"),
    "a variable of a source": variable("GREETING", "hello"),
    "the environment in cargo's configuration": write(
        ".cargo/config.toml", '[env]\nCONFIGURED = "changed"\n'
    ),
    "flags in the crate's configuration": write(
        ".cargo/config.toml",
        TREE["app/.cargo/config.toml"]
        + "[target.'cfg(target_arch = \"wasm32\")']\nrustflags = '--cfg flag'\n",
    ),
    "a new configuration above the checkout": write(
        "../../.cargo/config.toml", "[build]\nrustflags = ['--cfg', 'flag']\n"
    ),
    "what a configuration above includes": lambda crate, patch: (
        write("../../.cargo/config.toml", 'include = ["more.toml"]\n')(crate, patch),
        write("../../.cargo/more.toml", "[profile.release]\ndebug-assertions = true\n")(crate, patch),
    )[0],
    "RUSTFLAGS": variable("RUSTFLAGS", "--cfg flag"),
    "CARGO_PROFILE": variable("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true"),
    "a profile in the manifest": write(
        "Cargo.toml", TREE["app/Cargo.toml"] + "[profile.release]\ndebug-assertions = true\n"
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_cargo_reads_is_seen_and_taken_back(
    name: str, app: Path, built: cargo.Built
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        CHANGES[name](app, patch)
        assert wasm(app).sha256 != built.sha256
    plant(app.parents[1], {})
    checkout(app.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(cargo.Job, "make")
        assert wasm(app) == built


IRRELEVANT: dict[str, Change] = {
    "a file that nothing reads": write("README.md", "Another app.\n"),
    "what cargo leaves": write("target/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n"),
    "how cargo speaks": variable("CARGO_TERM_VERBOSE", "true"),
    "another target": variable("CARGO_BUILD_TARGET", "x86_64-unknown-none"),
    "a mirror": write("../../.cargo/config.toml", "[http]\ntimeout = 7\n[build]\njobs = 1\n"),
    "a touch": lambda crate, _patch: (crate / "src" / "lib.rs").touch(),
}


@pytest.mark.parametrize("name", IRRELEVANT)
def test_what_cargo_does_not_read_compiles_nothing(
    name: str, app: Path, built: cargo.Built, no_compiler: pytest.MonkeyPatch
) -> None:
    IRRELEVANT[name](app, no_compiler)
    assert wasm(app) == built


def test_another_checkout_of_the_same_sources_compiles_nothing(
    home: Path, built: cargo.Built, no_compiler: pytest.MonkeyPatch
) -> None:
    assert no_compiler
    assert wasm(checkout(home / "a" / "clone" / "that is deeper")) == built


def test_the_same_sources_give_the_same_bytes_wherever_they_are_compiled(
    home: Path, built: cargo.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "another cache"))
    # Where cargo writes is the user's, and what is read there is found all the same.
    write("../../.cargo/config.toml", '[build]\ntarget-dir = "t"\nbuild-dir = "b"\ndep-info-basedir = "."\n')(
        crate := checkout(home / "one more" / "clone"), monkeypatch
    )
    again = wasm(crate)
    assert (again.sha256, again.path == built.path) == (built.sha256, False)
    assert str(home).encode() not in Path(again.path).read_bytes()
    monkeypatch.delattr(cargo.Job, "make")
    assert wasm(crate) == again


@pytest.mark.parametrize("damage", ["gone", "truncated", "another", "emptied records"])
def test_what_is_not_whole_in_the_cache_is_built_again(
    damage: str, app: Path, built: cargo.Built, home: Path
) -> None:
    path = Path(built.path)
    content = path.read_bytes()
    if damage == "gone":
        shutil.rmtree(path.parent)
    elif damage == "emptied records":
        for record in (home / "cache" / "awesome-wasm" / "inputs").glob("*/*.json"):
            record.write_text("{")
    else:
        path.write_bytes(content[:-9] if damage == "truncated" else b"\x7fELF" + content[4:])
    assert wasm(app) == built
    assert path.read_bytes() == content


def test_what_is_written_while_the_compiler_runs_is_not_taken_for_read(
    app: Path, built: cargo.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = cargo.Job.compile

    def edited_meanwhile(job: cargo.Job) -> inputs.Build:
        build = compile_(job)
        (app / "src" / "target" / "mod.rs").write_text(TEXT.replace("changed", "later"))
        return build

    write("nested/lib.rs", TEXT.replace("changed", "meanwhile"))(app, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(cargo.Job, "compile", edited_meanwhile)
        first = wasm(app)
    second = wasm(app)
    assert len({built.sha256, first.sha256, second.sha256}) == 3
    assert b"later" in Path(second.path).read_bytes()


def test_what_another_crate_of_the_same_name_left_is_not_taken(
    app: Path, built: cargo.Built, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkout(home / "other")
    write("nested/lib.rs", TEXT.replace("changed", "another app"))(other, monkeypatch)
    assert wasm(other).sha256 != built.sha256
    # Cargo takes the file of this name for the one that it made of this crate.
    for record in (home / "cache" / "awesome-wasm" / "inputs").glob("*/*.json"):
        record.unlink()
    assert wasm(app).sha256 == built.sha256


def test_a_build_that_asks_for_a_file_that_does_not_exist_is_for_cargo_to_judge_each_time(
    app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("build.rs", SCRIPT.replace("=wit", "=none"))(app, monkeypatch)
    first = wasm(app)
    write("wit/deps/generated.wit", "package unasked;\n")(app, monkeypatch)
    assert wasm(app).sha256 != first.sha256


NATIVE = {
    "Cargo.toml": PACKAGE.format(name="program"),
    "Cargo.lock": 'version = 4\n[[package]]\nname = "program"\nversion = "0.1.0"\n',
    "src/main.rs": 'fn main() { print!("{}", env!("CARGO_MANIFEST_DIR")); }\n',
}


def said(program: cargo.Built) -> str:
    return subprocess.run([program.path], capture_output=True, text=True, check=True).stdout


def test_a_native_program_is_one_of_this_machine_s_whatever_target_the_user_prefers(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crate = home / "native" / "program"
    plant(crate, NATIVE)
    with monkeypatch.context() as patch:
        patch.setenv("CARGO_BUILD_TARGET", WASM_TARGET)
        first = cargo.build(crate, profile="dev")
    assert said(first) == str(crate)
    with monkeypatch.context() as patch:
        patch.delattr(cargo.Job, "make")
        assert cargo.build(crate, profile="dev") == first
    write("../.cargo/config.toml", f'[build]\ntarget = "{WASM_TARGET}"\n')(crate, monkeypatch)
    assert said(cargo.build(crate, profile="dev")) == str(crate)
    # What has the checkout's place inside is not another checkout's.
    shutil.copytree(crate, home / "copy")
    assert said(cargo.build(home / "copy", profile="dev")) == str(home / "copy")


def test_what_another_clone_left_in_the_same_directory_is_not_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crates = [home / "clones" / name / "program" for name in ("one", "two")]
    for crate in crates:
        plant(crate, NATIVE)
        write("src/main.rs", f'fn main() {{ print!("{crate.parent.name}"); }}\n')(crate, monkeypatch)
    # By hand, in the directory that ./scripts/env names; for cargo the second one's sources are not newer.
    command = ["cargo", "build", "--quiet", "--target-dir", str(cargo.target_directory(""))]
    subprocess.run(command, cwd=crates[0], check=True)
    assert [said(cargo.build(crate, profile="dev")) for crate in crates] == ["one", "two"]


def test_what_another_clone_left_of_a_dependency_is_not_what_a_build_fails_with(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crates = [home / "clones" / name / "program" for name in ("one", "two")]
    for crate in crates:
        name = crate.parent.name
        plant(crate, NATIVE)
        write("src/main.rs", f'fn main() {{ print!("{{}}", part::{name}()); }}\n')(crate, monkeypatch)
        part = f'pub fn {name}() -> &\'static str {{ "{name}" }}\n'
        write("part/src/lib.rs", part)(crate, monkeypatch)
        write("part/Cargo.toml", '[package]\nname = "part"\nversion = "0.1.0"\nedition = "2021"\n')(
            crate, monkeypatch
        )
        manifest = (crate / "Cargo.toml").read_text()
        write("Cargo.toml", manifest + '[workspace]\n[dependencies.part]\npath = "part"\n')(
            crate, monkeypatch
        )
        subprocess.run(["cargo", "generate-lockfile", "--offline"], cwd=crate, check=True)
    assert said(cargo.build(crates[0], profile="dev")) == "one"
    # Its dependency is older than what was made of the first one's, and has another function; it is newer.
    (crates[1] / "src/main.rs").touch()
    assert said(cargo.build(crates[1], profile="dev")) == "two"
    # What is wrong in the sources themselves is still said, as cargo says it.
    write("src/main.rs", "fn main() { part::three(); }\n")(crates[1], monkeypatch)
    with pytest.raises(CargoError, match="cannot find function `three`"):
        cargo.build(crates[1], profile="dev")
    # Also where nobody may set a file's time.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", Mock(side_effect=PermissionError(errno.EROFS, "read-only")))
        with pytest.raises(CargoError, match=r"(?s)cannot find function `three`.*run `touch` on it"):
            cargo.build(crates[1], profile="dev")


@pytest.mark.parametrize(
    ("head", "triple", "is_right"),
    [
        (cargo.COMPONENT, WASM_TARGET, True),
        (b"\0asm\1\0\0\0", WASM_TARGET, False),
        (b"", WASM_TARGET, False),
        (b"\x7fELF\2\1" + bytes(12) + b"\x3e\0", "x86_64-unknown-linux-gnu", True),
        (b"\x7fELF\2\1" + bytes(12) + b"\x3e\0", "aarch64-unknown-linux-gnu", False),
        (b"\x7fELF\2\1" + bytes(12) + b"\xb7\0", "aarch64-unknown-linux-gnu", True),
        (b"\x7fELF\2\2" + bytes(12) + b"\0\xb7", "aarch64-unknown-linux-gnu", True),
        (b"\x7fELF\2\1", "x86_64-unknown-linux-gnu", False),
        (cargo.COMPONENT, "x86_64-unknown-linux-gnu", False),
        (b"\xcf\xfa\xed\xfe\x0c\0\0\1", "aarch64-apple-darwin", True),
        (b"\xcf\xfa\xed\xfe\x07\0\0\1", "aarch64-apple-darwin", False),
        (b"\x7fELF\2\1" + bytes(12) + b"\xb7\0", "aarch64-apple-darwin", False),
    ],
)
def test_a_file_is_of_use_for_the_target_that_its_head_tells(
    head: bytes, triple: str, *, is_right: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(head)
    path.chmod(0o755)
    assert (cargo.fault(path, triple) == "") is is_right
    path.chmod(0o644)
    assert (cargo.fault(path, triple) == "") is (is_right and triple == WASM_TARGET)


LIB = '[lib]\npath = "lib.rs"\ncrate-type = ["cdylib"]\n'
ONE, TWO = '[[bin]]\nname = "one"\npath = "lib.rs"\n', '[[bin]]\nname = "two"\npath = "lib.rs"\n'
ASKING = TWO + 'required-features = ["more"]\n[features]\nmore = []\n'


@pytest.mark.parametrize(
    ("targets", "native", "component"),
    [
        (LIB, "neither a binary nor a cdylib", "lib app"),
        (ONE, "bin one", "bin one"),
        (LIB + ONE, "bin one", "lib app"),
        (ONE + TWO, 'one, two: choose one by `default-run = "one"`', "one, two: choose one"),
        (TWO + ONE + LIB, "one, two: choose one", "lib app"),
        (ONE + ASKING, "bin one", "bin one"),
        ('default-run = "two"\n' + ONE + TWO, "bin two", "bin two"),
    ],
)
def test_one_thing_is_chosen_of_a_crate_or_none(
    targets: str, native: str, component: str, home: Path, tmp_path: Path
) -> None:
    plant(
        tmp_path / "app",
        {"Cargo.toml": PACKAGE.format(name="app") + targets, "Cargo.lock": "version = 4\n", "lib.rs": ""},
    )

    def chosen(target: str) -> str:
        try:
            found = cargo.choose(tmp_path / "app", target)
        except CargoError as error:
            return str(error)
        return f"{found.kind} {found.name}"

    assert home
    assert native in chosen("")
    assert component in chosen(WASM_TARGET)


def test_a_member_s_lock_file_is_its_workspace_s_and_the_advised_command_makes_it(
    home: Path, tmp_path: Path
) -> None:
    assert home
    member = {"Cargo.toml": PACKAGE.format(name="app"), "src/main.rs": "fn main() {}\n"}
    other = {"Cargo.toml": PACKAGE.format(name="more"), "src/lib.rs": ""}
    root = {"Cargo.toml": '[workspace]\nresolver = "3"\nmembers = ["crates/*"]\n'}
    for place, files in (("", root), ("crates/app", member), ("crates/more", other)):
        plant(tmp_path / "root" / place, files)
    crate = tmp_path / "root" / "crates" / "app"
    with pytest.raises(CargoError) as caught:
        cargo.choose(crate)
    assert str(caught.value) == (
        f"{tmp_path / 'root'} has no Cargo.lock: run `cargo generate-lockfile` there and commit it"
    )
    subprocess.run(["cargo", "generate-lockfile", "--offline"], cwd=tmp_path / "root", check=True)
    assert cargo.choose(crate).name == "app"
    with pytest.raises(CargoError, match="directory of a member, one of crates/app, crates/more"):
        cargo.choose(tmp_path / "root")
    assert said(cargo.build(crate, profile="dev")) == ""


def test_cargo_s_own_message_becomes_the_error(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("nested/lib.rs", "it does not compile\n")(app, monkeypatch)
    result = cargo.CargoBuildProvider().check({}, {"crate": str(app), **PROPS})
    assert "expected one of" in result.failures[0].reason
    write("Cargo.toml", "[package\n")(app, monkeypatch)
    result = cargo.CargoBuildProvider().check({}, {"crate": str(app), **PROPS})
    assert "failed in app" in result.failures[0].reason


def test_a_directory_s_links_to_itself_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    before = inputs.digest(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe")
    assert inputs.digest(tmp_path) == before
    (tmp_path / "a" / "more").touch()
    assert inputs.digest(tmp_path) != before


PROPS = {"target": WASM_TARGET, "profile": "release"}


def test_check_builds_so_that_a_preview_knows_the_bytes(
    app: Path, built: cargo.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cargo, "interface", lambda _wasm: Interface(("wasi:a/b",), (), ""))
    provider, props = cargo.CargoBuildProvider(), {"crate": str(app), **PROPS}
    checked = provider.check({}, props).inputs
    assert provider.create(checked).outs == checked
    assert (checked["sha256"], checked["size"]) == (built.sha256, built.size)
    assert (checked["imports"], checked["exports"]) == (["wasi:a/b"], [])
    assert str(built.path) not in json.dumps(checked), "it lies where its sum says"
    assert cache.read_built(built.sha256) == Path(built.path).read_bytes()
    # A comment: it is compiled again, and the same bytes come out.
    write("src/lib.rs", LIBRARY + "// nothing new\n")(app, monkeypatch)
    assert provider.check(checked, props).inputs == checked
    assert provider.diff("app", checked, {**checked, "sha256": "another"}).changes is True
    # A build that is gone is made again, and is no change.
    Path(built.path).unlink()
    assert provider.read("app", checked).id == "app"
    assert provider.diff("app", checked, provider.check(checked, props).inputs).changes is False
    assert Path(built.path).is_file()


ORIGINS: dict[str, tuple[set[str], Change]] = {
    "a source": ({"source"}, write("nested/lib.rs", TEXT)),
    "the lock file": ({"lock file"}, write("Cargo.lock", "# a comment\n" + TREE["app/Cargo.lock"])),
    "a profile": (
        {"profile"},
        write("Cargo.toml", TREE["app/Cargo.toml"] + "[profile.release]\nopt-level = 1\n"),
    ),
    "flags": ({"configuration"}, variable("RUSTFLAGS", "--cfg flag")),
    "a dependency's manifest": (
        {"source"},
        write("../shared/Cargo.toml", TREE["shared/Cargo.toml"].replace("more = []", "less = []")),
    ),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_a_preview_says_of_which_part_of_its_origin_an_app_has_another(
    name: str, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, change = ORIGINS[name]

    def facts() -> dict[str, str]:
        job = cargo.job_for(app, WASM_TARGET, "release")
        return job.facts(job.built())

    before = facts()
    change(app, monkeypatch)
    after = facts()
    assert {part for part in before.keys() | after.keys() if before.get(part) != after.get(part)} == parts
    assert "unknown" not in after.values()


@pytest.mark.parametrize("missing", ["Cargo.toml", "Cargo.lock"])
def test_check_names_a_file_that_is_missing(app: Path, missing: str) -> None:
    (app / missing).unlink()
    result = cargo.CargoBuildProvider().check({}, {"crate": str(app), **PROPS})
    assert missing in result.failures[0].reason


def test_check_lets_what_is_unknown_pass() -> None:
    props = {"crate": pulumi.runtime.rpc.UNKNOWN, "target": "", "profile": "release"}
    assert cargo.CargoBuildProvider().check({}, props).inputs == props


def test_another_place_of_the_crate_is_no_change_and_an_older_state_loses_its_path() -> None:
    olds = {"crate": "a", "target": "", "profile": "release", "sha256": "1"}
    provider = cargo.CargoBuildProvider()
    assert provider.diff("id", olds, {**olds, "crate": "b"}).changes is False
    result = provider.diff("id", olds, {**olds, "sha256": "2"})
    assert (result.changes, result.replaces) == (True, None)
    assert provider.diff("id", {**olds, "path": "/home/somebody/file"}, olds).changes is True
    assert "path" not in (provider.update("id", olds, olds).outs or {})
