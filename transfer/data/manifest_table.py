"""The columns of a manifest file: CSV, JSON Lines or Parquet, read by pyarrow.

A table has no Python object per row. The numbers of lines are found only if an error names them, by
reading the file again.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

_DELIMITERS = ",;\t"  # spreadsheets write semicolons where the comma is the decimal point
_SHOWN = 4
_JSON_TYPES = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


@dataclass(frozen=True)
class Table:
    """Columns of a manifest.

    ``columns`` maps names to ``pa.LargeBinaryArray``; a missing value is empty. ``all_names`` are
    the columns of the file, also those that were not read. ``lines`` maps sorted positions of rows,
    int, to their numbers in the file, counted from 1 in ``unit`` (``line`` or ``row``); to fewer if
    the last cannot be found.
    """

    columns: Mapping[str, pa.Array]
    all_names: list[str]
    unit: str
    lines: Callable[[np.ndarray], list[int]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def describe(self, rows: np.ndarray, *columns: str) -> str:
        """The first of some rows, with values: ``line 2 'a.jpg', line 9 'b.jpg', ...``."""
        shown = rows[:_SHOWN]
        parts = [
            " ".join([f"{self.unit} {line}", *(_shown(self.columns[c][row]) for c in columns)])
            for line, row in zip(self.lines(shown), shown.tolist(), strict=False)
        ]
        return ", ".join(parts) + (", ..." if len(rows) > _SHOWN else "")


def read_table(suffix: str, data: bytes, wanted: Collection[str]) -> Table:
    """The wanted columns of a manifest, as far as it has them.

    Args:
        suffix: suffix of the file's name: ``.parquet`` or ``.pq``, ``.jsonl`` or ``.ndjson``, or
            any other for CSV.
        data: content of the file.
        wanted: names of columns; for CSV, ``path`` and ``label`` tell the delimiter.

    Raises:
        ValueError: if the file is damaged, or not of this format.
    """
    kind, reader = {
        ".parquet": ("Parquet", _from_parquet),
        ".pq": ("Parquet", _from_parquet),
        ".jsonl": ("JSONL", _from_json),
        ".ndjson": ("JSONL", _from_json),
    }.get(suffix, ("CSV", _from_csv))
    try:
        return reader(data.removeprefix(codecs.BOM_UTF8), wanted)
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise ValueError(f"it cannot be read as {kind} ({' '.join(str(error).split())})") from error


def text_of(value: bytes) -> str:
    """A value as text; bytes that are not UTF-8 as ``os.fsdecode`` shows them."""
    return value.decode("utf-8", "surrogateescape")


def _shown(value: pa.Scalar | bytes) -> str:
    text = text_of(value if isinstance(value, bytes) else value.as_py())
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def _from_csv(data: bytes, wanted: Collection[str]) -> Table:
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in data[:4096]:
        raise ValueError("it is not a UTF-8 text file; save it as CSV with the encoding UTF-8")
    line = re.match(rb"[\r\n]*([^\r\n]*)", data)
    assert line is not None  # matches any bytes
    delimiter, names = _header(text_of(line[1]))
    rest = pa.py_buffer(data).slice(line.end())
    if not re.search(rb"[^\r\n]", memoryview(rest)):
        empty = pa.array([], pa.large_binary())
        return Table({n: empty for n in names if n in wanted}, names, "line", lambda rows: [])
    ragged: list[tuple[int, int]] = []

    def collect(row: pa.csv.InvalidRow) -> str:
        ragged.append((row.number - 1, row.actual_columns))
        return "skip"

    table = pa.csv.read_csv(
        pa.BufferReader(rest),
        pa.csv.ReadOptions(use_threads=False, column_names=names),  # threads do not number rows
        pa.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=collect
        ),
        pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.large_binary()),
            include_columns=[name for name in names if name in wanted],
        ),
    )

    def records() -> Iterator[tuple[int, int]]:
        """Line and number of cells of every row."""
        reader = csv.reader(io.StringIO(text_of(data), newline=""), delimiter=delimiter)
        line = 1
        with contextlib.suppress(csv.Error):  # cells of more than 131,072 characters
            for record in reader:
                if record:
                    yield line, len(record)
                line = reader.line_num + 1

    if ragged:
        numbers = _picked(itertools.islice(records(), 1, None), [row for row, _ in ragged[:_SHOWN]])
        shown = ", ".join(
            f"line {number} has {count}"
            for (number, _), (_, count) in zip(numbers, ragged, strict=False)
        )
        raise ValueError(
            f"the first line has {len(names)} cells, but {len(ragged)} others do not ({shown}"
            f"{', ...' if len(ragged) > _SHOWN else ''}); a cell with {delimiter!r} must be quoted"
        )

    def lines(rows: np.ndarray) -> list[int]:
        return [line for line, _ in _picked(itertools.islice(records(), 1, None), rows.tolist())]

    return Table(_texts(table), names, "line", lines)


def _header(line: str) -> tuple[str, list[str]]:
    """Delimiter and names of the columns."""
    candidates = []
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([line], delimiter=delimiter), [])
        names = [name.strip() for name in cells]
        candidates.append((len({"path", "label"} & {*names}), len(names), delimiter, names))
    *_, delimiter, names = max(candidates, key=lambda candidate: candidate[:2])
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated and {"path", "label"} & {*names}:
        raise ValueError(f"its first line names a column twice: {', '.join(map(repr, repeated))}")
    return delimiter, names


def _from_json(data: bytes, wanted: Collection[str]) -> Table:
    def records() -> Iterator[tuple[int, bytes]]:
        numbered = enumerate(io.BytesIO(data), 1)
        return ((number, line) for number, line in numbered if line.strip())

    _, first = next(records(), (0, b"{}"))
    if first == b"{}":
        return Table({}, [], "line", lambda rows: [])
    try:
        known = json.loads(first)
        # pyarrow would take text that looks like a date for one, and convert all other fields.
        kinds = {n: _JSON_TYPES.get(type(known.get(n)), pa.string()) for n in sorted(wanted)}
        table = pa.json.read_json(
            pa.BufferReader(data),
            pa.json.ReadOptions(use_threads=False),
            pa.json.ParseOptions(
                explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore"
            ),
        )
    except (ValueError, AttributeError, RecursionError) as error:
        for number, line in records():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise ValueError(f"line {number} is not a JSON object: {_shown(line)}") from error
        raise

    def lines(rows: np.ndarray) -> list[int]:
        return [line for line, _ in _picked(records(), rows.tolist())]

    later = [name for name in wanted if name not in known and table[name].null_count < len(table)]
    table = table.select([name for name in table.column_names if name in (*known, *later)])
    return Table(_texts(table), [*known, *later], "line", lines)


def _from_parquet(data: bytes, wanted: Collection[str]) -> Table:
    file = pa.parquet.ParquetFile(pa.BufferReader(data))
    names = file.schema_arrow.names
    table = file.read(columns=[name for name in names if name in wanted])
    return Table(_texts(table), names, "row", lambda rows: [row + 1 for row in rows.tolist()])


def _texts(table: pa.Table) -> dict[str, pa.Array]:
    return {name: _text(name, table[name]) for name in table.column_names}


def _text(name: str, column: pa.ChunkedArray) -> pa.Array:
    """A column as ``pa.LargeBinaryArray``; numbers are written as text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):  # integers with missing values, in files written by pandas
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        try:
            column, kind = column.cast(pa.int64()), pa.int64()
        except pa.ArrowInvalid as error:
            raise ValueError(f"column {name!r} has numbers with a fraction") from error
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_text |= pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    is_text |= pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        column = column.cast(pa.large_string())
    elif pa.types.is_null(kind):
        column = pa.chunked_array([pa.nulls(len(column), pa.large_binary())])
    elif not is_text:
        raise ValueError(f"column {name!r} holds {kind}; expected text or integers")
    column = column.cast(pa.large_binary()).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # in older versions
        column = column.chunk(0) if column.num_chunks else pa.array([], pa.large_binary())
    return column.fill_null(b"")


def _picked(records: Iterator[tuple[int, object]], rows: list[int]) -> list[tuple[int, object]]:
    """The records at sorted positions; reads no further than the last."""
    wanted = {*rows}
    last = max(rows, default=-1) + 1
    return [r for position, r in enumerate(itertools.islice(records, last)) if position in wanted]
