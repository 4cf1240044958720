"""Requests against the discovery document, with the messages that Google's front end gives.

What passes is normalized as it is there: 64-bit integers become strings, smaller ones numbers, output-only
fields are dropped, nulls count as absent.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any

from localcloud.api import enums
from localcloud.api.discovery import Document, Method
from localcloud.api.errors import ApiError
from localcloud.store import Json

_RANGES = {
    "int32": (-(2**31), 2**31 - 1),
    "uint32": (0, 2**32 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint64": (0, 2**64 - 1),
}
_PACKAGES = {
    "compute": "google.cloud.compute",
    "container": "google.container",
    "artifactregistry": "google.devtools.artifactregistry",
    "iam": "google.iam.admin",
    "cloudkms": "google.cloud.kms",
    "serviceusage": "google.api.serviceusage",
    "cloudresourcemanager": "google.cloud.resourcemanager",
}
_PARTIAL_SUCCESS = "returnPartialSuccess"
"""gcloud sends it to every list, and Google takes it there, though some lists' documents do not name it."""
_SYSTEM = {"alt", "fields", "key", "prettyPrint", "userProject", "quotaUser", "callback", "uploadType"}
NUMERIC_ENUMS = "$numericEnums"
"""Where `check_query` notes that the client wants numbers: no parameter has this name."""
_MOST_LEVELS = 100
_OUTPUT_ONLY = re.compile(r"\[?output only", re.IGNORECASE)
_DATETIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_DURATION = re.compile(r"-?\d+(\.\d{1,9})?s")


def check_path(method: Method, values: dict[str, str]) -> None:
    """
    Raises:
        ApiError: 400, a value does not match its parameter's pattern.
    """
    for name, value in values.items():
        pattern = method.parameters.get(name, {}).get("pattern")
        if pattern and not re.fullmatch(pattern, value):
            raise ApiError(
                400,
                f"Invalid value for field '{name}': '{value}'. Must be a match of regex '{pattern}'",
                reason="invalidParameter",
            )


def check_query(method: Method, items: Sequence[tuple[str, str]]) -> Json:
    """The query's values, in the types that the document gives them.

    Raises:
        ApiError: 400, an unknown parameter, or a value of the wrong type.
    """
    values: Json = {}
    problems: list[tuple[str, str]] = []
    for given, text in items:
        # System parameters may have a dollar before them: Google's newer clients write `$alt`.
        name = given.removeprefix("$") if given.removeprefix("$") in _SYSTEM else given
        if name == "alt":
            text, encoding = _alt(text)  # noqa: PLW2901
            if encoding:
                values[NUMERIC_ENUMS] = True
        schema = method.parameters.get(name)
        if schema is None:
            # Google takes both spellings, and the official gcp plugin sends `repository_id`.
            camel = re.sub(r"_([a-z])", lambda found: found[1].upper(), name)
            if camel in method.parameters:
                name, schema = camel, method.parameters[camel]
        if schema is None and name == _PARTIAL_SUCCESS and method.service == "compute":
            continue
        if schema is None or schema.get("location") != "query":
            problems.append(
                (
                    name,
                    f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter. '
                    f"Field '{name}' could not be found in request message.",
                )
            )
            continue
        if "enum" in schema and text.isdecimal() and enums.are_numbered(method.service):
            text = enums.name(schema, int(text)) or text  # noqa: PLW2901
        value = _Checker(method.document, problems).scalar(schema, text, name)
        if schema.get("repeated"):
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    _raise(problems)
    return values


def _alt(text: str) -> tuple[str, bool]:
    """The form that an answer is to have, and whether with the numbers of enums' values.

    Raises:
        ApiError: 501, another form than JSON; 400, an encoding that Google does not know.
    """
    form, _, encoding = text.partition(";")
    if form in ("media", "proto"):
        raise ApiError(501, f"localcloud answers in JSON only, not in {form}")
    if encoding not in ("", "enum-encoding=int"):
        raise ApiError(400, f"Invalid value for field 'alt': '{text}'.", reason="invalidParameter")
    return form, encoding != ""


def check_body(method: Method, content: bytes) -> Json:
    """The request's body, normalized; empty for a method that takes none.

    Raises:
        ApiError: 400, not JSON, an unknown field, a wrong type or a value that an enum does not have.
    """
    if method.request is None:
        return {}
    if not content.strip():
        if method.service == "compute":
            raise ApiError(400, "Required field 'resource' not specified", reason="required")
        return {}
    body = _parsed(content)
    problems: list[tuple[str, str]] = []
    checked = _Checker(method.document, problems).message(method.request, body, _root(method))
    _raise(problems)
    return checked


def _parsed(content: bytes) -> Json:
    """
    Raises:
        ApiError: 400, not a JSON object, or one that Google's front end takes for none: a number that JSON
            does not have, text that is no Unicode, more levels than any message has.
    """
    try:
        if content.count(b"{") + content.count(b"[") > _MOST_LEVELS:
            _check_levels(content)
        body = json.loads(content, parse_constant=_no_constant)
        # Half of a surrogate pair passes the parser; stored, it would spoil every list that it is in.
        json.dumps(body, ensure_ascii=False).encode()
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON payload received. {error}", reason="parseError") from error
    if not isinstance(body, dict):
        raise ApiError(400, "Invalid JSON payload received. Root element must be a message.")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"Unexpected token: {name}")


def _check_levels(content: bytes) -> None:
    level = 0
    for character in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", content):
        level += (character in b"{[") - (character in b"}]")
        if level > _MOST_LEVELS:
            raise ValueError(f"Message too deep. Max recursion depth reached: {_MOST_LEVELS}")


def _root(method: Method) -> str:
    """The name of the request's field that holds the body; empty if the body is the whole request."""
    if method.service == "compute":
        return "resource"
    request = method.request or ""
    return "" if request.endswith("Request") else _snake(request)


def _raise(problems: list[tuple[str, str]]) -> None:
    if problems:
        violations = [{"field": where, "description": text} for where, text in problems]
        raise ApiError(
            400,
            "\n".join(text for _, text in problems),
            reason="invalid",
            details=({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": violations},),
        )


class _Checker:
    """Walks a body along its schema and collects every problem, as Google reports them all at once."""

    def __init__(self, document: Document, problems: list[tuple[str, str]]) -> None:
        self._document = document
        self._problems = problems

    def message(self, name: str, value: Json, where: str) -> Json:
        schema = self._document.schemas[name]
        properties: dict[str, Json] = schema.get("properties", {})
        extra: Json | None = schema.get("additionalProperties")
        checked: Json = {}
        for key, item in value.items():
            field = properties.get(key, extra)
            if field is None:
                at = f" at '{where}'" if where else ""
                self._add(
                    where,
                    f'Invalid JSON payload received. Unknown name "{key}"{at}: Cannot find field.',
                )
            elif item is not None:
                child = self.value(field, item, f"{where}.{_snake(key)}".removeprefix("."))
                if not _is_output_only(field):
                    checked[key] = child
        return checked

    def value(self, schema: Json, value: Any, where: str) -> Any:
        if "$ref" in schema:
            if not isinstance(value, dict):
                return self._wrong(where, self._type_url(schema["$ref"]), value)
            return self.message(schema["$ref"], value, where)
        match schema.get("type"):
            case "array":
                return self._list(schema["items"], value, where)
            case "object":
                return self._map(schema, value, where)
            case "any":
                return value
            case _:
                return self.scalar(schema, value, where)

    def _list(self, items: Json, value: Any, where: str) -> Any:
        if not isinstance(value, list):
            return self._wrong(where, "repeated", value)
        return [self.value(items, item, f"{where}[{index}]") for index, item in enumerate(value)]

    def _map(self, schema: Json, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            return self._wrong(where, "TYPE_MESSAGE", value)
        item = schema.get("additionalProperties", {"type": "any"})
        return {key: self.value(item, entry, f"{where}[{key}]") for key, entry in value.items()}

    def scalar(self, schema: Json, value: Any, where: str) -> Any:
        if isinstance(value, dict | list):
            what = "start list" if isinstance(value, list) else "start object"
            parent, _, name = where.rpartition(".")
            at = f" at '{parent}'" if parent else ""
            self._add(
                parent,
                f'Invalid JSON payload received. Unknown name "{name}"{at}: '
                f"Proto field is not repeating, cannot {what}.",
            )
            return value
        kind, form = schema.get("type"), schema.get("format")
        if kind == "boolean":
            return self._boolean(value, where)
        if form in _RANGES:
            return self._integer(form, kind == "string", value, where)
        if kind == "number":
            return self._number(value, where)
        return self._string(schema, value, where)

    def _boolean(self, value: Any, where: str) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        return self._wrong(where, "TYPE_BOOL", value)

    def _integer(self, form: str, as_string: bool, value: Any, where: str) -> Any:
        low, high = _RANGES[form]
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            return self._wrong(where, f"TYPE_{form.upper()}", value)
        is_whole = not isinstance(value, float) or value == number
        if isinstance(value, bool) or not is_whole or not low <= number <= high:
            return self._wrong(where, f"TYPE_{form.upper()}", value)
        return str(number) if as_string else number

    def _number(self, value: Any, where: str) -> Any:
        try:
            return float(value) if not isinstance(value, bool) else self._wrong(where, "TYPE_DOUBLE", value)
        except (ValueError, OverflowError):
            return self._wrong(where, "TYPE_DOUBLE", value)

    def _string(self, schema: Json, value: Any, where: str) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if "enum" in schema and is_number and enums.are_numbered(self._document.name):
            value = enums.name(schema, value) or value
        if not isinstance(value, str):
            return self._wrong(where, "TYPE_STRING", value)
        if "enum" in schema and value not in schema["enum"]:
            return self._wrong(where, self._type_url(_camel(where)), value)
        form = schema.get("format")
        if form == "byte" and not _is_base64(value):
            self._add(
                where, f"Invalid value at '{where}' (TYPE_BYTES), Base64 decoding failed for \"{value}\""
            )
        elif form == "google-datetime" and not _DATETIME.fullmatch(value):
            self._add(
                where,
                f"Invalid value at '{where}' (type.googleapis.com/google.protobuf.Timestamp), "
                f"Field '{where}', Invalid time format: {value}",
            )
        elif form == "google-duration" and not _DURATION.fullmatch(value):
            self._add(
                where,
                f"Invalid value at '{where}' (type.googleapis.com/google.protobuf.Duration), "
                f"Field '{where}', Illegal duration format; duration must end with 's'",
            )
        return value

    def _type_url(self, name: str) -> str:
        package = _PACKAGES[self._document.name]
        return f"type.googleapis.com/{package}.{self._document.version}.{name}"

    def _wrong(self, where: str, kind: str, value: Any) -> Any:
        self._add(where, f"Invalid value at '{where}' ({kind}), {json.dumps(value)}")
        return value

    def _add(self, where: str, text: str) -> None:
        self._problems.append((where, text))


def _is_output_only(field: Json) -> bool:
    return bool(field.get("readOnly") or _OUTPUT_ONLY.match(field.get("description", "")))


def _is_base64(value: str) -> bool:
    try:
        base64.b64decode(value.replace("-", "+").replace("_", "/") + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: "_" + match.group(1).lower(), name).lower()


def _camel(where: str) -> str:
    last = re.sub(r"\[[^]]*\]", "", where.rpartition(".")[2])
    return "".join(part.capitalize() for part in last.split("_"))
