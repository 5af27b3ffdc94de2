import csv
import io

import pytest

from transfer.core.csv_files import original, write_row

NAMES = (
    "=1+1",
    "=cmd|'/C calc'!A0",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "'=1",
    "''@",
    "'quoted'",
    "a\rb",
    'a,"b"',
    "plain",
    "",
)


def rows(text):
    return list(csv.reader(io.StringIO(text, newline="")))


def test_formulas_are_escaped_and_names_round_trip():
    file = io.StringIO(newline="")
    write_row(file, NAMES)
    (cells,) = rows(file.getvalue())
    assert not [
        cell for cell in cells if cell[:1] and cell[0] in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
    ]
    assert [original(cell) for cell in cells] == [*NAMES]


@pytest.mark.parametrize("name", ["a.jpg", "'quoted'", "p(=x)", "001", "a=b", "ಕನ್ನಡ"])
def test_other_names_are_not_escaped(name):
    file = io.StringIO(newline="")
    write_row(file, [name])
    assert rows(file.getvalue()) == [[name]]


def test_numbers_stay_numbers():
    file = io.StringIO(newline="")
    write_row(file, ["-1", -1, -1.5, None])
    assert file.getvalue() == "'-1,-1,-1.5,\n"
