"""What one version of an API shows: records are kept once, and each version has fields of its own."""

from __future__ import annotations

from typing import Any

from localcloud.api.discovery import SERVED, Document, Method, document
from localcloud.store import Json


def shown(method: Method, body: Json) -> Json:
    """A method's answer without what only other versions of its API have."""
    if method.response is None:
        return body
    return _message(method.document, method.response, body)


def _message(own: Document, name: str, value: Json) -> Json:
    schema = own.schemas.get(name, {})
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    result = {}
    for key, item in value.items():
        field = properties.get(key, extra)
        if field is not None:
            result[key] = _value(own, field, item)
        elif not _is_another_versions(own, name, key):
            result[key] = item
    return result


def _is_another_versions(own: Document, name: str, key: str) -> bool:
    # The other documents are large, and read only where a field is met that this one does not have.
    return any(
        key in document(service, version).schemas.get(name, {}).get("properties", {})
        for service, version in SERVED
        if service == own.name and version != own.version
    )


def _value(own: Document, field: Json, value: Any) -> Any:
    if isinstance(value, list):
        return [_value(own, field.get("items", {}), item) for item in value]
    if isinstance(value, dict):
        if "@type" in value:
            return _message(own, value["@type"].rpartition(".")[2], value)
        if "$ref" in field:
            return _message(own, field["$ref"], value)
        inner = field.get("additionalProperties", {})
        return {key: _value(own, inner, item) for key, item in value.items()}
    return value
