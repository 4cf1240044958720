"""An HTTP request as the API sees it, and what clients may do to one: compress it, or hide its method."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace

from localcloud.api.errors import ApiError

LARGEST_BODY = 10 * 2**20
_OVERRIDE = "x-http-method-override"
_METHODS = ("GET", "PUT", "PATCH", "DELETE", "POST")
_FORM = "application/x-www-form-urlencoded"
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


@dataclass(frozen=True)
class Message:
    """`path` is as it was sent, percent-encoded; the names of `headers` are in lower case."""

    verb: str
    path: str
    query: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def too_large() -> ApiError:
    return ApiError(
        413, f"Request payload size exceeds the limit: {LARGEST_BODY} bytes.", reason="uploadTooLarge"
    )


def read(message: Message) -> Message:
    """The request that was meant: its body as it was before it was compressed, and the method that a POST was
    sent in place of. A GET whose query is too long for a URL has it in the body, as a form.

    Raises:
        ApiError: 400, it is neither compressed as it says nor a method; 413, it is too large.
    """
    encoding = message.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = replace(message, body=_decompressed(message.body, encoding))
    method = message.headers.get(_OVERRIDE, "").strip().upper()
    if message.verb != "POST" or not method:
        return message
    if method not in _METHODS:
        raise ApiError(400, f"Invalid HTTP method in {_OVERRIDE}: {method[:20]}")
    if method == "GET" and message.headers.get("content-type", "").partition(";")[0].strip() == _FORM:
        try:
            form = message.body.decode("ascii")
        except UnicodeDecodeError as error:
            raise ApiError(400, "The form in the request's body is not ASCII.") from error
        query = "&".join(part for part in (message.query, form) if part)
        message = replace(message, query=query, body=b"")
    return replace(message, verb=method)


def _decompressed(content: bytes, encoding: str) -> bytes:
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ApiError(400, f"The request's Content-Encoding is not supported: {encoding[:20]}")
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        # A few kilobytes can become gigabytes: it ends where the limit is passed.
        plain = stream.decompress(content, LARGEST_BODY + 1)
    except zlib.error as error:
        raise ApiError(400, f"The request's body is not {encoding}: {error}") from error
    if len(plain) > LARGEST_BODY:
        raise too_large()
    if not stream.eof:
        raise ApiError(400, f"The request's body is not {encoding}: it ends too early")
    return plain
