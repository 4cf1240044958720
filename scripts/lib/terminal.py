"""Prints on every terminal: what its encoding does not have is said in other characters."""

import codecs
import io
import locale
import os
import sys

_INSTEAD = {"✓": "ok", "✗": "FAILED", "…": "...", "─": "-"}


def _instead(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_INSTEAD.get(character, "?") for character in missing), error.end


def encoding() -> str:
    """The encoding that the user's terminal is said to have."""
    for name in (os.environ.get("PYTHONIOENCODING", "").partition(":")[0], locale.getencoding()):
        try:
            known = codecs.lookup(name).name
        except LookupError:
            continue
        # The C locale says ASCII, which hardly a terminal is: Python does not believe it either.
        if known != "ascii" or name != locale.getencoding():
            return known
    return "utf-8"


def set_up() -> None:
    """Has standard output and standard error write what can be written."""
    codecs.register_error("instead", _instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding(), errors="instead")
