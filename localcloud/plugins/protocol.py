"""Pulumi's provider protocol: a `Provider` to implement with plain values, and the gRPC server in front of
it.

It stands on the SDK's generated messages rather than on `pulumi.provider.experimental`, because that server
cannot carry unknown values (its marshal raises on them, so no preview), drops the old inputs of a diff, an
update and a delete, has no partial failure (created, but not ready), and puts a traceback into every error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import grpc  # type: ignore[import-untyped]
from google.protobuf import any_pb2, empty_pb2  # type: ignore[import-untyped]

from localcloud.plugins import sdk
from localcloud.plugins.values import (
    UNKNOWN,
    Change,
    Path,
    Properties,
    compare,
    from_struct,
    path_text,
    plain,
    to_struct,
)

with sdk.not_run():
    from pulumi.runtime.proto import (
        engine_pb2,
        engine_pb2_grpc,
        plugin_pb2,
        provider_pb2,
        provider_pb2_grpc,
        status_pb2,
    )

# The engine asks for up to this many resources at once, each may wait for minutes.
_WORKERS = 64
_MAX_MESSAGE_BYTES = 400 * 1024 * 1024  # as the SDK's own servers
_KINDS = {
    (Change.ADD, False): provider_pb2.PropertyDiff.ADD,
    (Change.ADD, True): provider_pb2.PropertyDiff.ADD_REPLACE,
    (Change.DELETE, False): provider_pb2.PropertyDiff.DELETE,
    (Change.DELETE, True): provider_pb2.PropertyDiff.DELETE_REPLACE,
    (Change.UPDATE, False): provider_pb2.PropertyDiff.UPDATE,
    (Change.UPDATE, True): provider_pb2.PropertyDiff.UPDATE_REPLACE,
}


class ProviderError(Exception):
    """A fault to show to the user as it is: what failed, on what, what to do next."""


class CancelledError(ProviderError):
    """The user interrupted the update."""


class GoneError(ProviderError):
    """What was created is not there any more."""


class InitFailedError(Exception):
    """The resource exists but did not become ready: the engine keeps it in the state, the next update carries
    on.

    `properties` is its state, `inputs` its inputs where they were read from the live resource.
    """

    def __init__(
        self, resource_id: str, properties: Properties, reasons: list[str], inputs: Properties
    ) -> None:
        super().__init__(reasons[0])
        self.resource_id = resource_id
        self.properties = properties
        self.reasons = reasons
        self.inputs = inputs


@contextlib.contextmanager
def kept(resource_id: str, properties: Properties, inputs: Properties) -> Iterator[None]:
    """For what follows a creation: whatever goes wrong in it, the resource stays in the state."""
    try:
        yield
    except (InitFailedError, GoneError):
        raise
    except ProviderError as error:
        raise InitFailedError(resource_id, properties, [str(error)], inputs) from error
    except Exception as error:
        reason = f"bug in the stand-in: {error!r}\n{traceback.format_exc()}"
        raise InitFailedError(resource_id, properties, [reason], inputs) from error


@dataclass(frozen=True)
class Failure:
    """An input that is refused. `path` names it (empty: the resource as a whole)."""

    path: Path
    reason: str


@dataclass
class Checked:
    """Inputs with defaults filled in, and what is wrong with them."""

    inputs: Properties
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Diff:
    """Changed places; those in `replace` cannot be changed in place."""

    changes: dict[Path, Change] = field(default_factory=dict)
    replace: frozenset[Path] = frozenset()
    delete_before_replace: bool = False
    stables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resource:
    """What a request is about. `timeout` in seconds, 0 where the user set none; `ignored` are the properties
    whose changes an update leaves alone (ignoreChanges).
    """

    urn: str
    resource_id: str = ""
    timeout: float = 0
    ignored: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        """`gcp:compute/network:Network`, without the types of its parents."""
        return self.urn.split("::")[2].split("$")[-1]

    @property
    def name(self) -> str:
        """The name in the program."""
        return self.urn.split("::", 3)[3]


@dataclass(frozen=True)
class ReadResult:
    """A live resource: its state, and the inputs it would have today. An empty id says that it is gone."""

    resource_id: str = ""
    properties: Properties = field(default_factory=dict)
    inputs: Properties = field(default_factory=dict)


class Provider(ABC):
    """One plugin. Every method may raise `ProviderError`; all but `configure` run on many threads at once."""

    name: str
    version: str

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._engine: engine_pb2_grpc.EngineStub | None = None

    def attach(self, engine_address: str) -> None:
        """Connects to the engine's log."""
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
        self._engine = engine_pb2_grpc.EngineStub(grpc.insecure_channel(engine_address, options=options))

    def status(self, message: str) -> None:
        """Shows at the resource that this thread works on what is waited for."""
        urn = getattr(_at_work, "urn", "")
        if urn:
            self.log(urn, message, status=True)

    def log(self, urn: str, message: str, *, warning: bool = False, status: bool = False) -> None:
        """Shows a message at the resource; a `status` one only while the resource is worked on."""
        if self._engine is None:
            return
        severity = engine_pb2.WARNING if warning else engine_pb2.INFO
        request = engine_pb2.LogRequest(severity=severity, urn=urn, message=message, ephemeral=status)
        try:
            self._engine.Log(request, timeout=5)
        except grpc.RpcError:
            self._engine = None  # an engine that went away needs no messages

    def check_config(self, inputs: Properties) -> Checked:
        """Validates the provider's own configuration (values may be JSON in strings)."""
        return Checked(inputs)

    def diff_config(self, old: Properties, new: Properties) -> Diff:
        """What a changed configuration means for the resources; by default they stay, and the next calls go
        by it: without a change the engine configures the plugin with what it knew before.
        """
        return Diff(compare(old, new))

    @abstractmethod
    def configure(self, config: Properties) -> None:
        """Takes the configuration. Nothing here is unknown; connections are better made at first use."""

    @abstractmethod
    def check(self, resource: Resource, old: Properties, new: Properties, seed: bytes) -> Checked:
        """Validates inputs and fills in defaults (names too). Values may be unknown or secret."""

    @abstractmethod
    def diff(self, resource: Resource, state: Properties, old: Properties, new: Properties) -> Diff:
        """Compares inputs. `state` is what create, update or read returned."""

    @abstractmethod
    def create(self, resource: Resource, inputs: Properties, *, preview: bool) -> tuple[str, Properties]:
        """Creates; returns id and state. In a preview nothing is done and what is not known is `UNKNOWN`."""

    @abstractmethod
    def read(self, resource: Resource, state: Properties, inputs: Properties) -> ReadResult:
        """Reads what is there (refresh; with no inputs and no state: an import)."""

    @abstractmethod
    def update(
        self, resource: Resource, state: Properties, old: Properties, new: Properties, *, preview: bool
    ) -> Properties:
        """Updates in place; returns the state."""

    @abstractmethod
    def delete(self, resource: Resource, state: Properties, inputs: Properties) -> None:
        """Deletes, and waits until it is gone. One that is gone already is no error."""

    def invoke(self, token: str, args: Properties) -> Properties:  # noqa: ARG002
        """Runs a function."""
        raise ProviderError(
            f"function {token} is not served by the stand-in for the plugin '{self.name}'{self._hint}"
        )

    @property
    def _hint(self) -> str:
        return f"; `pulumi plugin install resource {self.name}` installs the official plugin"

    def refuse_type(self, token: str, served: Iterable[str]) -> NoReturn:
        """Refuses a resource type by name."""
        what = ", ".join(sorted(served))
        raise ProviderError(
            f"{token} is not served by the stand-in for '{self.name}' (it serves {what}){self._hint}"
        )


def config_value(value: Any) -> Any:
    """A configuration value: the engine hands over anything but a string as JSON in a string."""
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except ValueError:
            return value
        return decoded if isinstance(decoded, bool | int | float | list | dict) else value
    return value


# A request runs on one thread, so that what is deep below it can show what it waits for.
_at_work = threading.local()

Request = TypeVar("Request")
Response = TypeVar("Response")


def _guarded(
    method: Callable[[_Servicer, Request, grpc.ServicerContext], Response],
) -> Callable[[_Servicer, Request, grpc.ServicerContext], Response]:
    """Turns what a provider raises into gRPC's statuses, as the engine understands them."""

    def call(self: _Servicer, request: Request, context: grpc.ServicerContext) -> Response:
        _at_work.urn = getattr(request, "urn", "")
        try:
            return method(self, request, context)
        except ProviderError as error:
            # not UNKNOWN or INTERNAL: for these the engine assumes that the resource may or may not exist
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except InitFailedError as error:
            context.set_trailing_metadata((("grpc-status-details-bin", _init_failed_status(error)),))
            context.abort(grpc.StatusCode.UNKNOWN, str(error))
        except Exception as error:  # the boundary: anything else is a bug, reported with its place
            text = f"bug in the stand-in for '{self.provider.name}': {error!r}\n{traceback.format_exc()}"
            context.abort(grpc.StatusCode.INTERNAL, text)
        raise AssertionError("abort raises")

    return call


def _init_failed_status(error: InitFailedError) -> bytes:
    detail = any_pb2.Any()
    detail.Pack(
        provider_pb2.ErrorResourceInitFailed(
            id=error.resource_id,
            properties=to_struct(error.properties),
            inputs=to_struct(error.inputs),
            reasons=error.reasons,
        )
    )
    status = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=str(error), details=[detail])
    return bytes(status.SerializeToString())


class _Servicer(provider_pb2_grpc.ResourceProviderServicer):
    """The gRPC service; one line of translation a call."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    @_guarded
    def Handshake(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True)

    @_guarded
    def Attach(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.provider.attach(request.address)
        return empty_pb2.Empty()

    @_guarded
    def GetPluginInfo(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return plugin_pb2.PluginInfo(version=self.provider.version)

    @_guarded
    def GetSchema(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        schema = {"name": self.provider.name, "version": self.provider.version}
        return provider_pb2.GetSchemaResponse(schema=json.dumps(schema))

    @_guarded
    def CheckConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return _check_response(self.provider.check_config(from_struct(request.news)))

    @_guarded
    def DiffConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        old = request.old_inputs if request.old_inputs.fields else request.olds
        return _diff_response(self.provider.diff_config(from_struct(old), from_struct(request.news)))

    @_guarded
    def Configure(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        config = {k: config_value(v) for k, v in plain(from_struct(request.args)).items()}
        self.provider.configure(config)
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True)

    @_guarded
    def Invoke(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        result = to_struct(self.provider.invoke(request.tok, plain(from_struct(request.args))))
        return provider_pb2.InvokeResponse(**{"return": result})

    @_guarded
    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        old, new = from_struct(request.olds), from_struct(request.news)
        return _check_response(self.provider.check(Resource(request.urn), old, new, request.randomSeed))

    @_guarded
    def Diff(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        old, new = from_struct(request.old_inputs), from_struct(request.news)
        resource = Resource(request.urn, request.id)
        return _diff_response(self.provider.diff(resource, from_struct(request.olds), old, new))

    @_guarded
    def Create(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        resource = Resource(request.urn, timeout=request.timeout)
        inputs = from_struct(request.properties)
        resource_id, state = self.provider.create(resource, inputs, preview=request.preview)
        return provider_pb2.CreateResponse(id=resource_id, properties=to_struct(state))

    @_guarded
    def Read(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        resource = Resource(request.urn, request.id, request.timeout)
        result = self.provider.read(resource, from_struct(request.properties), from_struct(request.inputs))
        if not result.resource_id:
            return provider_pb2.ReadResponse()
        state, inputs = to_struct(result.properties), to_struct(result.inputs)
        return provider_pb2.ReadResponse(id=result.resource_id, properties=state, inputs=inputs)

    @_guarded
    def Update(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        resource = Resource(request.urn, request.id, request.timeout, tuple(request.ignoreChanges))
        state, old = from_struct(request.olds), from_struct(request.old_inputs)
        new = from_struct(request.news)
        updated = self.provider.update(resource, state, old, new, preview=request.preview)
        return provider_pb2.UpdateResponse(properties=to_struct(updated))

    @_guarded
    def Delete(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        resource = Resource(request.urn, request.id, request.timeout)
        self.provider.delete(resource, from_struct(request.properties), from_struct(request.old_inputs))
        return empty_pb2.Empty()

    @_guarded
    def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.provider.cancelled.set()
        return empty_pb2.Empty()


def _check_response(checked: Checked) -> Any:
    failures = [
        provider_pb2.CheckFailure(property=path_text(f.path), reason=f.reason) for f in checked.failures
    ]
    return provider_pb2.CheckResponse(inputs=to_struct(checked.inputs), failures=failures)


def _diff_response(diff: Diff) -> Any:
    detailed = {
        path_text(path): provider_pb2.PropertyDiff(kind=_KINDS[change, path in diff.replace], inputDiff=True)
        for path, change in diff.changes.items()
    }
    some = provider_pb2.DiffResponse.DIFF_SOME if diff.changes else provider_pb2.DiffResponse.DIFF_NONE
    return provider_pb2.DiffResponse(
        changes=some,
        replaces=sorted(path_text(p) for p in diff.replace),
        stables=diff.stables,
        diffs=sorted({str(path[0]) for path in diff.changes}),
        deleteBeforeReplace=diff.delete_before_replace,
        detailedDiff=detailed,
        hasDetailedDiff=True,
    )


def unknown_where_absent(state: Properties, computed: Iterable[str]) -> Properties:
    """A previewed state: every computed output that has no value yet is unknown."""
    return {**{name: UNKNOWN for name in computed if name not in state}, **state}


def serve(provider: Provider) -> None:
    """Serves on a free loopback port, written to stdout as the engine expects, until a signal."""
    parser = argparse.ArgumentParser(description=f"stand-in for the Pulumi plugin '{provider.name}'")
    parser.add_argument("engine", nargs="?", help="the engine's address, host:port")
    known, _ = parser.parse_known_args()
    options = [(f"grpc.max_{way}_message_length", _MAX_MESSAGE_BYTES) for way in ("send", "receive")]
    server = grpc.server(futures.ThreadPoolExecutor(_WORKERS), options=options)
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(_Servicer(provider), server)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    if known.engine:
        provider.attach(known.engine)
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    parent = os.getppid()
    while not stop.wait(1) and os.getppid() == parent:
        pass  # an engine that was killed cannot stop its plugins: this one goes by itself
    provider.cancelled.set()  # waits in flight end with an error of their own within the grace period
    server.stop(grace=5).wait()
