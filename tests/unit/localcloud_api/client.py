"""Backends that only remember what was asked of them, and a client of an API in this process."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from localcloud.api import discovery
from localcloud.api.message import Message
from localcloud.api.server import Api
from localcloud.specs import BackendError, Cluster, ClusterSpec, InstanceSpec, Part
from tests.unit.localcloud_api.conformance import problems

TOKEN = "developer-token"


@dataclass
class FakeBackends:
    """Remembers calls. `fail` makes a function raise; while `gate` is closed, work on backends waits; `full`
    stands for a full disk.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    fail: set[str] = field(default_factory=set)
    full: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    console: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    def _note(self, function: str, on: str) -> None:
        self.gate.wait(30)
        self.calls.append((function, on))
        if function in self.fail:
            raise BackendError(f"{function} of {on} failed on purpose")
        if self.full and function in ("create_cluster", "start_instance", "ensure_registry"):
            raise OSError(errno.ENOSPC, "No space left on device")

    def ensure_registry(self) -> str:
        self._note("ensure_registry", "")
        return "127.0.0.1:5000"

    def delete_repository(self, prefix: str) -> None:
        self._note("delete_repository", prefix)

    def list_manifests(self, prefix: str) -> list[dict[str, Any]]:
        return [item for item in self.manifests if item["name"].startswith(f"{prefix}/")]

    def create_cluster(self, spec: ClusterSpec) -> Cluster:
        self._note("create_cluster", spec.name)
        return Cluster("127.0.0.1:6443", "-----BEGIN CERTIFICATE-----\n", "1.37.2")

    def parts(self) -> list[Part]:
        return [Part("api", "RUNNING", 1)]

    def delete_cluster(self, name: str) -> None:
        self._note("delete_cluster", name)

    def suspend_cluster(self, name: str) -> None:
        self._note("suspend_cluster", name)

    def cluster_version(self) -> str:
        return "1.37.2"

    def start_instance(self, spec: InstanceSpec) -> None:
        self._note("start_instance", spec.name)

    def stop_instance(self, spec: InstanceSpec) -> None:
        self._note("stop_instance", spec.name)

    def delete_instance(self, spec: InstanceSpec) -> None:
        self._note("delete_instance", spec.name)

    def change_alias_ranges(self, spec: InstanceSpec, ranges: tuple[str, ...]) -> None:
        self._note("change_alias_ranges", f"{spec.name} {','.join(spec.alias_ranges)} > {','.join(ranges)}")

    def serial_output(self, spec: InstanceSpec) -> str:
        return self.console or f"{spec.name} says héllo\n"

    def allocate_address(self, taken: set[str]) -> str:
        return next(f"127.9.0.{last}" for last in range(1, 255) if f"127.9.0.{last}" not in taken)


@dataclass
class Client:
    """Calls an `Api` as a client does, and waits for operations."""

    api: Api
    backends: FakeBackends
    token: str = TOKEN

    def send(
        self, verb: str, path: str, body: object = None, *, query: str = "", token: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The status and body of one request; `path` is below the root (`/compute/v1/…`)."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.token if token is None else token}"}
        status, answer = self.api.answer(Message(verb, path, query, content, headers))
        if status == 200 and "fields=" not in query and "enum-encoding" not in query:
            found = problems(discovery.match(verb, path)[0], answer)
            assert not found, found[:5]
        return status, answer

    def ok(self, verb: str, path: str, body: object = None, *, query: str = "") -> dict[str, Any]:
        status, answer = self.send(verb, path, body, query=query)
        assert status == 200, answer
        return answer

    def error(self, code: int, verb: str, path: str, body: object = None, *, query: str = "") -> str:
        """The message of a request that must fail with `code`."""
        status, answer = self.send(verb, path, body, query=query)
        assert status == code, answer
        assert answer["error"]["code"] == code
        message: str = answer["error"]["message"]
        assert answer["error"]["errors"][0]["message"] == message
        return message

    def done(self, operation: dict[str, Any]) -> dict[str, Any]:
        """A Compute Engine or Kubernetes Engine operation when it is done."""
        path = "/" + re.sub(r"https://(?:www|(\w+))\.googleapis\.com/", r"\1/", operation["selfLink"]).lstrip(
            "/"
        )
        if path.startswith("/compute/"):
            return self.ok("POST", f"{path}/wait")
        return self._wait(path, lambda body: body["status"] == "DONE")

    def done_registry(self, operation: dict[str, Any]) -> dict[str, Any]:
        """An Artifact Registry operation when it is done."""
        return self._wait(f"/artifactregistry/v1/{operation['name']}", lambda body: body.get("done"))

    def _wait(self, path: str, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        name = path.rpartition("/")[2]
        records = [
            record
            for kind in ("container.operations", "artifactregistry.operations")
            for record in self.api.services.store.list(kind)
            if record.name == name
        ]
        self.api.services.operations.wait(records[0].key, 30)
        body = self.ok("GET", path)
        assert condition(body)
        return body

    def create(self, path: str, body: object, *, query: str = "") -> dict[str, Any]:
        """Insert, wait, and give the operation, which must have succeeded."""
        operation = self.done(self.ok("POST", path, body, query=query))
        assert "error" not in operation, operation
        return operation


COMPUTE = "/compute/v1/projects/localcloud-dev"
ZONE = f"{COMPUTE}/zones/europe-west1-b"
REGION = f"{COMPUTE}/regions/europe-west1"
LOCATION = "projects/localcloud-dev/locations/europe-west1"
CLUSTERS = "/container/v1/projects/localcloud-dev/locations/europe-west1-b/clusters"
REPOSITORIES = f"/artifactregistry/v1/{LOCATION}/repositories"
ACCOUNTS = "/iam/v1/projects/localcloud-dev/serviceAccounts"


def instance(name: str = "vm", **fields: Any) -> dict[str, Any]:
    """The smallest instance that Google takes, with `fields` over it."""
    return {
        "name": name,
        "machineType": "zones/europe-west1-b/machineTypes/e2-small",
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "initializeParams": {"sourceImage": "projects/debian-cloud/global/images/family/debian-12"},
            }
        ],
        "networkInterfaces": [{"network": "global/networks/default", "accessConfigs": [{}]}],
        **fields,
    }
