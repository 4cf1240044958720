"""Where things are: the checkout, the cache outside it, and the files of a run inside it."""

import hashlib
import os

from localcloud.sources import CHECKOUT, xdg

REPOSITORY = CHECKOUT
CACHE = xdg("XDG_CACHE_HOME", ".cache")
PASSPHRASE = xdg("XDG_CONFIG_HOME", ".config") / "passphrase"

# The files of a run live in the checkout, so that two clones on one machine do not meet.
LOCALCLOUD_HOME = REPOSITORY / ".localcloud"
STACKS = REPOSITORY / ".stacks"
LOGS = CACHE / "logs" / hashlib.sha256(os.fsencode(REPOSITORY)).hexdigest()[:12]
