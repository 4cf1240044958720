"""Where a startup script runs that is not this checkout's own.

A real VM is the script's to spoil. Here it would have the user's files and rights, so that it gets a root
directory of its own by bubblewrap: /usr is the host's and read-only, everything else is the instance's
`guest/` and outlives a boot, but for /tmp, /run, /dev and /proc. It sees no process and no file of the host,
and keeps its network, as the metadata server is there. Services it cannot start: units are run outside.

This checkout's own script (components/startup.sh) is code of the checkout like the program itself. It writes
below its instance's directory only, and runs as it is everywhere.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

from localcloud.backends.rootfs import Rootfs
from localcloud.home import Home, write_private
from localcloud.sources import CHECKOUT
from localcloud.specs import InstanceSpec

_TRUSTED = "trusted-startup-scripts"  # SHA-256 sums, one a line
_OWN = CHECKOUT / "components" / "startup.sh"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What programs below /usr need of /etc; nothing here is a secret.
_ETC = (
    "alternatives",
    "ca-certificates",
    "ca-certificates.conf",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "nsswitch.conf",
    "protocols",
    "resolv.conf",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
)
_TOP = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
_KEPT = ("home", "opt", "root", "srv", "usr/local", "var")
_SCRIPT = "/run/startup-script"


def is_trusted(home: Home, text: str) -> bool:
    """Whether a script is this checkout's, or was when an instance of this home ran it first (after a
    `git pull` the instances still have the older one), or the user trusts it.
    """
    if _digest(text) in _trusted(home):
        return True
    if not _OWN.is_file() or _OWN.read_text(encoding="utf-8") != text:
        return False
    trust(home, text)
    return True


def trust(home: Home, text: str) -> None:
    """Have the instances of this home run a script as it is."""
    with home.lock("trusted-startup-scripts"):
        digests = sorted({*_trusted(home), _digest(text)})
        write_private(home.root / _TRUSTED, "\n".join(digests) + "\n")


def _trusted(home: Home) -> list[str]:
    try:
        return (home.root / _TRUSTED).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def refusal() -> str:
    """Why nothing can be confined on this machine; empty if it can."""
    if platform.system() != "Linux":
        return f"bubblewrap confines on Linux only, and this is {platform.system()}"
    if shutil.which("bwrap") is None:
        return "there is no bwrap on PATH (on Debian and Ubuntu: apt install bubblewrap)"
    command = [
        "bwrap",
        *_namespaces("probe"),
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "/usr/bin/env",
        "true",
    ]
    try:
        tried = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap cannot be run: {error}"
    return tried.stderr.strip() or f"bwrap ends with status {tried.returncode}" if tried.returncode else ""


def command(rootfs: Rootfs, spec: InstanceSpec, script: Path, words: tuple[str, ...]) -> list[str]:
    """The command that runs a script, confined: `words` are its interpreter, before the script's path."""
    guest = rootfs.root / "guest"
    binds = ["--ro-bind", "/usr", "/usr"]
    for name in _KEPT:
        # Nothing is mounted below one of these: a link that a guest left there would lead the mount out.
        (guest / name).mkdir(parents=True, exist_ok=True)
        binds += ["--bind", str(guest / name), f"/{name}"]
    for name in _TOP:
        path = Path("/", name)
        if path.is_symlink():
            binds += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            binds += ["--ro-bind", str(path), str(path)]
    for name in ("/etc", "/run", "/tmp"):  # noqa: S108
        binds += ["--tmpfs", name]
    for name in _ETC:
        binds += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name, line in (("passwd", "root:x:0:0:root:/root:/bin/sh"), ("group", "root:x:0:")):
        path = rootfs.root / "tmp" / name
        path.write_text(f"{line}\n")
        binds += ["--ro-bind", str(path), f"/etc/{name}"]
    # A root that is the host's owns /proc/sys and /proc/sysrq-trigger, whatever capabilities it has lost.
    binds += ["--dev", "/dev", "--proc", "/proc", "--remount-ro", "/proc"]
    binds += ["--ro-bind", str(script), _SCRIPT, "--chdir", "/"]
    environment = {
        "PATH": _PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "HOSTNAME": spec.hostname,
        "GCE_METADATA_HOST": rootfs.metadata_host(spec),
    }
    variables = [word for key, value in environment.items() for word in ("--setenv", key, value)]
    return ["bwrap", *_namespaces(spec.name), *binds, "--clearenv", *variables, *words, _SCRIPT]


def _namespaces(hostname: str) -> list[str]:
    """All but the network. Root inside is the caller outside, without any capability."""
    options = [
        "--unshare-user",
        "--uid",
        "0",
        "--gid",
        "0",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-cgroup-try",
    ]
    options += ["--unshare-uts", "--hostname", hostname, "--cap-drop", "ALL"]
    return [*options, "--die-with-parent", "--new-session"]
