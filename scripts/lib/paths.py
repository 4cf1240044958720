"""Where things are: the checkout, the cache outside it, and the files of a run inside it."""

import hashlib
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    # The XDG specification: a relative path in these variables is invalid and is to be ignored.
    base = Path(value) if Path(value).is_absolute() else Path.home() / default
    return base / "awesome-wasm"


CACHE = _xdg("XDG_CACHE_HOME", ".cache")
PASSPHRASE = _xdg("XDG_CONFIG_HOME", ".config") / "passphrase"

# The files of a run live in the checkout, so that two clones on one machine do not meet.
LOCALCLOUD_HOME = REPOSITORY / ".localcloud"
STACKS = REPOSITORY / ".stacks"
LOGS = CACHE / "logs" / hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:12]
