"""Manifests: tables of image files with their labels, and perhaps their splits and groups.

A manifest is a CSV, JSON Lines or Parquet file with the columns ``path`` and ``label``, and
optionally ``split`` and ``group``. The manifest and the images are local files or fsspec URLs.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transfer.core.files import open_regular
from transfer.data import remote_files
from transfer.data.dataset import EVAL_SPLITS, TRAIN_SPLITS, Source
from transfer.data.groups import with_singles
from transfer.data.labelled_files import labelled_files
from transfer.data.labelled_urls import labelled_urls
from transfer.data.listed_files import check_files
from transfer.data.manifest_table import Table, read_table
from transfer.data.names import Names
from transfer.data.remote_files import is_url

logger = logging.getLogger(__name__)

GROUP = "group"
"""Column with the groups, unless another is named."""
_SPLITS = TRAIN_SPLITS + EVAL_SPLITS
_URL = "^[A-Za-z][A-Za-z0-9+.-]*://"


def open_manifest(location: str, group_by: str | None = None) -> Source:
    """The images that a manifest lists; see ``open_source``. Opens none of them.

    Args:
        location: absolute path, or fsspec URL.
        group_by: column with the groups. Default: ``group``, if there is such a column.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it cannot be used; names all reasons, with lines.
    """
    bare = location.partition("?")[0] if is_url(location) else location
    file = PurePosixPath(bare)
    try:
        columns = {"path", "label", "split", group_by or GROUP}
        table = read_table(file.suffix.lower(), _read(location), columns)
        group_by = _check_columns(table, group_by)
    except ValueError as error:
        raise ValueError(f"csv={location!r} cannot be used: {error}") from error
    rows = _Rows(table)
    class_names, labels = _labels(rows)
    splits = _splits(rows)
    groups = _groups(rows, group_by)
    root = bare.rpartition("/")[0] if is_url(location) else os.path.dirname(location)
    paths = _paths(rows, root)
    keep = _without_repeated(rows, paths, {"label": labels, "split": splits, "group": groups})
    has_urls = is_url(root) or pc.any(pc.match_substring_regex(paths, _URL)).as_py()
    refused = _check_paths(rows, paths.filter(pa.array(keep)), np.flatnonzero(keep), root)
    rows.raise_problems(location)
    for line in rows.warnings:
        logger.warning(f"csv={location!r}: {line}")

    names = _names(paths)
    members = {
        name: np.flatnonzero(keep & (splits == number))
        for number, name in enumerate(_SPLITS)
        if (keep & (splits == number)).any()
    }
    files = {split: names[at] for split, at in members.items()}
    labels_of = {split: labels[at] for split, at in members.items()}
    if has_urls:
        source = labelled_urls(file.stem, class_names, root, files, labels_of, refused=refused)
    else:
        source = labelled_files(
            file.stem, class_names, Path(root), files, labels_of, refused=refused
        )
    if groups is None:
        return source
    groups = with_singles(groups)
    groups_of = {split: groups[at] for split, at in members.items()}
    return replace(source, groups=groups_of.__getitem__, origin={"group_by": group_by})


@dataclass
class _Rows:
    """The rows of a manifest, and all that is wrong with them."""

    table: Table
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def column(self, name: str) -> pa.Array:
        return self.table.columns[name]

    def coded(self, name: str) -> tuple[np.ndarray, list[bytes]]:
        """A column as positions, int, in the list of its different values."""
        coded = self.column(name).dictionary_encode()
        return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist()

    def refuse(self, wrong: np.ndarray, one: str, more: str, *shown: str, hint: str = "") -> None:
        """Record a problem of the rows at which a boolean array is true, if there are any."""
        at = np.flatnonzero(wrong)
        if len(at):
            what = f"1 {one}" if len(at) == 1 else f"{len(at)} {more}"
            self.problems.append(f"{what} ({self.table.describe(at, *shown)}{hint})")

    def raise_problems(self, location: str) -> None:
        if self.problems:
            raise ValueError(f"csv={location!r} cannot be used: {'; '.join(self.problems)}")


def _read(location: str) -> bytes:
    if not is_url(location):
        try:
            with open_regular(Path(location)) as file:
                return file.read()
        except FileNotFoundError:
            raise FileNotFoundError(f"csv={location!r} does not exist") from None
    remote_files.check_url(location)
    try:
        return remote_files.read(location)
    except FileNotFoundError:
        raise FileNotFoundError(f"csv={location!r} does not exist") from None
    except Exception as error:  # stores raise errors of their own
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _check_columns(table: Table, group_by: str | None) -> str | None:
    """Check the names of the columns, and that there are rows; returns the column of groups."""
    names = table.all_names
    needed = ["path", "label", *([group_by] if group_by else [])]
    missing = [repr(name) for name in needed if name not in names]
    if missing:
        shown = (", ".join(map(repr, names[:10])) or "none") + (", ..." if len(names) > 10 else "")
        raise ValueError(
            f"it has no column {' and no column '.join(missing)}; expected a first line "
            f"path,label[,split][,group] or fields of these names, found {shown}"
        )
    if not len(table):
        raise ValueError("it lists no images, only the names of columns")
    if group_by in ("path", "label", "split"):
        raise ValueError(f"group_by={group_by} names the column of the {group_by}s, not of groups")
    if group_by is None and GROUP in names:
        group_by = GROUP
    unused = [name for name in names if name not in ("path", "label", "split", group_by)]
    if unused:
        shown = ", ".join(map(repr, unused[:5])) + (", ..." if len(unused) > 5 else "")
        logger.warning(f"columns of the manifest that are not used: {shown}")
    return group_by


def _labels(rows: _Rows) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the label of each row, int64; -1 for an invalid one."""
    codes, values = rows.coded("label")
    texts: list[str | None] = [_utf8(value) for value in values]
    texts = [None if text is None else text.strip() for text in texts]

    def where(is_wrong: Sequence[bool]) -> np.ndarray:
        return np.array(is_wrong, bool)[codes]

    rows.refuse(where([text == "" for text in texts]), "row has no label", "rows have no label")
    rows.refuse(
        where([text is None for text in texts]),
        "label is not UTF-8 text",
        "labels are not UTF-8 text",
        "label",
        hint="; save the file with the encoding UTF-8",
    )
    rows.refuse(
        where([text is not None and re.search("[\r\n\0]", text) is not None for text in texts]),
        "label has a line break",
        "labels have a line break",
        "label",
        hint="; perhaps a quote is not closed",
    )
    named = {text for text in texts if text}
    is_decimal = all(re.fullmatch(r"-?[0-9]{1,18}(\.0+)?", text) for text in named)
    if is_decimal and any("." not in text for text in named):
        # pandas writes 1.0 for 1 in a column that lacks a value.
        texts = [None if text is None else text.partition(".")[0] for text in texts]
        named = {text for text in texts if text}
    if all(re.fullmatch("-?[0-9]{1,18}", text) for text in named):
        rows.refuse(
            where([text is not None and text.startswith("-") for text in texts]),
            "label is negative",
            "labels are negative",
            "label",
            hint="; expected integers from 0, or names",
        )
        class_names = sorted(named, key=lambda text: (int(text), text))
        twice = [b for a, b in itertools.pairwise(class_names) if int(a) == int(b)]
        rows.refuse(
            where([text in twice for text in texts]),
            "label is an integer that is also written otherwise",
            "labels are integers that are also written otherwise",
            "label",
        )
    else:
        class_names = sorted(named)
    label_of = {text: label for label, text in enumerate(class_names)}
    return class_names, np.array([label_of.get(text or "", -1) for text in texts], np.int64)[codes]


def _splits(rows: _Rows) -> np.ndarray:
    """The split of each row, as a position in ``_SPLITS``; -1 for an unknown one."""
    if "split" not in rows.table.columns:
        return np.full(len(rows.table), _SPLITS.index("train"))
    codes, values = rows.coded("split")
    texts = [(_utf8(value) or "").strip() for value in values]
    known = [_SPLITS.index(text) if text in _SPLITS else -1 for text in texts]
    splits = np.array(known, np.int64)[codes]
    rows.refuse(
        splits < 0,
        "row has no known split",
        "rows have no known split",
        "split",
        hint=f"; expected {', '.join(_SPLITS)}",
    )
    return splits


def _groups(rows: _Rows, group_by: str | None) -> np.ndarray | None:
    """The number of the group of each row, int64; -1 for a row without one."""
    if group_by is None:
        return None
    codes, values = rows.coded(group_by)
    numbers: dict[bytes, int] = {}
    codes = np.array([numbers.setdefault(v.strip(), len(numbers)) for v in values], int)[codes]
    single = codes == numbers.get(b"", -1)
    if single.any():
        rows.warnings.append(
            f"{single.sum()} of {len(single)} rows have no {group_by!r} "
            f"({rows.table.describe(np.flatnonzero(single))}); each is a group of its own"
        )
    return np.where(single, -1, codes)


def _paths(rows: _Rows, root: str) -> pa.Array:
    """The paths and URLs, relative to ``root`` if they are below it."""
    paths = rows.column("path")
    folder = os.fsencode(root) + b"/"
    is_url_ = pc.match_substring_regex(paths, _URL)
    is_file = pc.match_substring_regex(paths, "^file://")
    is_untidy = pc.and_not(pc.match_substring_regex(paths, r"^\./|/\.?/"), is_url_)
    chosen = pc.or_(is_file, is_untidy)
    tidied = [_tidied(path) for path in paths.filter(chosen).to_pylist()]
    paths = pc.replace_with_mask(paths, chosen, pa.array(tidied, pa.large_binary()))
    below = pc.starts_with(paths, folder)
    return pc.if_else(below, pc.replace_substring(paths, folder, b"", max_replacements=1), paths)


def _tidied(path: bytes) -> bytes:
    """A path without ``file://``, repeated slashes and ``.``; links make ``..`` significant."""
    text = os.fsdecode(path).removeprefix("file://")
    return os.fsencode(re.sub("(?<=/)(\\./)+|^(\\./+)+", "", re.sub("/+", "/", text)))


def _without_repeated(
    rows: _Rows, paths: pa.Array, columns: dict[str, np.ndarray | None]
) -> np.ndarray:
    """Boolean ``[num_rows]``, false for a row that repeats an earlier one."""
    coded = paths.dictionary_encode()
    keep = np.ones(len(paths), bool)
    if len(coded.dictionary) == len(paths):
        return keep
    codes = coded.indices.to_numpy()
    first = np.unique(codes, return_index=True)[1][codes]
    keep = first == np.arange(len(paths))
    for name, values in columns.items():
        if values is not None:
            differs = values[first] != values
            differs[first[differs]] = True  # show both
            rows.refuse(
                differs,
                "",
                f"rows list the same paths with another {name}",
                "path",
                *([name] if name in rows.table.columns else []),
            )
    if not keep.all():
        again = np.flatnonzero(~keep)
        rows.warnings.append(
            f"{len(again)} rows repeat a path and were left out "
            f"({rows.table.describe(again, 'path')})"
        )
    return keep


def _check_paths(rows: _Rows, paths: pa.Array, at: np.ndarray, root: str) -> dict[str, str]:
    """Check the paths of the rows ``at``; returns the names that must not be read, with reasons."""

    def refuse(wrong: np.ndarray, one: str, more: str, hint: str = "") -> None:
        is_wrong = np.zeros(len(rows.table), bool)
        is_wrong[at[wrong]] = True
        rows.refuse(is_wrong, one, more, "path", hint=hint)

    is_bad = pc.match_substring_regex(paths, "[\\x00\r\n]")
    is_bad = pc.or_(is_bad, pc.equal(pc.binary_length(paths), 0)).to_numpy(zero_copy_only=False)
    refuse(is_bad, "path is empty or has a line break", "paths are empty or have line breaks")
    is_remote = pc.match_substring_regex(paths, _URL).to_numpy(zero_copy_only=False)
    known = "|".join(remote_files.STORES)
    of_store = pc.match_substring_regex(paths, f"(?i)^({known})://")
    of_store = pc.and_not(of_store, pc.match_substring(paths, "::")).to_numpy(zero_copy_only=False)
    refuse(
        is_remote & ~of_store & ~is_bad,
        "path is a URL of no known store",
        "paths are URLs of no known store",
        f"; expected {', '.join(remote_files.STORES)}",
    )
    if is_url(root):
        is_remote |= ~pc.starts_with(paths, "/").to_numpy(zero_copy_only=False)
    local = np.flatnonzero(~is_remote & ~is_bad)
    missing, refused = check_files(Path(root), paths.take(pa.array(local)))
    refuse(local[missing], "file does not exist", "files do not exist")
    chosen = paths.take(pa.array(local[list(refused)], pa.int64())).to_pylist()
    return dict(zip(map(os.fsdecode, chosen), refused.values(), strict=True))


def _names(paths: pa.Array) -> Names:
    """The same bytes, without copying each."""
    _, offsets, data = paths.buffers()
    starts = np.frombuffer(offsets, np.int64)[paths.offset : paths.offset + len(paths) + 1]
    return Names(data.to_pybytes(), starts[:-1].copy(), np.diff(starts))


def _utf8(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None
