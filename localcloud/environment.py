"""The environment that points Pulumi, gcloud and Google's client libraries at localcloud."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from localcloud import endpoints
from localcloud.home import Config, Home
from localcloud.plugins import official
from localcloud.sources import CHECKOUT

_PACKAGE = CHECKOUT / "localcloud"
# A proxy would take a loopback address for one of its own machine.
_DIRECT = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
# Each client has its own idea of which one counts; the last is gRPC's, which then reads no other.
NO_PROXY = ("NO_PROXY", "no_proxy", "no_grpc_proxy")
STAND_INS = ("gcp", "kubernetes", "command")


USERS_PULUMI_HOME = "LOCALCLOUD_USERS_PULUMI_HOME"
"""Environment variable: PULUMI_HOME as it was before it led to localcloud's; empty where it was not set."""


def variables(home: Home, config: Config) -> dict[str, str]:
    """Every variable to set, with its whole value (PATH too)."""
    users = users_pulumi_home()
    values = {
        "LOCALCLOUD_HOME": str(home.root),
        "GOOGLE_OAUTH_ACCESS_TOKEN": config.token,
        **endpoints.of_plugin(config.url),
        "PULUMI_GCP_SKIP_REGION_VALIDATION": "true",
        "CLOUDSDK_AUTH_ACCESS_TOKEN": config.token,
        **endpoints.of_gcloud(config.url),
        "CLOUDSDK_CORE_PROJECT": config.project,
        "CLOUDSDK_COMPUTE_REGION": config.region,
        "CLOUDSDK_COMPUTE_ZONE": config.zone,
        "PATH": os.pathsep.join([str(_PACKAGE / "bin"), *_foreign_path()]),
        "PULUMI_HOME": str(_pulumi_home(home)),
        # What is on PATH would be taken before what is installed, with a warning at every command.
        "PULUMI_IGNORE_AMBIENT_PLUGINS": "true",
        "PULUMI_CREDENTIALS_PATH": os.environ.get("PULUMI_CREDENTIALS_PATH") or str(_or_default(users)),
        USERS_PULUMI_HOME: users,
        **without_proxy(home),
    }
    if None in _plugins().values():
        values["PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"] = "true"
    return values


def without_proxy(home: Home) -> dict[str, str]:
    """Keeps the clients of this home away from a proxy; what the user has them keep away from stays.

    The addresses of the first instances are named one by one for curl before 7.86, which knows no networks.
    """
    given = [os.environ.get(name, "") for name in NO_PROXY]
    users = [entry.strip() for entry in ",".join(given).split(",")]
    own = [*_DIRECT, *(f"{home.network}.{last}" for last in range(2, 6))]
    return dict.fromkeys(NO_PROXY, ",".join(dict.fromkeys(filter(None, [*users, *own]))))


def exports(home: Home, config: Config) -> str:
    """The variables as lines for a POSIX shell's `eval`, with what they lead to."""
    install_plugins(home)
    return "".join(f"export {name}={_quoted(value)}\n" for name, value in variables(home, config).items())


def install_plugins(home: Home) -> None:
    """Links the plugins to where pulumi looks for what it installed, in a home of this run's own.

    What was linked for an SDK of another version stays: a stack that was made with it asks for it once more.
    """
    for name, found in _plugins().items():
        version = official.asked_for(name) or "0.0.0"
        directory = _pulumi_home(home) / "plugins" / f"resource-{name}-v{version}"
        # pulumi takes a link to a directory for no plugin
        directory.mkdir(parents=True, exist_ok=True)
        executable = f"pulumi-resource-{name}"
        link, wanted = directory / executable, (found or _PACKAGE / "plugins" / name) / executable
        _link(link, wanted)
    # which stack of which project is selected
    workspaces = _or_default(users_pulumi_home()) / "workspaces"
    workspaces.mkdir(parents=True, exist_ok=True, mode=0o700)
    _link(_pulumi_home(home) / workspaces.name, workspaces)


def _link(link: Path, wanted: Path) -> None:
    if link.is_symlink() and link.readlink() == wanted:
        return
    scratch = link.with_name(f".{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(wanted)
    scratch.replace(link)


def users_pulumi_home() -> str:
    """PULUMI_HOME as the user has it, also where an earlier `env` has set another one; may be empty."""
    given, run = os.environ.get("PULUMI_HOME", ""), os.environ.get("LOCALCLOUD_HOME", "")
    if given and run and Path(given) == _pulumi_home(Home(Path(run))):
        return os.environ.get(USERS_PULUMI_HOME, "")
    return given


def _quoted(value: str) -> str:
    quoted = shlex.quote(value)
    return quoted if quoted.startswith("'") else f"'{quoted}'"


def _pulumi_home(home: Home) -> Path:
    return home.root / "pulumi"


def _or_default(pulumi_home: str) -> Path:
    return Path(pulumi_home) if pulumi_home else Path.home() / ".pulumi"


def _plugins() -> dict[str, Path | None]:
    """Where the official plugin of each name is, if there is one that counts."""
    home = _or_default(users_pulumi_home())
    return {name: official.directory(name, home, _foreign_path()) for name in STAND_INS}


def _foreign_path() -> list[str]:
    """PATH without localcloud's own directories, so that a second `env` finds what the first one found."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return [entry for entry in entries if entry and not Path(entry).is_relative_to(_PACKAGE)]
