"""Field masks: what of an answer a client wants (`fields`), what of a resource it changes (`updateMask`)."""

from __future__ import annotations

import re
from typing import Any

from localcloud.api.discovery import Method
from localcloud.api.errors import ApiError
from localcloud.store import Json

_MOST_LEVELS = 50
"""Of a mask; what is nested deeper is no question but a load."""
_NAME = re.compile(r"([^,/()]+)")

Tree = dict[str, Any]
"""The names of a mask, each with the tree of what is wanted of it; an empty one wants all."""


def partial(method: Method, body: Json, mask: str) -> Json:
    """The part of an answer that a `fields` parameter selects: `items(name,id),nextPageToken`, `a/b`, `*`.

    Raises:
        ApiError: 400, no such expression, or a field that the answer cannot have.
    """
    tree = _Selection(mask).parse()
    _check(method, {"$ref": method.response} if method.response else {}, tree)
    selected: Json = _select(body, tree)
    return selected


class _Selection:
    """The grammar: paths with commas between them, each a name or more with slashes between, and maybe a
    selection in parentheses at its end.
    """

    def __init__(self, text: str) -> None:
        self._text = re.sub(r"\s+", "", text)
        self._position = 0

    def parse(self) -> Tree:
        tree = self._paths(0)
        if self._position < len(self._text):
            raise self._invalid()
        return tree

    def _paths(self, level: int) -> Tree:
        tree: Tree = {}
        while True:
            self._path(tree, level)
            if not self._take(","):
                return tree

    def _path(self, tree: Tree, level: int) -> None:
        if level > _MOST_LEVELS:
            raise self._invalid()
        match = _NAME.match(self._text, self._position)
        if match is None:
            raise self._invalid()
        self._position = match.end()
        name = match[1]
        inner: Tree = {}
        if self._take("/"):
            self._path(inner, level + 1)
        elif self._take("("):
            inner = self._paths(level + 1)
            if not self._take(")"):
                raise self._invalid()
        tree[name] = _both(tree[name], inner) if name in tree else inner

    def _take(self, mark: str) -> bool:
        if self._text[self._position : self._position + 1] != mark:
            return False
        self._position += 1
        return True

    def _invalid(self) -> ApiError:
        return ApiError(400, f"Invalid field selection {self._text[:200]}", reason="invalidParameter")


def _both(one: Tree, other: Tree) -> Tree:
    """What is wanted by either; all of it if one wants all."""
    if not one or not other:
        return {}
    return {
        name: _both(one[name], other[name])
        if name in one and name in other
        else one.get(name, other.get(name))
        for name in {**one, **other}
    }


def _check(method: Method, field: Json, tree: Tree) -> None:
    """
    Raises:
        ApiError: 400, a name that no answer of the method has there.
    """
    while field.get("type") == "array":
        field = field["items"]
    schema = method.document.schemas.get(field["$ref"], {}) if "$ref" in field else field
    properties, extra = schema.get("properties"), schema.get("additionalProperties")
    for name, inner in tree.items():
        if name == "*":
            for child in [*(properties or {}).values(), *([extra] if extra else [])]:
                if inner and "$ref" in child:
                    _check(method, child, inner)
        elif properties is not None and name in properties:
            _check(method, properties[name], inner)
        elif extra is not None:
            _check(method, extra, inner)
        elif field.get("type") != "any":
            raise ApiError(400, f"Invalid field selection {name}", reason="invalidParameter")


def _select(value: Any, tree: Tree) -> Any:
    if not tree or not isinstance(value, dict | list):
        return value
    if isinstance(value, list):
        return [_select(item, tree) for item in value]
    selected = {}
    for key, item in value.items():
        wanted = [tree[name] for name in (key, "*") if name in tree]
        if wanted:
            selected[key] = _select(item, wanted[0] if len(wanted) == 1 else _both(*wanted))
    return selected


def merged(old: Any, new: Any) -> Any:
    """What a patch without a mask makes of a field (RFC 7396): of a message it changes what it has, all else
    it replaces.
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def update(target: Json, given: Json, mask: str, changeable: set[str]) -> None:
    """Change what a mask names of a resource into what a request says of it (https://google.aip.dev/134).

    Paths have dots, in either spelling of a name (`docker_config.immutable_tags`), and name a field at any
    depth, or a key of a map, in backticks where it has a dot of its own. What the mask names and the request
    lacks is cleared. `*` names all that may change; without a mask what the request has is changed.

    Raises:
        ApiError: 400, a path that names nothing that may change.
    """
    paths = [_parts(text) for text in mask.split(",") if text.strip()] if mask else []
    if not paths:
        paths = [[name] for name in given if name in changeable]
    if ["*"] in paths:
        paths = [[name] for name in sorted(changeable)]
    for path in paths:
        if path[0] not in changeable:
            raise ApiError(400, f'field "{path[0]}" cannot be updated')
        _assign(target, given, path, ".".join(path))


def _parts(path: str) -> list[str]:
    parts = re.findall(r"`([^`]*)`|([^.`]+)", path.strip())
    # The keys of a map are spelled as they are: only what cannot be a key is turned into a field's name.
    return [quoted or (_camel(plain) if index == 0 else plain) for index, (quoted, plain) in enumerate(parts)]


def _camel(name: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


def _assign(target: Json, given: Any, path: list[str], whole: str) -> None:
    name = path[0]
    for spelling in (name, _camel(name)):
        if spelling in target or (isinstance(given, dict) and spelling in given):
            name = spelling
            break
    value = given.get(name) if isinstance(given, dict) else None
    if len(path) == 1:
        if value in (None, "", {}, []):
            target.pop(name, None)
        else:
            target[name] = value
        return
    inner = target.setdefault(name, {})
    if not isinstance(inner, dict) or not isinstance(value, dict | None):
        raise ApiError(400, f'The update mask\'s path "{whole}" leads through what has no fields.')
    _assign(inner, value, path[1:], whole)
    if not inner:
        del target[name]
