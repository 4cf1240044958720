"""The virtual environment, in the cache and keyed by the lock file and the Python that it is made with."""

import ast
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
# What a user may tell pip: from where to install, and how to get there. What, and to where, is ours to say.
_SOURCES = (
    "cache-dir",
    "cert",
    "client-cert",
    "extra-index-url",
    "find-links",
    "index-url",
    "keyring-provider",
    "no-index",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
)
_INSTALLERS = re.compile(
    r"PIP_|UV_(?!(DEFAULT_INDEX|INDEX|INDEX_\w+|EXTRA_INDEX_URL|FIND_LINKS|INSECURE_HOST|OFFLINE|HTTP_\w+)$)"
)


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
    environment = _sources(pip)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            log.run([*install, "--requirement", str(UV), "--target", f"{scratch}/uv"], env=environment)
            # Its cache beside the environment: files are linked from it, and only those links stay.
            uv = [f"{scratch}/uv/bin/uv", "--no-config", "--cache-dir", f"{scratch}/cache", "pip", "install"]
            what = ["--python", python, "--require-hashes", "--requirement", str(LOCK_FILE)]
            log.run([*uv, *what], env=environment)
        except StepError:
            # Not for this platform, or it does not reach what pip does.
            log.run([*install, "--requirement", str(LOCK_FILE)], env=environment)
    # The last thing: an environment without it was interrupted and is made anew.
    (target / "complete").touch()
    return target


def _sources(pip: Sequence[str]) -> dict[str, str]:
    """An environment in which pip and uv ask, and believe, whom the user has them ask, and do as we say."""
    variables = {key: f"PIP_{key.replace('-', '_').upper()}" for key in _SOURCES}
    # Not the others: some change what this tells, too.
    wanted = {*variables.values(), "PIP_CONFIG_FILE"}
    given = {name: os.environ[name] for name in os.environ if name in wanted or not name.startswith("PIP_")}
    asked = subprocess.run([*pip, "config", "list"], env=given, capture_output=True, text=True, check=False)
    told: dict[str, str] = {}
    for place in ("global", "install", ":env:"):  # what stands later goes before
        found = re.findall(rf"^{place}\.([\w-]+)=(['\"].*)$", asked.stdout, re.MULTILINE)
        told |= {key: ast.literal_eval(value) for key, value in found if key in _SOURCES}
    names = {"UV_DEFAULT_INDEX": "index-url", "SSL_CERT_FILE": "cert"}
    return {
        **{name: told[key] for name, key in names.items() if key in told},
        **{name: value for name, value in os.environ.items() if not _INSTALLERS.match(name)},
        **{variables[key]: value for key, value in told.items()},
        "PIP_CONFIG_FILE": os.devnull,  # no file is read besides
    }


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
                pip = [str(directory() / "bin" / "python"), "-m", "pip"]
                install = [*pip, "--disable-pip-version-check", "--no-input", "install", "--no-compile"]
                what = [
                    "--no-deps",
                    "--require-hashes",
                    "--requirement",
                    str(lock_file),
                    "--target",
                    str(made),
                ]
                step("policy pack", lambda log: log.run([*install, *what], env=_sources(pip)))
                made.rename(target)
    return target
