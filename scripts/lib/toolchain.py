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
from dataclasses import dataclass, field
from pathlib import Path

from scripts.lib import paths
from scripts.lib.steps import Log, StepError, lock, step

MODULES = paths.REPOSITORY / "scripts" / "toolchain"
KUBERNETES = "v1.37.2"


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
    ldflags="-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=v3.259.0",
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

# The oldest pulumi of the user's own that is taken instead of building one; as requiredPulumiVersion.
OLDEST_PULUMI = (3, 259)


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


def _directory(tool: Tool) -> Path:
    """The tool's place in the cache: another go.mod, recipe, compiler or machine is another place.

    One that another patch release of the same Go built does as well.
    """
    version = _go_version()
    own = _place(tool, version)
    release = re.fullmatch(r"(go\d+\.\d+)(\.\d+)?", version)
    if own.is_dir() or release is None:
        return own
    patches = ["", *(f".{number}" for number in range(_PATCHES))]
    others = [_place(tool, release.group(1) + patch) for patch in patches]
    return next((place for place in others if place.is_dir()), own)


def _place(tool: Tool, go_version: str) -> Path:
    digest = hashlib.sha256()
    for pinned_by in (tool.name, *(tool.scripts or ())[:1]):
        for name in ("go.mod", "go.sum"):
            digest.update((MODULES / pinned_by / name).read_bytes())
    recipe = [repr(tool), go_version, platform.system(), platform.machine()]
    digest.update(json.dumps(recipe).encode())
    return paths.CACHE / "tools" / f"{tool.name}-{digest.hexdigest()[:12]}"


def _build(tool: Tool, directory: Path, log: Log) -> None:
    source = MODULES / tool.name
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{tool.name}-") as scratch:
        made = Path(scratch) / tool.name
        made.mkdir()
        flags = ["-trimpath", "-ldflags", tool.ldflags]
        log.run(["go", "build", *flags, "-o", f"{made}/", "tool"], cwd=source, env=go_environment())
        for built, known in tool.rename.items():
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
        made.rename(directory)


def _ensure(tool: Tool) -> Path:
    directory = _directory(tool)
    if directory.is_dir():
        return directory
    with lock(paths.CACHE / "tools" / f"{tool.name}.lock"):
        if not directory.is_dir():
            for left in directory.parent.glob(f".{tool.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            step(f"build {tool.name}", lambda log: _build(tool, directory, log))
    return directory


def _users_pulumi() -> bool:
    """Whether a pulumi with its Python host is on PATH and new enough to be used as it is."""
    found = [shutil.which(program) for program in ("pulumi", "pulumi-language-python")]
    if any(path is None or Path(path).is_relative_to(paths.CACHE) for path in found):
        return False
    answer = subprocess.run(["pulumi", "version"], capture_output=True, text=True, check=False)
    version = re.search(r"v?(\d+)\.(\d+)", answer.stdout)
    return version is not None and tuple(int(part) for part in version.groups()) >= OLDEST_PULUMI


def needed(*, tests: bool) -> list[Tool]:
    """The tools that this machine needs, what is quick to build last."""
    tools = [CLUSTER, REGISTRY]
    if not _users_pulumi():
        tools += [PULUMI, LANGUAGE_HOST]
    return [*tools, PEERS, COSIGN3] if tests else tools


def ensure(*, tests: bool) -> list[Path]:
    """Builds what is missing and gives the directories for PATH.

    Raises StepError when a build fails.
    """
    (paths.CACHE / "tools").mkdir(parents=True, exist_ok=True)
    return _bundled([_ensure(tool) for tool in needed(tests=tests)])


def directories(*, tests: bool) -> list[Path]:
    """The directories for PATH, without building anything.

    Raises StepError when one is not there.
    """
    found = [_directory(tool) for tool in needed(tests=tests)]
    missing = [directory.name for directory in found if not directory.is_dir()]
    if missing:
        raise StepError(f"not built yet: {', '.join(missing)}; run ./scripts/up first")
    return _bundled(found)


def _bundled(found: list[Path]) -> list[Path]:
    """With pulumi and its language host in one directory, as they are shipped: elsewhere it is warned of."""
    apart = [directory for directory in found if directory.name.startswith("pulumi-")]
    if not apart:
        return found
    digest = hashlib.sha256("".join(directory.name for directory in apart).encode()).hexdigest()[:12]
    bundle = paths.CACHE / "tools" / f"bundle-{digest}"
    if not bundle.is_dir():
        with lock(paths.CACHE / "tools" / "bundle.lock"):
            if not bundle.is_dir():
                _link(apart, bundle)
    return [bundle, *(directory for directory in found if directory not in apart)]


def _link(directories: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".bundle-") as scratch:
        made = Path(scratch) / "bundle"
        made.mkdir()
        for program in (program for directory in directories for program in directory.iterdir()):
            # No symbolic links: pulumi goes by where the programs really are.
            (made / program.name).hardlink_to(program)
        made.rename(target)
