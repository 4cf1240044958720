"""Pulumi's property values as plain Python, and what a provider does with them: compare, project, keep
secrets.

A value is JSON (None, bool, int, float, str, list, dict), `UNKNOWN` (not known before an update ran) or a
`Secret` around any of these. Assets and archives stay the dicts that the wire carries, so that they compare
by their hash.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import struct_pb2  # type: ignore[import-untyped]

Value = Any
Properties = dict[str, Value]
Path = tuple[str | int, ...]

# The wire's own names, fixed by Pulumi's sdk (go/common/resource/sig and plugin/rpc.go).
SIGNATURE = "4dabf18193072939515e22adb298388d"
_SECRET = "1b47061264138c4ac30d75fd1eb44270"  # noqa: S105
_OUTPUT = "d0e6a833031e9bbcd3f4e8bde6ca49a4"
_UNKNOWNS = {
    "04da6b54-80e4-46f7-96ec-b56ff0331ba9",  # any kind of value
    "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",  # bool
    "3eeb2bf0-c639-47a8-9e75-3b44932eb421",  # number
    "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",  # array
    "030794c1-ac77-496b-92df-f27374a8bd58",  # asset
    "e48ece36-62e2-4504-bad9-02848725956a",  # archive
    "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",  # object
}
_UNKNOWN_WIRE = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"


class Unknown(enum.Enum):
    """The type of `UNKNOWN`, an enum so that there is exactly one."""

    UNKNOWN = "<unknown>"


UNKNOWN = Unknown.UNKNOWN


@dataclass(frozen=True)
class Secret:
    """A value that the engine keeps encrypted in the state and out of the display."""

    value: Value


class Change(enum.Enum):
    """What happened to one property between an old and a new tree."""

    ADD = "add"
    DELETE = "delete"
    UPDATE = "update"


def from_struct(struct: struct_pb2.Struct) -> Properties:
    """The wire's properties as plain values; nulls at the top level are dropped, as no property has one."""
    return {k: v for k, v in ((k, _from_wire(v)) for k, v in struct.fields.items()) if v is not None}


def _from_wire(value: struct_pb2.Value) -> Value:
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return UNKNOWN if value.string_value in _UNKNOWNS else value.string_value
        case "list_value":
            return [_from_wire(v) for v in value.list_value.values]
        case "struct_value":
            return _from_wire_struct(value.struct_value.fields)
    return None


def _from_wire_struct(fields: Mapping[str, struct_pb2.Value]) -> Value:
    signature = fields[SIGNATURE].string_value if SIGNATURE in fields else None
    if signature == _SECRET:
        return Secret(_from_wire(fields["value"]))
    if signature == _OUTPUT:
        inner = _from_wire(fields["value"]) if "value" in fields else UNKNOWN
        return Secret(inner) if "secret" in fields and fields["secret"].bool_value else inner
    return {k: _from_wire(v) for k, v in fields.items()}


def to_struct(properties: Mapping[str, Value]) -> struct_pb2.Struct:
    """Plain values as the wire's properties. The inverse of `from_struct`."""
    return struct_pb2.Struct(fields={k: _to_wire(v) for k, v in properties.items() if v is not None})


def _to_wire(value: Value) -> struct_pb2.Value:  # noqa: PLR0911 - one a kind
    if value is UNKNOWN:
        return struct_pb2.Value(string_value=_UNKNOWN_WIRE)
    if isinstance(value, Secret):
        fields = {SIGNATURE: struct_pb2.Value(string_value=_SECRET), "value": _to_wire(value.value)}
        return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))
    if value is None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, int | float):
        return struct_pb2.Value(number_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    if isinstance(value, list | tuple):
        return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[_to_wire(v) for v in value]))
    if isinstance(value, Mapping):
        fields = {str(k): _to_wire(v) for k, v in value.items()}
        return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))
    raise TypeError(f"a property value cannot be a {type(value).__name__}")


def plain(value: Value) -> Value:
    """The value without its secret marks."""
    if isinstance(value, Secret):
        return plain(value.value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value


def _anywhere(value: Value, test: Callable[[Value], bool]) -> bool:
    if test(value):
        return True
    if isinstance(value, Secret):
        return _anywhere(value.value, test)
    if isinstance(value, dict):
        return any(_anywhere(v, test) for v in value.values())
    return isinstance(value, list) and any(_anywhere(v, test) for v in value)


def has_unknown(value: Value) -> bool:
    """Whether the value is or contains something not known yet."""
    return _anywhere(value, lambda v: v is UNKNOWN)


def has_secret(value: Value) -> bool:
    """Whether the value is or contains a secret."""
    return _anywhere(value, lambda v: isinstance(v, Secret))


def keep_secrets(outputs: Value, inputs: Value) -> Value:
    """`outputs` with a secret mark wherever `inputs` has one at the same place."""
    if isinstance(outputs, Secret) or outputs is None:
        return outputs
    if isinstance(inputs, Secret):
        return Secret(plain(outputs))
    if isinstance(outputs, dict) and isinstance(inputs, dict):
        return {k: keep_secrets(v, inputs.get(k)) for k, v in outputs.items()}
    if isinstance(outputs, list) and isinstance(inputs, list):
        if len(inputs) != len(outputs):
            return Secret(outputs) if has_secret(inputs) else outputs
        return [keep_secrets(o, i) for o, i in zip(outputs, inputs, strict=True)]
    return outputs


def with_secrets_of(outputs: Properties, inputs: Properties) -> Properties:
    """`keep_secrets` for properties."""
    return {k: keep_secrets(v, inputs.get(k)) for k, v in outputs.items()}


def compare(old: Value, new: Value, *, empty_is_absent: bool = False) -> dict[Path, Change]:
    """The places where two trees differ, the deepest place that names the whole difference.

    Secret marks do not count. An unknown in `new` counts as a change: it may become one. Lists are compared
    by index. With `empty_is_absent`, an empty list or map is the same as none (Terraform's rule, which
    Google's plugin has).
    """
    changes: dict[Path, Change] = {}
    _compare(plain(old), plain(new), (), changes, empty_is_absent)
    return changes


def _compare(old: Value, new: Value, path: Path, changes: dict[Path, Change], empty_is_absent: bool) -> None:
    if isinstance(old, dict) and isinstance(new, dict) and SIGNATURE not in old:
        for key in [*old, *(k for k in new if k not in old)]:
            _compare(old.get(key), new.get(key), (*path, key), changes, empty_is_absent)
        return
    if isinstance(old, list) and isinstance(new, list):
        for i in range(max(len(old), len(new))):
            before = old[i] if i < len(old) else None
            after = new[i] if i < len(new) else None
            _compare(before, after, (*path, i), changes, empty_is_absent)
        return
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return
    gone: tuple[Value, ...] = (None, [], {}) if empty_is_absent else (None,)
    if old in gone and new in gone:
        return
    if old in gone:
        changes[path] = Change.ADD
    elif new in gone:
        changes[path] = Change.DELETE
    else:
        changes[path] = Change.UPDATE


_SIMPLE_KEY = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*$")


def path_text(path: Path) -> str:
    """A path as Pulumi writes it: `spec.containers[0].image`, `metadata.annotations["a.b/c"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _SIMPLE_KEY.match(part):
            text += f".{part}" if text else part
        else:
            escaped = part.replace("\\", "\\\\").replace('"', '\\"')
            text += f'["{escaped}"]'
    return text


def matches(path: Path, pattern: str) -> bool:
    """Whether the path is at, below or above what the pattern names; `*` is one part (`containers.*.env`)."""
    return all(p in ("*", str(part)) for p, part in zip(pattern.split("."), path, strict=False))


def drift(inputs: Value, recorded: Value, live: Value) -> Value:
    """The inputs as they would have to be written today, for a refresh.

    Where the live value is what was recorded after the last update, the input stays as the user wrote it (a
    server may spell it otherwise: a quantity, a URL for a name). Where it changed since, the live value takes
    the input's place. Only what the inputs name is looked at: fields that the server adds are its own.
    """
    if isinstance(inputs, Secret):
        return Secret(drift(inputs.value, recorded, live))
    if isinstance(inputs, dict) and isinstance(live, dict):
        before = recorded if isinstance(recorded, dict) else {}
        merged = {k: drift(v, before.get(k), live.get(k)) for k, v in inputs.items()}
        return {k: v for k, v in merged.items() if v is not None}
    if isinstance(inputs, list) and isinstance(live, list) and len(inputs) == len(live):
        before_list = (
            recorded if isinstance(recorded, list) and len(recorded) == len(live) else [None] * len(live)
        )
        return [drift(i, r, v) for i, r, v in zip(inputs, before_list, live, strict=True)]
    return inputs if plain(recorded) == live else live


def walk(value: Value, path: Path = ()) -> Iterator[tuple[Path, Value]]:
    """Every leaf with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, (*path, i))
    else:
        yield path, value
