"""Text in which characters that a terminal obeys are shown as escapes.

Names of files, classes and tensors come from other people, and may hold escape sequences that
recolour, clear or overwrite the screen, and marks that reverse the direction of writing
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


def escaped(text: str) -> str:
    """One line: line breaks are shown as well."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escaped_json(text: str) -> str:
    """JSON that means the same."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
