"""Judges by content what cargo takes for fresh by time.

Cargo does not see a file that was moved, unpacked or copied into place with a time of its own. In a directory
that clones share it takes what another clone has left, if that is newer: it knows a package by its place in
its workspace.
https://doc.rust-lang.org/nightly/nightly-rustc/cargo/core/compiler/fingerprint/index.html
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from components.providers.inputs import Build, Inputs, digest, local_artifacts, messages_of, write_json

Origins = dict[str, list[str]]


def doubtful(build: Build, read: Inputs | None, facts: str, memory: Path) -> set[Path]:
    """Give the sources of the artifacts that were there before and are not known to be made of these inputs.

    `facts` is what else decided about the build, `memory` where `remember` noted what it knows of.
    """
    known = _known(memory)
    return {
        Path(message["target"]["src_path"])
        for message in build.local_artifacts()
        if message["fresh"]
        and (read is None or known.get(_path(message)) != _origin(build, message, read, facts))
    }


def taken(output: str) -> set[Path]:
    """Give the sources of the artifacts that a build which failed took for fresh; `output` is cargo's."""
    artifacts = local_artifacts(messages_of(output))
    return {Path(message["target"]["src_path"]) for message in artifacts if message["fresh"]}


def remember(build: Build, read: Inputs, facts: str, memory: Path) -> None:
    """Note of what each artifact of the crate and its path dependencies was made."""
    made = {_path(message): _origin(build, message, read, facts) for message in build.local_artifacts()}
    write_json({**_known(memory), **made}, memory)


def _known(memory: Path) -> Origins:
    try:
        found: Origins = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _path(message: dict[str, Any]) -> str:
    return str(message["filenames"][0])


def _origin(build: Build, message: dict[str, Any], read: Inputs, facts: str) -> list[str]:
    """Give the sum of an artifact, and one over what it was made of: files of its package, and of none."""
    package = Path(message["manifest_path"]).parent
    # The innermost first: a package may lie in another one.
    packages = sorted(build.local_packages(), key=lambda directory: -len(directory.parts))
    sums = hashlib.sha256(f"{facts} {read.place}".encode())
    for name, sum_ in sorted(read.files.items()):
        path = Path(os.path.normpath(build.crate / name))
        owner = next((directory for directory in packages if path.is_relative_to(directory)), None)
        if owner in {None, package}:
            sums.update(f"\0{name}\0{sum_}".encode(errors="surrogateescape"))
    return [digest(Path(_path(message))), sums.hexdigest()]
