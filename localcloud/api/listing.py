"""What lists have in common: filters, pages, and the partial responses of `fields`."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

from localcloud.api.errors import ApiError
from localcloud.store import Json

Predicate = Callable[[Json], bool]

_TOKEN = re.compile(
    r"\s*(?:(?P<mark>[()])|(?P<op>!=|>=|<=|=|:|>|<)|\"(?P<double>(?:[^\"\\]|\\.)*)\"|'(?P<single>[^']*)'"
    r"|(?P<word>[^\s()=!<>:\"']+))"
)
_WORD_OPERATORS = {"eq", "ne"}
_MOST_LEVELS = 50
"""Of a filter or a field mask; what is nested deeper is no question but a load."""


def page(
    items: list[Json], size: int | None, token: str | None, default: int = 500
) -> tuple[list[Json], str]:
    """One page of a list and the token of the next one (empty at the end).

    Raises:
        ApiError: 400, a token that no page gave.
    """
    try:
        start = int(base64.urlsafe_b64decode(token)) if token else 0
        if start < 0:
            raise ValueError(start)  # noqa: TRY301
    except ValueError as error:
        raise ApiError(
            400, f"Invalid value for field 'pageToken': '{token}'. Invalid page token.", reason="invalid"
        ) from error
    end = start + (size or default)
    following = base64.urlsafe_b64encode(str(end).encode()).decode() if end < len(items) else ""
    return items[start:end], following


def matching(items: list[Json], expression: str | None) -> list[Json]:
    """The items that a filter lets pass: `name = a`, `labels.x:y AND status != RUNNING`, `name eq a.*`, ….

    Raises:
        ApiError: 400, not such an expression.
    """
    if not expression or not expression.strip():
        return items
    accepts = _Filter(expression).parse()
    return [item for item in items if accepts(item)]


class _Filter:
    """Google's list filters (AIP-160, and Compute Engine's older `eq` and `ne` with regular expressions)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise self._invalid()
            kind = "text" if match.lastgroup in ("double", "single") else match.lastgroup
            self._tokens.append((kind, re.sub(r"\\(.)", r"\1", match[match.lastgroup])))
            position = match.end()
        if sum(token in (("mark", "("), ("word", "NOT")) for token in self._tokens) > _MOST_LEVELS:
            raise self._invalid()

    def parse(self) -> Predicate:
        result = self._any_of()
        if self._tokens:
            raise self._invalid()
        return result

    def _any_of(self) -> Predicate:
        parts = [self._all_of()]
        while self._take("word", "OR"):
            parts.append(self._all_of())
        return lambda item: any(part(item) for part in parts)

    def _all_of(self) -> Predicate:
        parts = [self._term()]
        while self._tokens and self._tokens[0] not in (("mark", ")"), ("word", "OR")):
            self._take("word", "AND")
            parts.append(self._term())
        return lambda item: all(part(item) for part in parts)

    def _term(self) -> Predicate:
        if self._take("word", "NOT"):
            negated = self._term()
            return lambda item: not negated(item)
        if self._take("mark", "("):
            inner = self._any_of()
            if not self._take("mark", ")"):
                raise self._invalid()
            return inner
        return self._comparison()

    def _comparison(self) -> Predicate:
        kind, name = self._next()
        operator_kind, operator = self._next()
        value_kind, value = self._next()
        known = operator_kind == "op" or operator in _WORD_OPERATORS
        if kind not in ("word", "text") or value_kind not in ("word", "text") or not known:
            raise self._invalid()
        try:
            compare = _comparison(operator, value)
        except re.error as error:
            raise self._invalid() from error
        if operator in ("!=", "ne"):
            return lambda item: all(compare(found) for found in _values(item, name.split(".")) or [None])
        return lambda item: any(compare(found) for found in _values(item, name.split(".")))

    def _take(self, kind: str, text: str) -> bool:
        if self._tokens and self._tokens[0] == (kind, text):
            del self._tokens[0]
            return True
        return False

    def _next(self) -> tuple[str, str]:
        if not self._tokens:
            raise self._invalid()
        return self._tokens.pop(0)

    def _invalid(self) -> ApiError:
        return ApiError(
            400,
            f"Invalid value for field 'filter': '{self._text}'. Invalid list filter expression.",
            reason="invalid",
        )


def _values(item: Any, path: list[str]) -> list[Any]:
    """Every value at a path; a list on the way stands for each of its items."""
    if isinstance(item, list):
        return [value for entry in item for value in _values(entry, path)]
    if not path:
        return [item]
    if isinstance(item, dict):
        joined = ".".join(path)
        if joined in item:
            return _values(item[joined], [])
        if path[0] in item:
            return _values(item[path[0]], path[1:])
    return []


def _comparison(operator: str, value: str) -> Callable[[Any], bool]:
    if operator in ("eq", "ne"):
        pattern = re.compile(value)
        return lambda found: bool(pattern.fullmatch(_text(found))) == (operator == "eq")
    if operator in (">", "<", ">=", "<="):
        return lambda found: _ordered(operator, _text(found), value)
    if operator == ":":
        if value == "*":
            return lambda found: found is not None
        return lambda found: _has(_text(found), value)
    wildcard = re.compile(".*".join(re.escape(part) for part in value.split("*")))
    return lambda found: bool(wildcard.fullmatch(_text(found))) == (operator == "=")


def _ordered(operator: str, found: str, value: str) -> bool:
    try:
        left: Any = float(found)
        right: Any = float(value)
    except ValueError:
        left, right = found, value
    return bool({">": left > right, "<": left < right, ">=": left >= right, "<=": left <= right}[operator])


def _has(found: str, value: str) -> bool:
    if value.endswith("*"):
        return found.lower().startswith(value[:-1].lower())
    return value.lower() in found.lower()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def partial(body: Json, mask: str) -> Json:
    """The part of a response that a `fields` parameter selects: `items(name,id),nextPageToken`, `a/b`, `*`.

    Raises:
        ApiError: 400, not such an expression.
    """
    tree, rest = _mask(mask) if mask.count("(") + mask.count("/") <= _MOST_LEVELS else ({}, mask)
    if rest:
        raise ApiError(400, f"Invalid field selection {mask}", reason="invalidParameter")
    selected: Json = _select(body, tree)
    return selected


def _mask(text: str) -> tuple[Json, str]:
    tree: Json = {}
    while True:
        match = re.match(r"[^,/()]+", text)
        if match is None:
            raise ApiError(400, f"Invalid field selection {text}", reason="invalidParameter")
        name, text = match[0].strip(), text[match.end() :]
        inner: Json = {}
        if text.startswith("/"):
            # What follows a slash ends at the next comma, which the caller's loop goes on with.
            nested = re.match(r"/([^,()]+(\([^()]*\))?)", text)
            if nested is None:
                raise ApiError(400, f"Invalid field selection {text}", reason="invalidParameter")
            inner, text = _mask(nested[1])[0], text[nested.end() :]
        elif text.startswith("("):
            inner, text = _mask(text[1:])
            if not text.startswith(")"):
                raise ApiError(400, f"Invalid field selection {name}", reason="invalidParameter")
            text = text[1:]
        tree[name] = inner
        if not text.startswith(","):
            return tree, text
        text = text[1:]


def _select(value: Any, tree: Json) -> Any:
    if not tree or not isinstance(value, dict | list):
        return value
    if isinstance(value, list):
        return [_select(item, tree) for item in value]
    if "*" in tree:
        return {key: _select(item, tree["*"]) for key, item in value.items()}
    return {key: _select(value[key], inner) for key, inner in tree.items() if key in value}
