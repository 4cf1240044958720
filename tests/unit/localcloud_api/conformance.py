"""Answers against Google's discovery documents: every field known and of its type, every enum's value its."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from localcloud.api.discovery import Document, Method

_INTEGERS = {"int32", "uint32", "int64", "uint64"}


def problems(method: Method, body: Any) -> list[str]:
    """What a method's answer has that its schema does not."""
    if method.response is None:
        return [] if body == {} else [f"{method.id} has no response, and got one"]
    return list(_message(method.document, method.response, body, method.response))


def _message(document: Document, name: str, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no message"
        return
    schema = document.schemas[name]
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    for key, item in value.items():
        field = properties.get(key, extra)
        if field is None:
            yield f"{where}: unknown field {key}"
        else:
            yield from _value(document, field, item, f"{where}.{key}")


def _value(document: Document, schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _message(document, schema["$ref"], value, where)
        return
    kind, form = schema.get("type"), schema.get("format")
    if kind == "array":
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for index, item in enumerate(value):
            yield from _value(document, schema["items"], item, f"{where}[{index}]")
    elif kind == "object":
        for key, item in value.items():
            yield from _value(
                document, schema.get("additionalProperties", {"type": "any"}), item, f"{where}.{key}"
            )
    elif kind == "boolean" and not isinstance(value, bool):
        yield f"{where}: {value!r} is no boolean"
    elif kind == "integer" and (isinstance(value, bool) or not isinstance(value, int)):
        yield f"{where}: {value!r} is no integer"
    elif kind == "string":
        if not isinstance(value, str):
            yield f"{where}: {value!r} is no string"
        elif form in _INTEGERS and not re.fullmatch(r"-?\d+", value):
            yield f"{where}: {value!r} is no integer in a string"
        elif "enum" in schema and value not in schema["enum"]:
            yield f"{where}: {value!r} is none of {schema['enum']}"
