"""What every handler works with: the call, the services behind it, and the table of served methods."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from localcloud.api.discovery import Method
from localcloud.api.errors import ApiError
from localcloud.api.operations import Operations
from localcloud.home import Config, Home
from localcloud.specs import Cluster, ClusterSpec, InstanceSpec, Part
from localcloud.store import Json, Store


class Backends(Protocol):
    """The real parts behind the records. Every function is synchronous and may be repeated.

    All of them raise `BackendError`.
    """

    def ensure_registry(self) -> str:
        """The registry's HOST:PORT; starts it if it does not run."""
        ...

    def delete_repository(self, prefix: str) -> None: ...

    def list_manifests(self, prefix: str) -> list[Json]:
        """Each manifest below PROJECT/REPOSITORY, with name, digest, tags, size, media_type and uploaded."""
        ...

    def create_cluster(self, spec: ClusterSpec) -> Cluster: ...

    def delete_cluster(self, name: str) -> None: ...

    def suspend_cluster(self, name: str) -> None:
        """End the API server of a cluster; `create_cluster` brings it back."""
        ...

    def cluster_version(self) -> str: ...

    def start_instance(self, spec: InstanceSpec) -> None: ...

    def stop_instance(self, spec: InstanceSpec) -> None: ...

    def delete_instance(self, spec: InstanceSpec) -> None: ...

    def change_alias_ranges(self, spec: InstanceSpec, ranges: tuple[str, ...]) -> None:
        """Give a running instance other alias ranges than those of `spec`: all of them, or none where one
        cannot be had.
        """
        ...

    def serial_output(self, spec: InstanceSpec) -> str: ...

    def parts(self) -> list[Part]:
        """What runs, by name."""
        ...

    def allocate_address(self, taken: set[str]) -> str:
        """A loopback address that is none of `taken`."""
        ...


@dataclass(frozen=True)
class Principal:
    """Who calls. `member` is the spelling of IAM policies (`user:…`, `serviceAccount:…`)."""

    email: str
    is_developer: bool

    @property
    def member(self) -> str:
        return f"{'user' if self.is_developer else 'serviceAccount'}:{self.email}"


@dataclass(frozen=True)
class Services:
    """One running localcloud."""

    home: Home
    config: Config
    store: Store
    backends: Backends
    operations: Operations


@dataclass(frozen=True)
class Call:
    """A checked request. `path` has the path's values under short names (`project`, `zone`, `instance`)."""

    method: Method
    path: dict[str, str]
    query: Json
    body: Json
    principal: Principal
    services: Services

    @property
    def project(self) -> str:
        return self.path["project"]

    @property
    def store(self) -> Store:
        return self.services.store

    def schema(self, name: str) -> dict[str, Json]:
        """The properties of one of the document's schemas."""
        properties: dict[str, Json] = self.method.document.schemas[name].get("properties", {})
        return properties


Handler = Callable[[Call], Json]
Task = Callable[[Services, Json], Json | None]


@dataclass
class Table:
    """Which function answers which method, and which does the work of which operation."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)

    def serves(self, *methods: str) -> Callable[[Handler], Handler]:
        """Decorator: the function answers these methods, by their ids in the discovery document."""

        def register(handler: Handler) -> Handler:
            for method in methods:
                self.handlers[method] = handler
            return handler

        return register

    def task(self, name: str) -> Callable[[Task], Task]:
        """Decorator: the function does the work of operations of this name; it must bear being repeated."""

        def register(task: Task) -> Task:
            self.tasks[name] = task
            return task

        return register

    def answer(self, call: Call) -> Json:
        """
        Raises:
            ApiError: 501, the method is Google's and is not served here; or what its handler raises.
        """
        handler = self.handlers.get(call.method.id)
        if handler is None:
            raise ApiError(501, f"localcloud does not serve the method {call.method.id}")
        return handler(call)


TABLE = Table()


def now() -> str:
    """The time as Compute Engine writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    """A numeric id, as Google's are: 64 bits, never zero."""
    return str(secrets.randbelow(2**62) + 2**62)


def stable_id(key: str) -> str:
    """The numeric id of something that is described from what else there is, the same every time."""
    return str(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))


def fingerprint(content: object) -> str:
    """A short hash of a JSON value in base64, for optimistic locking."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return base64.urlsafe_b64encode(digest[:8]).decode()
