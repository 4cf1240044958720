"""./scripts/test official: the program with the official Pulumi plugins in place of localcloud's stand-ins.

It needs official plugins: on PATH, or in ~/.pulumi as `pulumi plugin install` puts them there. A copy of this
checkout is brought up on a localcloud of its own, verified, previewed, changed, refreshed and destroyed.
Without any official plugin nothing is run, and the exit status says so.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import grpc  # type: ignore[import-untyped]
from google.protobuf import empty_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import provider_pb2_grpc

from localcloud.plugins import official
from scripts.lib import paths

PLUGINS = ("gcp", "kubernetes", "command")
NOT_RUN = 3
"""The exit status where there was nothing to run with: neither good nor bad."""
_ANSWER_SECONDS = 60
# What scripts/env sets for one checkout must not reach another one.
_OWN = re.compile(
    r"LOCALCLOUD_HOME|KUBECONFIG|PULUMI_(BACKEND_URL|HOME|STACK)|GOOGLE_\w+|CLOUDSDK_\w+"
    r"|PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"
)
_CHANGE = ("apps[0].memoryLimit", "96Mi")


@dataclass(frozen=True)
class Plugin:
    """An official plugin: where it is, and the version that it says itself."""

    name: str
    path: Path
    version: str


def wanted(name: str) -> str:
    """The version of a plugin that the installed SDK asks for."""
    return metadata.version(f"pulumi_{name}")


def find(name: str) -> Path | None:
    """An official plugin's executable: of the SDK's version among those installed, else what PATH has."""
    homes = [os.environ.get("PULUMI_HOME", ""), str(Path.home() / ".pulumi")]
    executable = f"pulumi-resource-{name}"
    for home in filter(None, homes):
        path = Path(home) / "plugins" / f"resource-{name}-v{wanted(name)}" / executable
        if path.is_file() and not _is_stand_in(path):
            return path
    outside = [
        entry
        for entry in os.environ.get("PATH", os.defpath).split(os.pathsep)
        if not Path(entry).resolve().is_relative_to(paths.REPOSITORY)
    ]
    found = shutil.which(executable, path=os.pathsep.join(outside))
    return Path(found) if found and not _is_stand_in(Path(found)) else None


def _is_stand_in(path: Path) -> bool:
    """Whether it is localcloud's own, of whatever checkout: those are Python."""
    with path.open("rb") as file:
        return b"localcloud" in file.read(4096)


def version(path: Path) -> str:
    """What a plugin says of itself when it is asked.

    Raises:
        OSError, ValueError, grpc.RpcError: it is no plugin.
    """
    process = subprocess.Popen([path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        with grpc.insecure_channel(f"127.0.0.1:{int(line)}") as channel:
            stub = provider_pb2_grpc.ResourceProviderStub(channel)
            return str(stub.GetPluginInfo(empty_pb2.Empty(), timeout=_ANSWER_SECONDS).version)
    finally:
        process.kill()
        process.wait()


def _copy(target: Path) -> None:
    """A copy of the working tree as git sees it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=paths.REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source = paths.REPOSITORY / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def _in_environment(*commands: str) -> list[str]:
    return ["sh", "-c", " && ".join(['eval "$(./scripts/env)"', *commands])]


STEPS: tuple[tuple[str, list[str]], ...] = (
    ("up, and verify", ["./scripts/up"]),
    (
        "a second preview is empty",
        _in_environment("pulumi preview --stack local --non-interactive --expect-no-changes"),
    ),
    (
        f"an update: {_CHANGE[0]}",
        _in_environment(
            f"pulumi config set --stack local --path '{_CHANGE[0]}' {_CHANGE[1]}",
            "pulumi up --stack local --non-interactive --yes",
        ),
    ),
    ("verify", ["./scripts/verify"]),
    (
        "a refresh finds no drift",
        _in_environment("pulumi refresh --stack local --non-interactive --yes --expect-no-changes"),
    ),
    (
        "a preview after it is empty",
        _in_environment("pulumi preview --stack local --non-interactive --expect-no-changes"),
    ),
    ("destroy", ["./scripts/down"]),
)


def run(found: Sequence[Plugin]) -> int:
    """Everything, in a copy; gives the exit status."""
    env = {key: value for key, value in os.environ.items() if not _OWN.fullmatch(key)}
    env["PATH"] = os.pathsep.join(
        [*(str(plugin.path.parent) for plugin in found), env.get("PATH", os.defpath)]
    )
    env[official.WHATEVER_VERSION] = ",".join(plugin.name for plugin in found)
    directory = Path(tempfile.mkdtemp(prefix="official-"))
    try:
        _copy(directory)
        for name, command in STEPS:
            started = time.monotonic()
            answer = subprocess.run(
                command, cwd=directory, env=env, capture_output=True, text=True, check=False
            )
            mark = "✓" if answer.returncode == 0 else "✗"
            print(f"  {mark} {name}  {time.monotonic() - started:.1f}s", flush=True)
            if answer.returncode != 0:
                print(f"{answer.stdout}\n{answer.stderr}")
                return 1
        return 0
    finally:
        subprocess.run(
            ["./scripts/down", "--force"], cwd=directory, env=env, capture_output=True, check=False
        )
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """Finds the official plugins, says what there is, and runs with them."""
    found: list[Plugin] = []
    for name in PLUGINS:
        path = find(name)
        if path is None:
            print(f"{name}: no official plugin {wanted(name)} (the stand-in takes its place)")
            continue
        plugin = Plugin(name, path, version(path))
        found.append(plugin)
        print(f"{name}: official plugin {plugin.version} ({path}); the SDK asks for {wanted(name)}")
    if not found:
        print(
            "NOT RUN: there is no official plugin on PATH or in ~/.pulumi/plugins. Where they can be had:\n"
            + "\n".join(f"  pulumi plugin install resource {name} v{wanted(name)}" for name in PLUGINS),
            file=sys.stderr,
        )
        return NOT_RUN
    status = run(found)
    of = "all" if len(found) == len(PLUGINS) else ", ".join(plugin.name for plugin in found)
    print(json.dumps({"official": {plugin.name: plugin.version for plugin in found}, "passed": status == 0}))
    print(f"{'passed' if status == 0 else 'FAILED'} with official plugins: {of}")
    return status


if __name__ == "__main__":
    sys.exit(main())
