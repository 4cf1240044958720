"""Artifact Registry's storage: CNCF distribution under the supervisor, its files below registry/ of the home.

Who may do what is decided by localcloud's token endpoint (localcloud/tokens.py); the registry checks the
tokens.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
import socket
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from localcloud.backends.ports import owner, remembered_ports
from localcloud.backends.processes import wait_until
from localcloud.backends.supervisor import Program, Supervisor
from localcloud.home import LOOPBACK, Home, write_private
from localcloud.specs import BackendError
from localcloud.tokens import registry_auth

PROGRAM = "registry"
_HELD: dict[int, socket.socket] = {}
_PREFIX = re.compile(r"[a-z0-9][a-z0-9._:-]*/[a-z0-9][a-z0-9._-]*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def ensure_registry(home: Home, supervisor: Supervisor) -> str:
    """Keep the registry running and wait until it answers.

    Returns:
        its `HOST:PORT`, the same one each time.

    Raises:
        BackendError: it does not answer.
    """
    directory = home.registry
    port = remembered_ports(directory / "ports.json", "http")["http"]
    auth = registry_auth(home)
    configuration = {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": True}},
        # No cache of blob descriptors: a deleted repository is gone at once.
        "storage": {
            "filesystem": {"rootdirectory": str(directory / "storage")},
            "delete": {"enabled": True},
            "maintenance": {
                "uploadpurging": {"enabled": True, "age": "24h", "interval": "1h", "dryrun": False}
            },
        },
        "http": {"addr": f"{LOOPBACK}:{port}", "secret": _secret(directory), "draintimeout": "5s"},
        "auth": {
            "token": {
                "realm": auth.realm,
                "service": auth.service,
                "issuer": auth.issuer,
                "jwks": str(auth.jwks_path),
                "signingalgorithms": ["ES256"],
            }
        },
    }
    path = directory / "config.yml"
    text = json.dumps(configuration, indent=1)  # JSON is YAML
    changed = not path.exists() or path.read_text() != text
    write_private(path, text)
    _hold(port)
    was_known = supervisor.state(PROGRAM) != "ABSENT"
    supervisor.add(
        Program(
            PROGRAM,
            ("registry", "serve", str(path)),
            {"OTEL_TRACES_EXPORTER": "none"},
            directory=str(directory),
            scope="registry",
            priority=10,
        )
    )
    if changed and was_known:
        supervisor.restart(PROGRAM)
    if not wait_until(lambda: _answers(port), 20):
        raise BackendError(
            f"the registry does not answer on {LOOPBACK}:{port}; see {home.logs / 'registry.log'}"
        )
    return f"localhost:{port}"


def _hold(port: int) -> None:
    """Keeps `[::1]:PORT` from everybody else for as long as this process lives: `localhost` may lead there.

    Nobody listens there, so a client goes on to 127.0.0.1.

    Raises:
        BackendError: another program has it.
    """
    if port in _HELD:
        return
    try:
        held = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return  # no IPv6
    try:
        held.bind(("::1", port))
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise BackendError(
                f"[::1]:{port}, which `localhost:{port}` may lead to, is taken{owner(port)}; end that program"
            ) from error
        return
    _HELD[port] = held


def delete_repository(home: Home, prefix: str) -> None:
    """Remove PROJECT/REPOSITORY with every image in it. The blobs can no longer be reached.

    Raises:
        BackendError: `prefix` is no PROJECT/REPOSITORY, or a file cannot be removed.
    """
    directory = _repository(home, prefix)
    # Renamed first: a pull sees the whole repository or none of it.
    away = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        directory.rename(away)
        shutil.rmtree(away)
    except FileNotFoundError:
        return
    except OSError as error:
        raise BackendError(f"cannot remove {directory}: {error.strerror}") from error


def list_manifests(home: Home, prefix: str) -> list[dict[str, Any]]:
    """Every manifest below PROJECT/REPOSITORY, by name and digest.

    Each with `name` (PROJECT/REPOSITORY/IMAGE), `digest`, `tags`, `size` (bytes of config and layers),
    `blobs` (digest and size of itself and of each of those), `media_type` and `uploaded` (RFC 3339).
    """
    found = []
    for revisions in sorted(_repository(home, prefix).glob("**/_manifests/revisions/sha256")):
        manifests = revisions.parents[1]
        name = manifests.parent.relative_to(_repositories(home)).as_posix()
        tags: dict[str, list[str]] = {}
        for link in sorted(manifests.glob("tags/*/current/link")):
            tags.setdefault(link.read_text().strip(), []).append(link.parents[1].name)
        for link in sorted(revisions.glob("*/link")):
            digest = link.read_text().strip()
            document = _manifest(home, digest)
            if document is not None:
                found.append(
                    {
                        "name": name,
                        "digest": digest,
                        "tags": tags.get(digest, []),
                        "size": _size(home, document),
                        "blobs": [{"digest": digest, "size": _length(home, digest)}, *_parts(document)],
                        "media_type": document.get("mediaType", ""),
                        "uploaded": datetime.fromtimestamp(link.stat().st_mtime, UTC).isoformat(),
                    }
                )
    return found


def _repositories(home: Home) -> Path:
    return home.registry / "storage/docker/registry/v2/repositories"


def _repository(home: Home, prefix: str) -> Path:
    if not _PREFIX.fullmatch(prefix):
        raise BackendError(f"{prefix!r} is not PROJECT/REPOSITORY")
    return _repositories(home) / prefix


def _manifest(home: Home, digest: str) -> dict[str, Any] | None:
    if not _DIGEST.fullmatch(digest):
        return None
    try:
        document: dict[str, Any] = json.loads(_blob(home, digest).read_text())
    except (OSError, ValueError):
        return None
    return document


def _blob(home: Home, digest: str) -> Path:
    value = digest.removeprefix("sha256:")
    return home.registry / "storage/docker/registry/v2/blobs/sha256" / value[:2] / value / "data"


def _length(home: Home, digest: str) -> int:
    try:
        return _blob(home, digest).stat().st_size
    except OSError:
        return 0


def _parts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The blobs that a manifest names, each with its digest and size."""
    items = [manifest.get("config"), *manifest.get("layers", [])]
    return [{"digest": item["digest"], "size": int(item["size"])} for item in items if item]


def _size(home: Home, manifest: dict[str, Any], levels: int = 2) -> int:
    """The bytes of config and layers; of an index, those of the manifests in it."""
    own: int = sum(part["size"] for part in _parts(manifest))
    for item in manifest.get("manifests", []) if levels else []:
        inner = _manifest(home, item["digest"])
        own += _size(home, inner, levels - 1) if inner is not None else 0
    return own


def _secret(directory: Path) -> str:
    """Signs the state of unfinished uploads; kept, so that they go on after a restart."""
    path = directory / "http.secret"
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    return path.read_text()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/v2/", timeout=2) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
