"""Builds the tools of ../toolchain from pinned source, each into a cache directory keyed by its inputs.

A tool is a go.mod with `tool` lines: go.mod pins the versions, go.sum the content. Nothing prebuilt is
downloaded.
"""

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.lib import paths
from scripts.lib.steps import Log, StepError, lock, step

MODULES = paths.REPOSITORY / "scripts" / "toolchain"


def pinned(tool: str, module: str) -> str:
    """The version of a module that a tool's go.mod pins, as `v1.2.3`."""
    found = re.search(
        rf"^\t?(?:require )?{re.escape(module)} (v\S+)",
        (MODULES / tool / "go.mod").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    if found is None:
        raise StepError(f"scripts/toolchain/{tool}/go.mod does not pin {module}")
    return found.group(1)


KUBERNETES = pinned("kubernetes", "k8s.io/kubernetes")
# Pulumi's three parts have three versions. The CLI is the newest that can be built from Go modules alone. The
# language host v3.79.0 is the last one inside the module sdk/v3: later ones are a module of their own, which
# cannot be had as one; what the two say to each other has stayed the same in what this program uses. The
# Python SDK, in requirements.in, is the newest. ./scripts/test runs these three together, and so Pulumi.yaml
# asks for this CLI or a newer one.
PULUMI_CLI = pinned("pulumi", "github.com/pulumi/pulumi/sdk/v3")


@dataclass(frozen=True)
class Tool:
    """A directory of scripts/toolchain: the programs it gives and what must be linked into them."""

    name: str
    programs: tuple[str, ...]
    ldflags: str = "-s -w"
    # The name that the Go tool chain gives a program, and the one that it is known by.
    rename: dict[str, str] = field(default_factory=dict)
    # Files that are programs already: the tool whose go.mod pins their module, the module, and paths in it.
    scripts: tuple[str, str, tuple[str, ...]] | None = None


def _kubernetes_version() -> str:
    """Linker flags with the version, which a build outside the Kubernetes tree does not know by itself."""
    major, minor = KUBERNETES.removeprefix("v").split(".")[:2]
    values = {"gitVersion": KUBERNETES, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join(f"-X {package}.{name}={value}" for package in packages for name, value in values.items())


PULUMI = Tool(
    "pulumi",
    ("pulumi",),
    # Without it the program calls itself a development build and warns about it.
    ldflags=f"-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version={PULUMI_CLI}",
)
LANGUAGE_HOST = Tool(
    "pulumi-language-python",
    ("pulumi-language-python", "pulumi-language-python-exec", "pulumi-resource-pulumi-python"),
    # The host looks for them beside itself; they go with the CLI's version, not with the host's.
    scripts=(
        "pulumi",
        "github.com/pulumi/pulumi/sdk/v3",
        ("python/cmd/pulumi-language-python-exec", "python/dist/pulumi-resource-pulumi-python"),
    ),
)
CLUSTER = Tool(
    "kubernetes",
    ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "etcd"),
    ldflags=f"-s -w {_kubernetes_version()}",
    rename={"server": "etcd"},
)
REGISTRY = Tool("registry", ("registry",))
# Peers for the tests: clients that we did not write. cosign 2 and 3 write signatures in different formats.
PEERS = Tool("peers", ("cosign", "crane", "oras"))
COSIGN3 = Tool("cosign3", ("cosign3",), rename={"cosign": "cosign3"})

_GO_DROPPED = ("GOROOT", "GOEXPERIMENT", "GOAMD64", "GOARM64", "GODEBUG")
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
# More than a Go release has had patch releases.
_PATCHES = 30

# How the programs say their versions, and which: one of the user's own is as good as ours.
_ASKED = {
    **dict.fromkeys(
        ("kube-apiserver", "kube-controller-manager", "kube-scheduler"), (("--version",), KUBERNETES)
    ),
    "kubectl": (("version", "--client"), KUBERNETES),
    "etcd": (("--version",), pinned("kubernetes", "go.etcd.io/etcd/server/v3")),
    "registry": (("--version",), pinned("registry", "github.com/distribution/distribution/v3")),
}


def go_environment() -> dict[str, str]:
    """The environment of a build: what the user set for Go is for other modules, machines and experiments.

    Where modules come from and where Go keeps its files stays as it is set. Given values and not empty ones,
    for which Go would look in the file of `go env -w`.
    """
    kept = {key: value for key, value in os.environ.items() if key not in _GO_DROPPED}
    if not all(Path(part).is_absolute() for part in kept.get("GOPATH", "").split(os.pathsep)):
        kept.pop("GOPATH", None)
    return {
        **kept,
        "GOOS": platform.system().lower(),
        "GOARCH": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "GOWORK": "off",
        "GOFLAGS": "-mod=readonly",
        "GO111MODULE": "on",
        "CGO_ENABLED": "0",
    }


def _go(*arguments: str, cwd: Path) -> str:
    try:
        answer = subprocess.run(
            ["go", *arguments], cwd=cwd, env=go_environment(), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise StepError(f"cannot start go: {error.strerror}") from error
    if answer.returncode != 0:
        raise StepError(f"go {' '.join(arguments)}: {answer.stderr.strip()}")
    return answer.stdout.strip()


@functools.cache
def _go_version() -> str:
    return _go("env", "GOVERSION", cwd=MODULES)


def directory(tool: Tool) -> Path:
    """The tool's place in the cache: another go.mod, recipe, compiler or machine is another place."""
    own, *others = places(tool)
    return next((place for place in (own, *others) if place.is_dir()), own)


def places(tool: Tool) -> list[Path]:
    """The tool's own place, and those of what other patch releases of the same Go built, which do as well."""
    version = _go_version()
    release = re.fullmatch(r"(go\d+\.\d+)(\.\d+)?", version)
    patches = ["", *(f".{number}" for number in range(_PATCHES))] if release else []
    others = [release.group(1) + patch for patch in patches] if release else []
    return [_place(tool, built_by) for built_by in (version, *others)]


def _place(tool: Tool, go_version: str) -> Path:
    digest = hashlib.sha256()
    for pinned_by in (tool.name, *(tool.scripts or ())[:1]):
        for name in ("go.mod", "go.sum"):
            digest.update((MODULES / pinned_by / name).read_bytes())
    recipe = [repr(tool), go_version, platform.system(), platform.machine()]
    digest.update(json.dumps(recipe).encode())
    return paths.CACHE / "tools" / f"{tool.name}-{digest.hexdigest()[:12]}"


def _build(tool: Tool, directory: Path, log: Log) -> Path:
    source = MODULES / tool.name
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{tool.name}-") as scratch:
        made = Path(scratch) / tool.name
        made.mkdir()
        flags = ["-trimpath", "-ldflags", tool.ldflags]
        log.run(["go", "build", *flags, "-o", f"{made}/", *_packages(tool)], cwd=source, env=go_environment())
        for built, known in tool.rename.items():
            if known in tool.programs:
                (made / built).rename(made / known)
        if tool.scripts is not None:
            pinned_by, module, files = tool.scripts
            _go("mod", "download", module, cwd=MODULES / pinned_by)
            tree = Path(_go("list", "-m", "-f", "{{.Dir}}", module, cwd=MODULES / pinned_by))
            for file in files:
                target = made / Path(file).name
                shutil.copyfile(tree / file, target)
                target.chmod(0o755)
        missing = [program for program in tool.programs if not (made / program).is_file()]
        if missing:
            raise StepError(f"the build of {tool.name} did not give {', '.join(missing)}")
        # Moved into place whole: a build that is killed leaves nothing that looks like a tool.
        return made.rename(directory)


def _packages(tool: Tool) -> list[str]:
    """The packages of a tool's programs, by the `tool` lines of its go.mod."""
    text = (MODULES / tool.name / "go.mod").read_text(encoding="utf-8")
    block = re.search(r"^tool (?:\(\n(.*?)^\)|(.*)$)", text, re.MULTILINE | re.DOTALL)
    found = (block.group(1) or block.group(2).splitlines()[0]).split() if block else []

    def program(package: str) -> str:
        name = re.sub(r"/v\d+$", "", package).rpartition("/")[2]
        return tool.rename.get(name, name)

    return [package for package in found if program(package) in tool.programs]


def _ensure(tool: Tool) -> Path:
    place = directory(tool)
    if place.is_dir():
        return place
    with _lock(tool):
        if not place.is_dir():
            for left in place.parent.glob(f".{tool.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            step(f"build {tool.name}", lambda log: _build(tool, place, log))
    return place


def install(tool: Tool, made: Path) -> None:
    """Moves a tool that was made elsewhere, on the same file system, into its place."""
    place = paths.CACHE / "tools" / made.name
    place.parent.mkdir(parents=True, exist_ok=True)
    with _lock(tool):
        if not place.is_dir():
            made.rename(place)


def _lock(tool: Tool) -> AbstractContextManager[None]:
    return lock(paths.CACHE / "tools" / f"{tool.name}.lock")


def _version(command: Sequence[str]) -> tuple[int, ...] | None:
    """The first version in what a program prints."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"v?(\d+)\.(\d+)\.(\d+)", answer.stdout)
    return tuple(map(int, found.groups())) if found and answer.returncode == 0 else None


def _users(program: str) -> str | None:
    """Where a program of the user's own is."""
    found = shutil.which(program)
    return None if found is None or Path(found).is_relative_to(paths.CACHE) else found


def _lacking(tool: Tool) -> list[Tool]:
    """A tool without those of its programs that the user has in the version that it would be built in."""
    if directory(tool).is_dir():
        return [tool]
    lacking = []
    for program in tool.programs:
        arguments, version = _ASKED[program]
        found = _users(program)
        if found is None or _version([found, *arguments]) != tuple(map(int, version[1:].split("."))):
            lacking.append(program)
    return [replace(tool, programs=tuple(lacking))] if lacking else []


def _users_pulumi() -> bool:
    """Whether a pulumi with its Python host is on PATH and new enough to be used as it is."""
    if None in (_users("pulumi"), _users("pulumi-language-python")):
        return False
    version = _version(["pulumi", "version"])
    return version is not None and version >= tuple(map(int, PULUMI_CLI[1:].split(".")))


def all_tools(*, tests: bool) -> list[Tool]:
    """Every tool, also what this machine has of its own; what is quick to build last."""
    return [CLUSTER, REGISTRY, PULUMI, LANGUAGE_HOST, *([PEERS, COSIGN3] if tests else [])]


def needed(*, tests: bool) -> list[Tool]:
    """The tools that this machine needs, without what it has of its own."""
    pulumi = [] if _users_pulumi() else [PULUMI, LANGUAGE_HOST]
    return [*_lacking(CLUSTER), *_lacking(REGISTRY), *pulumi, *([PEERS, COSIGN3] if tests else [])]


def current() -> list[Path]:
    """Every place in the cache that a tool of this checkout has, or would have."""
    tools = all_tools(tests=True)
    parts = [tool for tool in needed(tests=True) if tool not in tools]
    found = [directory(tool) for tool in (*tools, *parts)]
    return [*found, _joint(found), _zig()]


def _zig() -> Path:
    """Where components/providers/zig.py keeps its tools; this Python cannot import it."""
    lock_file = paths.REPOSITORY / "components" / "providers" / "zig.txt"
    return paths.CACHE / "tools" / f"zig-{hashlib.sha256(lock_file.read_bytes()).hexdigest()[:12]}"


def missing(*, tests: bool, own: bool = False) -> list[str]:
    """The names of the tools that are to be built."""
    tools = all_tools(tests=tests) if own else needed(tests=tests)
    return [tool.name for tool in tools if not directory(tool).is_dir()]


def ensure(*, tests: bool, own: bool = False) -> list[Path]:
    """Builds what is missing and gives the directories for PATH; with `own` also what the user has.

    Raises StepError when a build fails.
    """
    (paths.CACHE / "tools").mkdir(parents=True, exist_ok=True)
    return _joined([_ensure(tool) for tool in (all_tools if own else needed)(tests=tests)])


def directories(*, tests: bool) -> list[Path]:
    """The directories for PATH, without building anything.

    Raises StepError when one is not there.
    """
    found = [directory(tool) for tool in needed(tests=tests)]
    absent = [place.name for place in found if not place.is_dir()]
    if absent:
        raise StepError(f"not built yet: {', '.join(absent)}; run ./scripts/up first")
    return _joined(found)


def _joined(found: list[Path]) -> list[Path]:
    """With pulumi and its language host in one directory, as they are shipped: elsewhere it is warned of."""
    apart = _of_pulumi(found)
    if not apart:
        return found
    joined = _joint(found)
    if not joined.is_dir():
        with lock(paths.CACHE / "tools" / "joined.lock"):
            if not joined.is_dir():
                _link(apart, joined)
    return [joined, *(directory for directory in found if directory not in apart)]


def _of_pulumi(found: list[Path]) -> list[Path]:
    return [directory for directory in found if directory.name.startswith("pulumi-")]


def _joint(found: list[Path]) -> Path:
    names = "".join(directory.name for directory in _of_pulumi(found))
    return paths.CACHE / "tools" / f"joined-{hashlib.sha256(names.encode()).hexdigest()[:12]}"


def _link(directories: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".joined-") as scratch:
        made = Path(scratch) / "joined"
        made.mkdir()
        for program in (program for directory in directories for program in directory.iterdir()):
            # No symbolic links: pulumi goes by where the programs really are.
            (made / program.name).hardlink_to(program)
        made.rename(target)
