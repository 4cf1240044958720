"""Pulumi's mocks for the component tests: what the program registered, as plain data, without an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml
from pulumi.runtime import mocks, rpc, test

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Registered:
    """One resource as the engine was told of it; `inputs` as sent, secrets still in their envelope."""

    name: str
    type: str
    inputs: dict[str, Any]
    parent: str = ""
    dependencies: list[str] = field(default_factory=list)
    secret_outputs: list[str] = field(default_factory=list)
    delete_before_replace: bool = False
    replace_with: list[str] = field(default_factory=list)
    replace_on_changes: list[str] = field(default_factory=list)
    replacement_trigger: list[Any] = field(default_factory=list)
    ignore_changes: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    property_dependencies: dict[str, list[str]] = field(default_factory=dict)
    deleted_with: str = ""

    def is_secret(self, key: str) -> bool:
        """Say whether an input was sent as a secret."""
        return rpc.is_rpc_secret(self.inputs[key])

    def plain(self, key: str) -> Any:
        """Give an input without its envelope."""
        return rpc.unwrap_rpc_secret(self.inputs[key])


# One of ECDSA P-256.
PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOTfGE1RYa2UAuX4uK2ONFFeYuaIR
7OsF4N8yLj35bSgqFAa2JmWr8u5Zr907zfx6yrRFVSGucyUloz3ZVmmO2g==
-----END PUBLIC KEY-----
"""


class Cloud(mocks.Mocks):
    """Gives each resource the outputs that the cloud would compute."""

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        """Answer with the inputs and, for the few types that the program reads from, computed values."""
        computed: dict[str, dict[str, Any]] = {
            "gcp:artifactregistry/repository:Repository": {
                "registryUri": "europe-west1-docker.pkg.dev/p/" + str(args.inputs.get("repositoryId"))
            },
            "gcp:compute/address:Address": {"address": "203.0.113.7"},
            "gcp:compute/disk:Disk": {"selfLink": "https://example.test/disks/krustlet-1-disk"},
            "gcp:compute/instance:Instance": {
                "instanceId": "4242",
                "creationTimestamp": "2026-01-01T00:00:00.000-00:00",
                "networkInterfaces": [
                    {"networkIp": "10.10.0.2", "accessConfigs": [{"natIp": "203.0.113.7"}]}
                ],
            },
            "gcp:serviceaccount/account:Account": {"email": "node@p.iam.gserviceaccount.com"},
            "gcp:container/cluster:Cluster": {
                "endpoint": "198.51.100.1",
                "masterAuth": {"clusterCaCertificate": "Q0E="},
            },
            "command:local:Command": {"stdout": "6469693230"},
            "kubernetes:core/v1:Pod": {"metadata": {**args.inputs.get("metadata", {}), "uid": "pod-uid"}},
            "pulumi-python:dynamic/cargo:Build": {
                "sha256": "ab" * 32,
                "size": 72000,
            },
            "pulumi-python:dynamic/oci:Artifact": {
                "digest": "sha256:" + "12" * 32,
                "image": f"{args.inputs.get('repository')}@sha256:" + "12" * 32,
            },
            "pulumi-python:dynamic/oci:Signature": {"signature_digest": "sha256:" + "34" * 32},
            "pulumi-python:dynamic/oci:Attestation": {"attestation_digest": "sha256:" + "56" * 32},
            "pulumi-python:dynamic/signature:Key": {"private_key": "PRIVATE", "public_key": PUBLIC_KEY},
            "pulumi-python:dynamic/signature:Signature": {
                "payload": "{}",
                "signature": "c2ln",
                "bundle_signature": "c2ln",
            },
            "pulumi-python:dynamic/registration:BootstrapToken": {"token": "abcdef.0123456789abcdef"},
            "pulumi-python:dynamic/registration:NodeRegistration": {"uid": "node-uid"},
        }
        return f"{args.name}-id", {**args.inputs, **computed.get(args.typ, {})}

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        """Answer the one function that the program calls, where it has several nodes."""
        if args.token == "gcp:compute/getZones:getZones":
            return {**args.args, "id": "z", "names": [f"europe-west1-{letter}" for letter in "bcd"]}, []
        raise AssertionError(f"the program called {args.token}")


class Monitor(mocks.MockMonitor):
    """Pulumi's mock monitor, which also remembers what it was asked to register."""

    def __init__(self) -> None:
        super().__init__(Cloud())
        self.registered: dict[str, Registered] = {}
        self.outputs: dict[str, dict[str, Any]] = {}

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802 - the name is gRPC's
        """Remember a resource and register it."""
        self.registered[request.name] = Registered(
            request.name,
            request.type,
            rpc.deserialize_properties(request.object, True),
            request.parent.rsplit("::", 1)[-1],
            [urn.rsplit("::", 1)[-1] for urn in request.dependencies],
            list(request.additionalSecretOutputs),
            request.deleteBeforeReplace,
            [urn.rsplit("::", 1)[-1] for urn in request.replace_with],
            list(request.replaceOnChanges),
            rpc.deserialize_property(request.replacement_trigger.list_value),
            list(request.ignoreChanges),
            [alias.spec.name for alias in request.aliases],
            {
                key: [urn.rsplit("::", 1)[-1] for urn in found.urns]
                for key, found in request.propertyDependencies.items()
            },
            request.deletedWith.rsplit("::", 1)[-1],
        )
        return super().RegisterResource(request)  # type: ignore[no-untyped-call]

    def RegisterResourceOutputs(self, request: Any) -> Any:  # noqa: N802 - the name is gRPC's
        """Remember a component's outputs."""
        name = request.urn.rsplit("::", 1)[-1]
        self.outputs[name] = rpc.deserialize_properties(request.outputs, True)
        return super().RegisterResourceOutputs(request)  # type: ignore[no-untyped-call]


Run = Callable[[Callable[[], Any]], Monitor]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a piece of a program to its end and give what it registered."""

    def runner(program: Callable[[], Any]) -> Monitor:
        monitor = Monitor()
        mocks.set_mocks(monitor.mocks, project="awesome-wasm", stack="test", monitor=monitor)
        test(program)()  # type: ignore[no-untyped-call]
        return monitor

    yield runner
    pulumi.runtime.set_all_config({})


@pytest.fixture(scope="module")
def defaults() -> dict[str, str]:
    """Give the configuration of Pulumi.yaml and Pulumi.local.yaml, as the engine hands it to a program."""
    project = yaml.safe_load((REPOSITORY / "Pulumi.yaml").read_text())
    stack = yaml.safe_load((REPOSITORY / "Pulumi.local.yaml").read_text())["config"]
    declared = {f"awesome-wasm:{key}": _text(value["default"]) for key, value in project["config"].items()}
    return {**declared, **{key: _text(value) for key, value in stack.items()}}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list) else str(value)
