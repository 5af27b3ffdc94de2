"""CSV that a spreadsheet opens without running anything in it.

Names of files and classes come from other people, and spreadsheets take a cell that begins with
``=``, ``+``, ``-``, ``@``, a tab or a line break for a formula. A string that does so gets an
apostrophe in front (https://owasp.org/www-community/attacks/CSV_Injection), and so does one that
has apostrophes before such a character. ``original`` takes it away.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import Any, Literal, TextIO

_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four: full-width


def write_row(file: TextIO, cells: Iterable[Any]) -> None:
    """Write a row; numbers stay as they are."""
    cells = [_escaped(cell) if isinstance(cell, str) else cell for cell in cells]
    # The csv module leaves a carriage return unquoted, but reads it as the end of a row.
    has_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator="\n", quoting=quoting).writerow(cells)


def original(cell: str) -> str:
    """The string that ``write_row`` was given, from a cell as the csv module reads it."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _escaped(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text
