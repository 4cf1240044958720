"""The gRPC side, over a real connection to a plugin's process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from pulumi.runtime.proto import provider_pb2, provider_pb2_grpc, status_pb2

import localcloud.plugins
from localcloud.plugins.protocol import InitFailedError, _init_failed_status
from localcloud.plugins.values import from_struct, to_struct

PLUGINS = Path(localcloud.plugins.__file__).parent
URN = "urn:pulumi:dev::p::command:local:Command::it"


@pytest.fixture
def plugin() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    path = PLUGINS / "command" / "pulumi-resource-command"
    with subprocess.Popen(
        [path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def stub(plugin: subprocess.Popen[str]) -> Iterator[Any]:
    assert plugin.stdout is not None
    with grpc.insecure_channel(f"127.0.0.1:{int(plugin.stdout.readline())}") as channel:
        yield provider_pb2_grpc.ResourceProviderStub(channel)


def test_a_resource_goes_through_its_life(stub: Any) -> None:
    stub.Configure(provider_pb2.ConfigureRequest())
    inputs = to_struct({"create": "echo hi", "triggers": [1]})
    checked = stub.Check(provider_pb2.CheckRequest(urn=URN, news=inputs))
    assert not checked.failures
    created = stub.Create(provider_pb2.CreateRequest(urn=URN, properties=checked.inputs))
    assert from_struct(created.properties)["stdout"] == "hi"
    news = to_struct({"create": "echo hi", "triggers": [2]})
    diff = stub.Diff(
        provider_pb2.DiffRequest(
            urn=URN, id=created.id, olds=created.properties, old_inputs=inputs, news=news
        )
    )
    assert list(diff.replaces) == ["triggers[0]"]
    assert diff.detailedDiff["triggers[0]"].kind == provider_pb2.PropertyDiff.UPDATE_REPLACE
    stub.Delete(provider_pb2.DeleteRequest(urn=URN, id=created.id, properties=created.properties))


def test_a_users_fault_has_no_traceback(stub: Any) -> None:
    request = provider_pb2.CreateRequest(urn=URN, properties=to_struct({"create": "exit 7"}))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Create(request)
    assert caught.value.details() == 'exit status 7: running "exit 7":'
    # any code but UNKNOWN and INTERNAL: for these the engine thinks that the resource may exist
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_quietly(plugin: subprocess.Popen[str], number: int) -> None:
    assert plugin.stdout is not None
    plugin.stdout.readline()
    plugin.send_signal(number)
    assert plugin.wait(10) == 0
    assert plugin.stderr is not None
    assert plugin.stderr.read() == ""


def test_a_partial_failure_carries_the_state() -> None:
    error = InitFailedError("ns/pod", {"a": 1}, ["not ready", "an event"], {"b": 2})
    status = status_pb2.Status.FromString(_init_failed_status(error))
    detail = provider_pb2.ErrorResourceInitFailed()
    assert status.details[0].Unpack(detail)
    assert (detail.id, list(detail.reasons)) == ("ns/pod", ["not ready", "an event"])
    assert (from_struct(detail.properties), from_struct(detail.inputs)) == ({"a": 1}, {"b": 2})


@pytest.mark.parametrize("name", ["gcp", "kubernetes", "command"])
def test_every_plugin_starts_from_its_own_directory(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    path = PLUGINS / name / f"pulumi-resource-{name}"
    with subprocess.Popen(
        [path], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.terminate()
