"""The environment that points Pulumi, gcloud and Google's client libraries at localcloud."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from localcloud import endpoints
from localcloud.home import Config, Home

_PACKAGE = Path(__file__).resolve().parent
STAND_INS = ("gcp", "kubernetes", "command")


def variables(home: Home, config: Config) -> dict[str, str]:
    """Every variable to set, with its whole value (PATH too)."""
    stand_ins = [name for name in STAND_INS if not _official(name)]
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
        "PATH": _path(stand_ins),
    }
    if stand_ins:
        values["PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"] = "true"
    return values


def exports(home: Home, config: Config) -> str:
    """The variables as lines for a POSIX shell's `eval`."""
    return "".join(f"export {name}={_quoted(value)}\n" for name, value in variables(home, config).items())


def _quoted(value: str) -> str:
    quoted = shlex.quote(value)
    return quoted if quoted.startswith("'") else f"'{quoted}'"


def _official(name: str) -> bool:
    """Whether Pulumi would find the official plugin by itself: installed, or an executable on PATH."""
    home = Path(os.environ.get("PULUMI_HOME") or Path.home() / ".pulumi")
    if any(path.is_dir() for path in (home / "plugins").glob(f"resource-{name}-v*")):
        return True
    return shutil.which(f"pulumi-resource-{name}", path=os.pathsep.join(_foreign_path())) is not None


def _foreign_path() -> list[str]:
    """PATH without localcloud's own directories, so that a second `env` finds what the first one found."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return [entry for entry in entries if entry and not Path(entry).is_relative_to(_PACKAGE)]


def _path(stand_ins: list[str]) -> str:
    own = [str(_PACKAGE / "bin"), *(str(_PACKAGE / "plugins" / name) for name in stand_ins)]
    return os.pathsep.join([*own, *_foreign_path()])
