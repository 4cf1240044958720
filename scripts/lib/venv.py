"""The virtual environment, in the cache and keyed by the lock file and the Python that it is made with."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.lib import paths
from scripts.lib.steps import Log, StepError, lock, step

LOCK_FILE = paths.REPOSITORY / "requirements.txt"
UV = Path(__file__).with_name("uv.txt")


def directory() -> Path:
    """The environment's place: another lock file or another Python is another place."""
    digest = hashlib.sha256(LOCK_FILE.read_bytes())
    digest.update(f"{sys.version_info[:3]} {sys.base_prefix}".encode())
    return paths.CACHE / "venvs" / digest.hexdigest()[:12]


def _make(target: Path, log: Log) -> Path:
    log.run([sys.executable, "-m", "venv", "--clear", target])
    python = str(target / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # What is compiled here is never read: PYTHONPYCACHEPREFIX leads elsewhere, and to what is imported only.
    install = [*pip, "install", "--no-compile", "--require-hashes"]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            log.run([*install, "--requirement", str(UV), "--target", f"{scratch}/uv"])
            # Its cache beside the environment: files are linked from it, and only those links stay.
            uv = [f"{scratch}/uv/bin/uv", "--cache-dir", f"{scratch}/cache", "pip", "install"]
            what = ["--python", python, "--require-hashes", "--requirement", str(LOCK_FILE)]
            log.run([*uv, *what], env=_as_pip(pip))
        except StepError:
            # Not for this platform, or it does not reach what pip does.
            log.run([*install, "--requirement", str(LOCK_FILE)])
    # The last thing: an environment without it was interrupted and is made anew.
    (target / "complete").touch()
    return target


def _as_pip(pip: Sequence[str]) -> dict[str, str]:
    """An environment in which uv asks the index, and believes the certificates, that pip is told to."""
    asked = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False)
    told: dict[str, str] = {}
    for place in ("global", "install", ":env:"):  # what stands later goes before
        told |= re.findall(rf"^{place}\.(index-url|cert)='(.*)'$", asked.stdout, re.MULTILINE)
    names = {"UV_DEFAULT_INDEX": "index-url", "SSL_CERT_FILE": "cert"}
    return {**{name: told[key] for name, key in names.items() if key in told}, **os.environ}


def is_complete() -> bool:
    """Whether the environment is there."""
    return (directory() / "complete").is_file()


def ensure() -> Path:
    """Makes the environment if it is not complete, and gives its directory.

    Raises StepError when it cannot be made.
    """
    target = directory()
    if not is_complete():
        with lock(target.with_suffix(".lock")):
            if not is_complete():
                shutil.rmtree(target, ignore_errors=True)
                step("virtual environment", lambda log: _make(target, log))
    return target


def policies_directory() -> Path:
    """Where that is what policy/ needs besides the environment."""
    lock_file = paths.REPOSITORY / "policy" / "requirements.txt"
    digest = hashlib.sha256(lock_file.read_bytes() + directory().name.encode()).hexdigest()[:12]
    return paths.CACHE / "venvs" / f"policy-{digest}"


def policies() -> Path:
    """The directory, for PYTHONPATH, with what policy/ needs besides the environment; made if it is missing.

    Raises StepError when it cannot be made.
    """
    lock_file = paths.REPOSITORY / "policy" / "requirements.txt"
    target = policies_directory()
    if not target.is_dir():
        with lock(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            if not target.is_dir():
                made = Path(scratch) / "policy"
                pip = [
                    str(directory() / "bin" / "python"),
                    "-m",
                    "pip",
                    "install",
                    "--disable-pip-version-check",
                ]
                what = [
                    "--no-input",
                    "--no-compile",
                    "--no-deps",
                    "--require-hashes",
                    "--requirement",
                    str(lock_file),
                ]
                step("policy pack", lambda log: log.run([*pip, *what, "--target", made]))
                made.rename(target)
    return target
