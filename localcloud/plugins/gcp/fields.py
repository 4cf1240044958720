"""How a Pulumi property and a field of Google's REST belong together: one declaration, used in every
direction.

From a list of `Field` come the validation of inputs, the body of a request, the outputs from an answer, and
what a changed input means.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localcloud.plugins.protocol import Failure
from localcloud.plugins.values import UNKNOWN, Path, Properties, Value

Json = dict[str, Any]
_STRING = (str, type(UNKNOWN))


class Type(enum.Enum):
    """The type of a property."""

    STRING = "a string"
    INT = "an integer"
    INT64 = "a whole number"  # a string in JSON
    BOOL = "a boolean"
    MAP = "a map of strings"
    STRINGS = "a list of strings"
    OBJECT = "an object"
    OBJECTS = "a list of objects"


class Form(enum.Enum):
    """How a value may be written that an answer writes otherwise."""

    ANY = "as it is"
    LINK = "a resource by its name, path or link"
    IMAGE = "an image or a family, with its project or without"


class Update(enum.Enum):
    """What a changed input needs."""

    REPLACE = "a new resource"
    PATCH = "a PATCH with the resource's changed fields"
    OWN = "a call of its own"
    LOCAL = "nothing on Google's side"


@dataclass(frozen=True)
class Field:
    """A property. `rest` is its field in REST (dots go deeper; None: Google has no such field). One that is
    `decided` by Google where it is left out stays what it is when it is.
    """

    name: str
    type: Type = Type.STRING
    rest: str | None = ""
    update: Update = Update.REPLACE
    required: bool = False
    output: bool = False
    default: Value = None
    enum: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()
    form: Form = Form.ANY
    decided: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        """The way to it in REST."""
        return () if self.rest is None else tuple((self.rest or self.name).split("."))


def same(form: Form, given: str, answered: str) -> bool:
    """Whether what was given means what Google answers with."""
    name, actual = given.rsplit("/", 1)[-1], answered.rsplit("/", 1)[-1]
    if form is Form.LINK:
        paths = [text[text.index("projects/") :] for text in (given, answered) if "projects/" in text]
        return len(set(paths)) == 1 if len(paths) == 2 else name == actual and "/" not in given
    if form is Form.IMAGE:
        owner = given.rpartition("/")[0].removesuffix("/global/images").removesuffix("/global/images/family")
        owned = not owner or f"/{owner.rsplit('/', 1)[-1]}/" in answered
        return owned and (name == actual or actual.startswith(f"{name}-"))
    return given == answered


def check(fields: tuple[Field, ...], given: Mapping[str, Value], where: Path = ()) -> Iterator[Failure]:
    """What is wrong with inputs: unknown or missing properties, wrong types, values that are not allowed."""
    known = {f.name: f for f in fields if not f.output}
    for name, value in given.items():
        if name in known:
            yield from _check_value(known[name], value, (*where, name))
        elif not name.startswith("__"):
            yield Failure(
                (*where, name), f"no such input, or not served by the stand-in (it takes {', '.join(known)})"
            )
    for name, declared in known.items():
        if declared.required and given.get(name) is None:
            yield Failure((*where, name), "missing required property")


def _check_value(declared: Field, value: Value, path: Path) -> Iterator[Failure]:
    if value is UNKNOWN or value is None:
        return
    if not _fits(declared.type, value):
        yield Failure(path, f"expected {declared.type.value}, got {value!r}")
    elif declared.enum and value not in declared.enum:
        yield Failure(path, f"expected one of {', '.join(declared.enum)}, got {value!r}")
    elif declared.type is Type.OBJECT:
        yield from check(declared.fields, value, path)
    elif declared.type is Type.OBJECTS:
        for i, item in enumerate(value):
            if item is not UNKNOWN:
                yield from check(declared.fields, item, (*path, i))


def _fits(kind: Type, value: Value) -> bool:  # noqa: PLR0911 - one a type
    match kind:
        case Type.STRING:
            return isinstance(value, str)
        case Type.INT | Type.INT64:
            return isinstance(value, int) and not isinstance(value, bool)
        case Type.BOOL:
            return isinstance(value, bool)
        case Type.MAP:
            return isinstance(value, dict) and all(isinstance(v, _STRING) for v in value.values())
        case Type.STRINGS:
            return isinstance(value, list) and all(isinstance(v, _STRING) for v in value)
        case Type.OBJECT:
            return isinstance(value, dict)
        case Type.OBJECTS:
            return isinstance(value, list) and all(isinstance(v, dict | type(UNKNOWN)) for v in value)


def to_rest(fields: tuple[Field, ...], given: Mapping[str, Value]) -> Json:
    """The body of a request from known inputs; defaults are filled in."""
    body: Json = {}
    for declared in fields:
        value = given.get(declared.name, declared.default)
        if value is None or declared.output or declared.rest is None:
            continue
        *parents, last = declared.path
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _value_to_rest(declared, value)
    return body


def _value_to_rest(declared: Field, value: Value) -> Value:
    if declared.type is Type.INT64:
        return str(value)
    if declared.type is Type.OBJECT:
        return to_rest(declared.fields, value)
    if declared.type is Type.OBJECTS:
        return [to_rest(declared.fields, item) for item in value]
    return value


def from_rest(fields: tuple[Field, ...], body: Json, known: Mapping[str, Value]) -> Properties:
    """The outputs in an answer; what Google does not tell is taken from what is known (inputs or state)."""
    outputs: Properties = {}
    for declared in fields:
        value: Any = body if declared.path else None
        for part in declared.path:
            value = value.get(part) if isinstance(value, dict) else None
        before = known.get(declared.name)
        result = _value_from_rest(declared, value, before)
        if result is None:
            result = before if declared.rest is None else None
        if result is None and declared.type is Type.BOOL and declared.rest is not None:
            result = False  # Google leaves false out
        if result is None and declared.rest is None:
            result = declared.default
        if result is not None:
            outputs[declared.name] = result
    return outputs


def _value_from_rest(declared: Field, value: Any, before: Value) -> Value:
    if value is None:
        return None
    if declared.type in (Type.INT, Type.INT64):
        return int(value)
    if declared.type is Type.OBJECT:
        return from_rest(declared.fields, value, before if isinstance(before, dict) else {})
    if declared.type is Type.OBJECTS:
        olds = before if isinstance(before, list) else []
        padded = [*olds, *[{}] * len(value)]
        return [
            from_rest(declared.fields, v, o if isinstance(o, dict) else {})
            for v, o in zip(value, padded, strict=False)
        ]
    return value


def inputs_of(fields: tuple[Field, ...], outputs: Mapping[str, Value]) -> Properties:
    """The inputs that would have made what an import found: what is set, and is no output or ours alone."""
    inputs: Properties = {}
    for declared in fields:
        value = outputs.get(declared.name)
        if declared.output or declared.update is Update.LOCAL or value in ([], {}, "", None):
            continue
        if declared.type is Type.OBJECT and isinstance(value, dict):
            value = inputs_of(declared.fields, value)
        elif declared.type is Type.OBJECTS and isinstance(value, list):
            value = [inputs_of(declared.fields, item) for item in value]
        inputs[declared.name] = value
    return inputs


def computed(fields: tuple[Field, ...], inputs: Mapping[str, Value]) -> Properties:
    """A previewed state: inputs, defaults, and unknown for what Google will decide."""
    state: Properties = {}
    for declared in fields:
        value = inputs.get(declared.name, declared.default)
        if value is None:
            value = UNKNOWN
        elif declared.type is Type.OBJECT and isinstance(value, dict):
            value = computed(declared.fields, value)
        elif declared.type is Type.OBJECTS and isinstance(value, list):
            value = [computed(declared.fields, v) if isinstance(v, dict) else v for v in value]
        state[declared.name] = value
    return state
