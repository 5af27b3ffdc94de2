"""CSV files that are safe against formula injection in spreadsheets.

Names of files and classes are untrusted, and spreadsheets treat a cell that begins with ``=``,
``+``, ``-``, ``@``, a tab or a line break as a formula. An apostrophe is prepended to such a string
(https://owasp.org/www-community/attacks/CSV_Injection), and to one with apostrophes before such a
character. ``original`` removes it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import Any, Literal, TextIO

_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four: full-width


def write_row(file: TextIO, cells: Iterable[Any]) -> None:
    """Write a row; numbers are not escaped."""
    cells = [_escaped(cell) if isinstance(cell, str) else cell for cell in cells]
    # The csv module writes a carriage return unquoted, but reads it as the end of a row.
    has_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator="\n", quoting=quoting).writerow(cells)


def original(cell: str) -> str:
    """The string passed to ``write_row``, from a cell as read by the csv module."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _escaped(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text
