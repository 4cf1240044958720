"""Sees to Rust's standard library for wasm32-unknown-unknown: from rustup, or else from Debian's package."""

import os
import shutil
import subprocess
from pathlib import Path

from scripts.lib import paths
from scripts.lib.steps import Log, StepError, step

TARGET = "wasm32-unknown-unknown"
# Debian's second Rust, which comes with the sources that the standard library can be built from.
PACKAGES = ("rustc-web", "rust-web-src")


def _rustup_has_target() -> bool:
    command = ["rustup", "target", "list", "--installed"]
    answer = subprocess.run(command, cwd=paths.REPOSITORY, capture_output=True, text=True, check=False)
    return TARGET in answer.stdout.split()


def _packages_installed() -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    command = ["dpkg-query", "--show", "--showformat", "${db:Status-Status}\n", *PACKAGES]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.split() == ["installed"] * len(PACKAGES)


def _install(log: Log) -> str:
    try:
        log.run(["rustup", "target", "add", TARGET])
    except StepError:
        pass
    else:
        if _rustup_has_target():
            return "rustup"
    if _packages_installed():
        return "Debian's rust-web-src"
    install = f"apt-get install -y {' '.join(PACKAGES)}"
    if shutil.which("apt-get") is None:
        raise StepError(f"rustup could not add {TARGET}; once it can be reached: rustup target add {TARGET}")
    if os.geteuid() != 0:
        raise StepError(
            f"rustup could not add {TARGET}, and only root may install the package: sudo {install}"
        )
    log.run(["apt-get", "update"])
    log.run(install.split(), env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    return "Debian's rust-web-src"


def ensure_wasm_target() -> None:
    """Makes sure that the app can be compiled.

    Raises StepError when the standard library can come from neither rustup nor a package.
    """
    if not _rustup_has_target() and not _packages_installed():
        step(f"standard library for {TARGET}", _install, str)


def target_directory() -> Path:
    """One target directory for every crate, so that a dependency is compiled once."""
    return Path(os.environ.get("CARGO_TARGET_DIR") or paths.CACHE / "target")
