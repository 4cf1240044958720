"""The environment that points Pulumi, gcloud and Google's client libraries at localcloud."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from localcloud import endpoints
from localcloud.home import Config, Home
from localcloud.plugins import official

_PACKAGE = Path(__file__).resolve().parent
STAND_INS = ("gcp", "kubernetes", "command")


def variables(home: Home, config: Config) -> dict[str, str]:
    """Every variable to set, with its whole value (PATH too)."""
    plugins = {name: _official(name) for name in STAND_INS}
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
        "PATH": _path(plugins),
    }
    if None in plugins.values():
        values["PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"] = "true"
    return values


def exports(home: Home, config: Config) -> str:
    """The variables as lines for a POSIX shell's `eval`."""
    return "".join(f"export {name}={_quoted(value)}\n" for name, value in variables(home, config).items())


def _quoted(value: str) -> str:
    quoted = shlex.quote(value)
    return quoted if quoted.startswith("'") else f"'{quoted}'"


def _official(name: str) -> Path | None:
    """Where the official plugin is, if there is one that pulumi would take."""
    home = Path(os.environ.get("PULUMI_HOME") or Path.home() / ".pulumi")
    return official.directory(name, home, _foreign_path())


def _foreign_path() -> list[str]:
    """PATH without localcloud's own directories, so that a second `env` finds what the first one found."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return [entry for entry in entries if entry and not Path(entry).is_relative_to(_PACKAGE)]


def _path(plugins: dict[str, Path | None]) -> str:
    """PATH with the stand-ins first, and official plugins where another version would be found before."""
    foreign = _foreign_path()
    own = [str(_PACKAGE / "bin")]
    for name, found in plugins.items():
        first = shutil.which(f"pulumi-resource-{name}", path=os.pathsep.join(foreign))
        if found is None:
            own.append(str(_PACKAGE / "plugins" / name))
        elif first is not None and Path(first).parent != found:
            own.append(str(found))
    return os.pathsep.join([*own, *foreign])
