"""The environment that pulumi, kubectl and the tests run in; ./scripts/env prints it for working by hand."""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from localcloud import endpoints
from localcloud import environment as localcloud
from localcloud.home import Config, Home
from scripts.lib import paths, rust, toolchain, venv
from scripts.lib.steps import StepError

KUBECONFIG = paths.LOCALCLOUD_HOME / "kubeconfig"
# Python's would load other modules than ours, or end them; git's lead to another repository. Pulumi would
# prefer this passphrase to the file, and fail to decrypt the state with it.
_FOREIGN = re.compile(
    r"PYTHON\w*|PULUMI_CONFIG_PASSPHRASE|GIT_(DIR|WORK_TREE|COMMON_DIR|INDEX_FILE|OBJECT_DIRECTORY|NAMESPACE|PREFIX)"
)
# Also taken out where localcloud is the cloud: another stack, another project, other credentials.
_FOREIGN_TO_LOCALCLOUD = re.compile(r"(PULUMI|GOOGLE|GCLOUD|CLOUDSDK|GCE|KUBE)_\w+|USER_PROJECT_OVERRIDE")
_KEPT = re.compile(r"PULUMI_(HOME|CREDENTIALS_PATH|ACCESS_TOKEN|PARALLEL|K8S_\w+)|CLOUDSDK_(CONFIG|PYTHON)")
STACK = "local"
_IS_FISH = "type set_color >/dev/null 2>&1"
# What every shell has of its own.
_SHELL = ("_", "PWD", "OLDPWD", "SHLVL")


def passphrase_file() -> Path:
    """The file with the passphrase of this machine's stacks: made once, readable by its user alone."""
    path = paths.PASSPHRASE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = path.with_name(f".passphrase-{os.getpid()}")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            # Linked and not renamed: of two runs at once, the second one takes the first one's.
            os.link(scratch, path)
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
    if path.stat().st_mode & 0o077:
        raise StepError(f"{path} can be read by others; it is a secret: chmod 600 {shlex.quote(str(path))}")
    return path


def _pulumi_home() -> Path:
    """Where pulumi keeps its logs and the selected stack: in the cache, with the plugins of the user."""
    given = localcloud.users_pulumi_home()
    if given:
        return Path(given)
    home, plugins = paths.CACHE / "pulumi", Path.home() / ".pulumi" / "plugins"
    home.mkdir(parents=True, exist_ok=True)
    if plugins.is_dir() and not (home / "plugins").exists():
        (home / "plugins").symlink_to(plugins)
    return home


def base(tools: Sequence[Path]) -> dict[str, str]:
    """What holds before localcloud runs: tools and libraries on PATH, where the stacks and the caches are."""
    environment = venv.directory()
    path = [environment / "bin", *tools, os.environ.get("PATH", os.defpath)]
    return {
        "PATH": os.pathsep.join(map(str, path)),
        "VIRTUAL_ENV": str(environment),
        # Not the current directory: its name may have a `:`, which ends an entry.
        "PYTHONPATH": str(paths.REPOSITORY),
        "PYTHONPYCACHEPREFIX": str(paths.CACHE / "pycache"),
        "PYTHONUTF8": "1",
        "CARGO_TARGET_DIR": str(rust.target_directory()),
        "LOCALCLOUD_HOME": str(paths.LOCALCLOUD_HOME),
        "KUBECONFIG": str(KUBECONFIG),
        "PULUMI_HOME": str(_pulumi_home()),
        "PULUMI_BACKEND_URL": f"file://{paths.STACKS}",
        "PULUMI_CONFIG_PASSPHRASE_FILE": str(passphrase_file()),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        # The salt of the encryption is this machine's own: it stays in the state, not in the committed file.
        "PULUMI_FALLBACK_TO_STATE_SECRETS_MANAGER": "true",
        **localcloud.without_proxy(Home(paths.LOCALCLOUD_HOME)),
    }


def _users(*, for_localcloud: bool) -> dict[str, str]:
    """What the user's environment has that does not change what our programs do."""
    kept = {key: value for key, value in os.environ.items() if not _FOREIGN.fullmatch(key)}
    if for_localcloud:
        kept = {
            key: value
            for key, value in kept.items()
            if _KEPT.fullmatch(key) or not _FOREIGN_TO_LOCALCLOUD.fullmatch(key)
        }
    if "TMPDIR" in kept:
        kept["TMPDIR"] = tempfile.gettempdir()  # another one where nothing can be written in the user's
    return kept


def before_localcloud(*, tests: bool = False) -> dict[str, str]:
    """A whole process environment for what needs no localcloud."""
    return {**_users(for_localcloud=True), **base(toolchain.directories(tests=tests))}


def before_tools() -> dict[str, str]:
    """A whole process environment for what needs libraries and no tool of ours."""
    return {**_users(for_localcloud=True), **base([])}


def complete(*, tests: bool = False) -> dict[str, str]:
    """A whole process environment with what localcloud adds: endpoints, credentials, plugins.

    Raises StepError when localcloud was never started.
    """
    start = before_localcloud(tests=tests)
    answer = subprocess.run(
        [python(), "-m", "localcloud", "env", "--json"],
        cwd=paths.REPOSITORY,
        env=start,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0 or not answer.stdout:
        raise StepError(
            f"localcloud has no environment to give: {answer.stderr.strip()}\n  ./scripts/up starts it"
        )
    # Which stack is selected depends on the name that pulumi's directory was entered by.
    return {**start, **json.loads(answer.stdout), "PULUMI_STACK": STACK}


def for_google() -> dict[str, str]:
    """A whole process environment for a stack on Google: tools and libraries, and nothing of localcloud.

    What an earlier eval of localcloud's environment set is taken out, so that nothing of that stack ends up
    on this machine; what the user set for Google stays.
    """
    found = {**_users(for_localcloud=False), **base(toolchain.directories(tests=False))}
    path = [
        entry
        for entry in found["PATH"].split(os.pathsep)
        if not Path(entry).is_relative_to(paths.REPOSITORY / "localcloud")
    ]
    names = {*localcloud.variables(Home(paths.LOCALCLOUD_HOME), Config(0, "")), "KUBECONFIG"}
    names -= {"PULUMI_HOME"}
    # Which products have a variable depends on the packages that localcloud's own Python sees.
    names |= {name for name in os.environ if endpoints.is_variable(name)}
    names |= {"PULUMI_STACK"}
    names -= {*localcloud.NO_PROXY}  # pulumi talks to its plugins on loopback there too
    users = (
        {} if "LOCALCLOUD_HOME" in os.environ else {key: os.environ[key] for key in names & os.environ.keys()}
    )
    tools = {key: value for key, value in found.items() if key not in names}
    return {**tools, **users, "PATH": os.pathsep.join(path)}


def clean() -> dict[str, str]:
    """Takes what is foreign out of this process' environment, which its children get; gives what it was."""
    given = dict(os.environ)
    for key in given:
        if _FOREIGN.fullmatch(key):
            del os.environ[key]
    return given


def exports(wanted: Mapping[str, str], given: Mapping[str, str]) -> str:
    """Lines for the eval of sh, bash, zsh and fish: what differs from the shell's environment."""
    changed = {
        key: value for key, value in sorted(wanted.items()) if given.get(key) != value and key not in _SHELL
    }
    gone = sorted(key for key in given if key not in wanted and key not in _SHELL)
    lines = []
    if gone:
        # fish has `export` and no `unset`; it is the one with this builtin.
        lines = [f"{_IS_FISH} && set -e {' '.join(gone)}", f"{_IS_FISH} || unset {' '.join(gone)}"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in changed.items()]
    return "\n".join(lines)


def python() -> str:
    """The virtual environment's Python; this one's, where there is none yet."""
    found = venv.directory() / "bin" / "python"
    return str(found) if found.exists() else sys.executable
