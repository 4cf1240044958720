"""What one version of an API shows: records are kept once, and each version has fields of its own."""

from __future__ import annotations

from typing import Any

from localcloud.api.discovery import SERVED, Document, Method, document
from localcloud.store import Json


def shown(method: Method, body: Json) -> Json:
    """A method's answer without what only other versions of its API have."""
    others = [
        document(name, version)
        for name, version in SERVED
        if name == method.service and version != method.document.version
    ]
    if method.response is None or not others:
        return body
    return _message(method.document, others, method.response, body)


def _message(own: Document, others: list[Document], name: str, value: Json) -> Json:
    schema = own.schemas.get(name, {})
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    result = {}
    for key, item in value.items():
        field = properties.get(key, extra)
        if field is not None:
            result[key] = _value(own, others, field, item)
        elif not any(key in other.schemas.get(name, {}).get("properties", {}) for other in others):
            result[key] = item
    return result


def _value(own: Document, others: list[Document], field: Json, value: Any) -> Any:
    if isinstance(value, list):
        return [_value(own, others, field.get("items", {}), item) for item in value]
    if isinstance(value, dict):
        if "@type" in value:
            return _message(own, others, value["@type"].rpartition(".")[2], value)
        if "$ref" in field:
            return _message(own, others, field["$ref"], value)
        inner = field.get("additionalProperties", {})
        return {key: _value(own, others, inner, item) for key, item in value.items()}
    return value
