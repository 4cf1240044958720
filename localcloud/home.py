"""The state directory: where each part keeps its files, the configuration, locks and free ports.

config.json      port, developer token, project; readable by its owner alone
store.db         every resource, operation and policy (localcloud/store.py)
keys/            signing keys (localcloud/tokens.py, localcloud/signing.py)
supervisor/      the process supervisor's own files
registry/ clusters/NAME/ instances/NAME/    what the backends keep
logs/            one file a program
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from localcloud.sources import CHECKOUT

LOOPBACK = "127.0.0.1"
PROJECT = "localcloud-dev"
REGION = "europe-west1"
ZONE = "europe-west1-b"


class HomeError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Config:
    """What is decided at the first start and kept. `token` is the developer's access token."""

    port: int
    token: str
    project: str = PROJECT
    region: str = REGION
    zone: str = ZONE

    @property
    def user(self) -> str:
        """The developer's account, as Kubernetes and the IAM policies know it."""
        return f"developer@{self.project}.iam"

    @property
    def url(self) -> str:
        """The server's address without a trailing slash."""
        return f"http://{LOOPBACK}:{self.port}"


@dataclass(frozen=True)
class Home:
    """One state directory. Directories are made on first use, for their owner alone."""

    root: Path

    @classmethod
    def locate(cls) -> Home:
        """`$LOCALCLOUD_HOME`, else `.localcloud` beside this package."""
        given = os.environ.get("LOCALCLOUD_HOME", "")
        root = Path(given).expanduser() if given else CHECKOUT / ".localcloud"
        return cls(root.absolute())

    def directory(self, *parts: str) -> Path:
        """A directory below the root, made if it is missing.

        Raises:
            HomeError: it cannot be made.
        """
        path = self.root
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in parts:
                path = path / part
                path.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise HomeError(
                f"cannot use {path}: {error.strerror}; set LOCALCLOUD_HOME to a directory of yours"
            ) from error
        return path

    @property
    def network(self) -> str:
        """The first three numbers of the instances' addresses: two homes on a machine stay apart."""
        digest = hashlib.sha256(os.fsencode(self.root)).digest()
        return f"127.{64 + digest[0] % 128}.{digest[1]}"

    @property
    def store_path(self) -> Path:
        return self.root / "store.db"

    @property
    def config_path(self) -> Path:
        return self.root / "config.json"

    @property
    def supervisor(self) -> Path:
        return self.directory("supervisor")

    @property
    def logs(self) -> Path:
        return self.directory("logs")

    @property
    def keys(self) -> Path:
        return self.directory("keys")

    @property
    def registry(self) -> Path:
        return self.directory("registry")

    def cluster(self, name: str) -> Path:
        return self.directory("clusters", name)

    def instance(self, name: str) -> Path:
        return self.directory("instances", name)

    def config(self) -> Config | None:
        """The remembered configuration; None before the first start.

        Raises:
            HomeError: the file is there and is not what `save` wrote.
        """
        try:
            return Config(**json.loads(self.config_path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise HomeError(
                f"{self.config_path} is damaged ({error}); run: python -m localcloud reset"
            ) from error

    def require_config(self) -> Config:
        """Like `config`, for callers that run only after the first start."""
        config = self.config()
        if config is None:
            raise HomeError(f"nothing was started yet in {self.root}; run: python -m localcloud start")
        return config

    def save(self, config: Config) -> None:
        self.directory()
        write_private(self.config_path, json.dumps(asdict(config), indent=2) + "\n")

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock among all processes that use this directory; the kernel frees it at exit."""
        path = self.directory() / f"{name}.lock"
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def write_private(path: Path, text: str | bytes) -> None:
    """Write a file that its owner alone can read; a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
    temporary.replace(path)


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a TCP server could listen there now; who asks for `localhost` may be led to either family."""
    return all(_bindable(port, address) for address in ((host, "::1") if host == LOOPBACK else (host,)))


def _bindable(port: int, address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        # Without IPv6 nobody else is there either.
        return family == socket.AF_INET6 and error.errno != errno.EADDRINUSE
    return True
