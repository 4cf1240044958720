"""Every request that the gcp stand-in makes is one of Google's: its method, path, query and body are in the
discovery documents. What is asked is the creation of every type with every property, the change of each, and
the deletion.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import googleapiclient
import pytest

from localcloud.plugins.gcp import tables
from localcloud.plugins.gcp.fields import Field, Type, Update
from localcloud.plugins.gcp.provider import GcpProvider
from localcloud.plugins.gcp.rest import Google
from localcloud.plugins.gcp.tables import TYPES, ResourceType
from localcloud.plugins.protocol import Resource
from localcloud.plugins.values import Properties

DOCUMENTS = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
VERSIONS = {"compute": "beta", "container": "v1beta1", "artifactregistry": "v1", "iam": "v1"}
VERSIONS |= {"cloudresourcemanager": "v1", "serviceusage": "v1"}
DISK = "https://www.googleapis.com/compute/v1/projects/p/zones/z/disks/vm"
LIVE: dict[str, Any] = {
    "name": "n",
    "bindings": [{"role": "roles/aaaaaa", "members": ["aaaaaa"]}],
    "status": "RUNNING",
    "state": "ENABLED",
    "email": "aaaaaa@p.iam.gserviceaccount.com",
    "projectId": "p",
    "machineType": "x/e2-small",
    "metadata": {"fingerprint": "f"},
    "tags": {"fingerprint": "f"},
    "fingerprint": "f",
    "nats": [{"name": "aaaaaa"}],
    "labelFingerprint": "f",
    "disks": [{"boot": True, "autoDelete": True, "deviceName": "d", "source": DISK}],
    "networkInterfaces": [{"name": "nic0", "accessConfigs": [{"name": "external-nat"}]}],
}
KNOWN: dict[str, Properties] = {
    tables.REPOSITORY_IAM_MEMBER.token: {"role": "roles/aaaaaa"},
    tables.PROJECT_IAM_MEMBER.token: {"role": "roles/aaaaaa"},
    tables.NODE_POOL.token: {"cluster": "c", "initialNodeCount": 1},
    tables.SUBNETWORK.token: {"ipCidrRange": "10.0.0.0/24"},
}


@functools.cache
def document(service: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCUMENTS / f"{service}.{VERSIONS[service]}.json").read_text())
    return found


def methods(resources: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for resource in resources.values():
        yield from resource.get("methods", {}).values()
        yield from methods(resource.get("resources", {}))


def method_of(service: str, verb: str, path: str) -> dict[str, Any] | None:
    """The discovery document's method of a request."""
    prefix = {"compute": ""}.get(service, f"{VERSIONS[service]}/")
    for method in methods(document(service)["resources"]):
        flat = re.sub(r"{[^}]+}", "[^/:]+", str(method.get("flatPath", method["path"])))
        flat = flat.replace("$", "").removeprefix(prefix)
        if method["httpMethod"] == verb and re.fullmatch(flat, path):
            found: dict[str, Any] = method
            return found
    return None


class Checked(Google):
    """Google that takes every request that it has, and works at once."""

    def __init__(self) -> None:
        super().__init__({})
        self.created = False
        self.made: list[str] = []

    def call(self, service: str, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        found = method_of(service, method, path)
        assert found is not None, f"Google has no {method} {path}"
        general = document(service)["parameters"]
        assert set(query or {}) <= set(found.get("parameters", {})) | set(general), (found["id"], query)
        if service == "compute" and method != "GET":
            assert "requestId" in found["parameters"], found["id"]
        if body is not None:
            self._check_body(document(service)["schemas"], found["request"]["$ref"], body, found["id"])
        self.made.append(found["id"])
        if method == "GET" or path.endswith(":getIamPolicy"):
            shown = document(service)["schemas"][found["response"]["$ref"]]["properties"]
            return {name: part for name, part in LIVE.items() if name in shown}
        self.created = True
        return {"name": "operation-1", "status": "DONE", "done": True}

    def get(self, service: str, path: str, query: Any = None) -> Any:
        answer = self.call(service, "GET", path, None, query)
        return answer if self.created or "/images/" in path else None

    def _check_body(self, schemas: Any, name: str, body: Any, where: str) -> None:
        properties = schemas[name].get("properties", {})
        for key, value in body.items():
            assert key in properties, f"{where}: {name} has no {key}"
            place = properties[key].get("items", properties[key])
            for inner in value if isinstance(value, list) else [value]:
                if "$ref" in place and isinstance(inner, dict):
                    self._check_body(schemas, place["$ref"], inner, where)


def value(declared: Field, other: bool) -> Any:  # noqa: PLR0911 - one a type
    """A value of a property, or another one that can be changed to in place."""
    if declared.enum:
        return declared.enum[-1] if other else declared.enum[0]
    match declared.type:
        case Type.STRING:
            if declared.name == "ipCidrRange":
                return "10.0.0.0/20" if other else "10.0.0.0/24"
            return "bbbbbb" if other else "aaaaaa"
        case Type.INT | Type.INT64:
            return 20 if other else 10
        case Type.BOOL:
            return other
        case Type.MAP:
            return {"k": "b" if other else "a"}
        case Type.STRINGS:
            return ["b" if other else "a"]
    inner = {
        f.name: value(f, other and f.update is not Update.REPLACE) for f in declared.fields if not f.output
    }
    return inner if declared.type is Type.OBJECT else [inner]


def everything(spec: ResourceType) -> Properties:
    """Inputs with every property but those that exclude another one."""
    excluded = {"metadataStartupScript", "denies", "nodeCount"}
    inputs = {f.name: value(f, False) for f in spec.fields if not f.output and f.name not in excluded}
    return {**inputs, **KNOWN.get(spec.token, {}), "deletionProtection": False}


def provider() -> tuple[GcpProvider, Checked]:
    made, google = GcpProvider(), Checked()
    made.configure({"project": "p", "region": "r", "zone": "z", "accessToken": "t"})
    made._google = google
    return made, google


@pytest.mark.parametrize("token", TYPES)
def test_a_resource_is_made_and_deleted_by_requests_that_google_has(token: str) -> None:
    made, google = provider()
    resource = Resource(f"urn:pulumi:dev::p::{token}::it")
    item, state = made.create(resource, everything(TYPES[token]), preview=False)
    made.delete(Resource(resource.urn, item), {**state, "deletionPolicy": "DELETE"}, {})
    assert google.made


IN_PLACE = [
    (token, declared)
    for token, spec in TYPES.items()
    for declared in spec.fields
    if not declared.output and declared.update in (Update.PATCH, Update.OWN)
] + [(tables.INSTANCE.token, tables.INSTANCE.field(name)) for name in ("bootDisk", "networkInterfaces")]


@pytest.mark.parametrize(
    ("token", "declared"), IN_PLACE, ids=[f"{t.rsplit(':')[-1]}.{f.name}" for t, f in IN_PLACE]
)
def test_a_property_is_changed_by_requests_that_google_has(token: str, declared: Field) -> None:
    made, google = provider()
    google.created = True
    old = {**everything(TYPES[token]), "allowStoppingForUpdate": True}
    if declared.name == "nodeCount":
        old.pop("initialNodeCount")
    new = {**old, declared.name: value(declared, True)}
    item = made._served(Resource(f"urn:pulumi:dev::p::{token}::it")).item(
        {"project": "p", "region": "r", "zone": "z", "location": "l", **old}
    )
    made.update(Resource(f"urn:pulumi:dev::p::{token}::it", item), {}, old, new, preview=False)
    changes = [name for name in google.made if not name.endswith((".get", "getIamPolicy", ".list"))]
    assert changes, google.made
