"""Pulumi's generated messages without the SDK around them.

To import `pulumi.runtime.proto` runs all of the SDK first, most of a plugin's start. Here the packages
above it are found and not run; whoever imports the SDK afterwards gets the whole of it.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pulumi.runtime.proto import (
        engine_pb2,
        engine_pb2_grpc,
        plugin_pb2,
        provider_pb2,
        provider_pb2_grpc,
        status_pb2,
    )

__all__ = ["engine_pb2", "engine_pb2_grpc", "plugin_pb2", "provider_pb2", "provider_pb2_grpc", "status_pb2"]


def _messages() -> dict[str, ModuleType]:
    bare = [name for name in ("pulumi", "pulumi.runtime") if name not in sys.modules]
    try:
        for name in bare:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules[name] = importlib.util.module_from_spec(spec)
        return {name: importlib.import_module(f"pulumi.runtime.proto.{name}") for name in __all__}
    finally:
        for name in bare:
            sys.modules.pop(name, None)


globals().update(_messages())
