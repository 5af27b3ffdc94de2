"""Escape control characters in text for the terminal.

Names of files, classes and tensors are untrusted: they may contain terminal escape sequences that
recolour, clear or overwrite the screen, and characters that reverse the direction of writing
(https://trojansource.codes).
"""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # controls
    "\u2028\u2029"  # line and paragraph separators
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\ud800-\udfff]"  # bytes of a file name that are not UTF-8
)


def printable(name: object) -> str:
    """A name of a file as valid UTF-8: other bytes are shown as escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def escaped(text: str) -> str:
    """Escape the text to one line; line breaks are escaped as well."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escaped_json(text: str) -> str:
    """Escape JSON text to equivalent JSON."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
