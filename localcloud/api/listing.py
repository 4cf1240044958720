"""What lists have in common: filters, and pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from localcloud.api.errors import ApiError
from localcloud.store import Json

if TYPE_CHECKING:
    from localcloud.api.service import Call

Predicate = Callable[[Json], bool]

_TOKEN = re.compile(
    r"\s*(?:(?P<mark>[()])|(?P<op>!=|>=|<=|=|:|>|<)|\"(?P<double>(?:[^\"\\]|\\.)*)\"|'(?P<single>[^']*)'"
    r"|(?P<word>https?://[^\s()\"']+|[^\s()=!<>:\"']+))"
)
# A resource by the host and the version that a client knows this API by.
_LINK = re.compile(r"https?://.*?/(projects/.+)")
_WORD_OPERATORS = {"eq", "ne"}
_MOST_LEVELS = 50
"""Of a filter; what is nested deeper is no question but a load."""


def page(
    items: list[Json], size: int | None, token: str | None, key: str, default: int = 500
) -> tuple[list[Json], str]:
    """One page of a list in the order of the items' field `key`, which no two have in common, and the token
    of the next one (empty at the end).

    A token says after which item the next page begins, so that what comes or goes between two requests moves
    no other item from one page to another.

    Raises:
        ApiError: 400, a token that no page gave, or a negative size.
    """
    return ordered_page(items, size, token, [key], default)


def ordered_page(
    items: list[Json],
    size: int | None,
    token: str | None,
    keys: list[str],
    default: int = 500,
    *,
    down: bool = False,
) -> tuple[list[Json], str]:
    """Like `page`, in the order of several fields, or against it."""
    if size is not None and size < 0:
        raise ApiError(400, f"Invalid page size: {size}. It must not be negative.", reason="invalid")

    def place(item: Json) -> list[str]:
        return [str(item.get(key, "")) for key in keys]

    rest = sorted(items, key=place, reverse=down)
    if token:
        last = _read_token(token, len(keys))
        rest = [item for item in rest if (place(item) < last if down else place(item) > last)]
    chosen = rest[: size or default]
    return chosen, _token(place(chosen[-1])) if len(chosen) < len(rest) else ""


def _token(place: list[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _read_token(token: str, length: int) -> list[str]:
    try:
        place = json.loads(base64.urlsafe_b64decode(token))
        if not isinstance(place, list) or len(place) != length or not all(isinstance(p, str) for p in place):
            raise ValueError(token)  # noqa: TRY301
    except ValueError as error:
        raise ApiError(
            400, f"Invalid value for field 'pageToken': '{token}'. Invalid page token.", reason="invalid"
        ) from error
    return place


def listing(
    call: Call,
    name: str,
    items: list[Json],
    *,
    key: str = "name",
    default: int = 100,
    expression: str | None = None,
) -> Json:
    """The answer of a list in the newer APIs' manner (AIP-132): filtered, in pages, and without the field if
    there is nothing to show.
    """
    found = matching(items, expression if expression is not None else call.query.get("filter"))
    chosen, following = page(found, call.query.get("pageSize"), call.query.get("pageToken"), key, default)
    return ({name: chosen} if chosen else {}) | ({"nextPageToken": following} if following else {})


def matching(items: list[Json], expression: str | None) -> list[Json]:
    """The items that a filter lets pass: `name = a`, `labels.x:y AND -status = RUNNING`, `name eq a.*`, ….

    Raises:
        ApiError: 400, not such an expression.
    """
    if not expression or not expression.strip():
        return items
    accepts = _Filter(expression).parse()
    return [item for item in items if accepts(item)]


class _Filter:
    """Google's list filters (AIP-160, and Compute Engine's older `eq` and `ne` with regular expressions).

    OR binds tighter than AND, and terms beside each other are an AND, as https://google.aip.dev/160 has it
    and as Compute Engine's own example is meant (`(cpu = a) OR (cpu = b) AND (restart = true)`).
    """

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
        if self._depth() > _MOST_LEVELS:
            raise self._invalid()

    def _depth(self) -> int:
        """How deep the terms are nested, at the deepest."""
        open_marks = negations = deepest = 0
        for kind, text in self._tokens:
            open_marks += (text == "(") - (text == ")") if kind == "mark" else 0
            is_negation = kind == "word" and text in ("NOT", "-")
            negations = negations + 1 if is_negation else 0
            deepest = max(deepest, open_marks + negations)
        return deepest

    def parse(self) -> Predicate:
        result = self._all_of()
        if self._tokens:
            raise self._invalid()
        return result

    def _all_of(self) -> Predicate:
        parts = [self._any_of()]
        while self._tokens and self._tokens[0] != ("mark", ")"):
            self._take("word", "AND")
            parts.append(self._any_of())
        return lambda item: all(part(item) for part in parts)

    def _any_of(self) -> Predicate:
        parts = [self._term()]
        while self._take("word", "OR"):
            parts.append(self._term())
        return lambda item: any(part(item) for part in parts)

    def _term(self) -> Predicate:
        if self._take("word", "NOT") or self._take_minus():
            negated = self._term()
            return lambda item: not negated(item)
        if self._take("mark", "("):
            inner = self._all_of()
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

    def _take_minus(self) -> bool:
        """Take a minus before a term: `-a = b`, `-(a = b)`."""
        kind, text = self._tokens[0] if self._tokens else ("", "")
        if kind != "word" or not text.startswith("-"):
            return False
        self._tokens[:1] = [("word", text[1:])] if text != "-" else []
        return True

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
        pattern = re.compile(_LINK.sub(r".*/\1", value))
        return lambda found: bool(pattern.fullmatch(_text(found))) == (operator == "eq")
    if operator in (">", "<", ">=", "<="):
        return lambda found: _ordered(operator, _text(found), value)
    if operator == ":":
        if value == "*":
            return lambda found: found is not None
        return lambda found: _has(found, value)
    wildcard = re.compile(".*".join(re.escape(part) for part in value.split("*")))
    return lambda found: bool(wildcard.fullmatch(_text(found))) == (operator == "=")


def _ordered(operator: str, found: str, value: str) -> bool:
    try:
        left: Any = float(found)
        right: Any = float(value)
    except ValueError:
        left, right = found, value
    return bool({">": left > right, "<": left < right, ">=": left >= right, "<=": left <= right}[operator])


def _has(whole: Any, value: str) -> bool:
    if isinstance(whole, dict):
        return value in whole  # a map has a key
    found = _text(whole)
    if value.endswith("*"):
        return found.lower().startswith(value[:-1].lower())
    return value.lower() in found.lower()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
