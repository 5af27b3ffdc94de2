"""Checkpoints: match their keys to the variables of a graph, and read only the values needed.

A checkpoint is identified by its prefix. V2 has the files ``prefix.index`` and
``prefix.data-?????-of-?????``; V1 (TensorFlow 0.12 and older) is a file named ``prefix``, or shards
named ``prefix-?????-of-?????``.
"""

from __future__ import annotations

import functools
import glob
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.saver_pb2 import SaverDef

from transfer.graph import MAX_TRACE, Variable, constant, split_tensor_name
from transfer.models.checkpoint_index import TensorEntry, read_v1, read_v2

PART = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")
"""Suffix of the files of a V2 checkpoint after the checkpoint prefix."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_SLICE = re.compile(r"(\d{1,18} )*((-|\d{1,18},\d{1,18}):)*(-|\d{1,18},\d{1,18})")
_PART = re.compile(r"/part_(\d+)$")
_AVERAGE = re.compile(r"average|(?<![a-z])ema(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """Location of a variable's value in a checkpoint: a key, and a slice (``""`` for all) in the
    format of Saver: ``"<full shape> <start,length per axis, joined by :>"``."""

    key: str
    slice: str = ""

    def shape(self, full_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the slice of a tensor of shape ``full_shape``.

        Raises:
            ValueError: if the slice is not in the format of Saver, or of another rank.
        """
        if not self.slice:
            return tuple(full_shape)
        if not _SLICE.fullmatch(self.slice):
            raise ValueError(f"the graph is damaged: its saver reads the slice {self.slice[:80]!r}")
        extents = self.slice.split(" ")[-1].split(":")
        return tuple(
            size if extent == "-" else int(extent.split(",")[1])
            for size, extent in zip(full_shape, extents, strict=True)
        )


class MismatchError(ValueError):
    """A checkpoint does not match the variables of a graph.

    ``rename`` is a single substitution, a part of a name and a part of a key, with which it would
    match; ``None`` if no such substitution exists.
    """

    def __init__(self, message: str, rename: tuple[str, str] | None):
        super().__init__(message)
        self.rename = rename


class Checkpoint:
    """A checkpoint on disk, opened for reading.

    Args:
        prefix: checkpoint prefix.
        index_only: do not require the data files; ``read`` will fail without them.

    Raises:
        FileNotFoundError: if a file of the checkpoint is missing; names it.
        ValueError: if it is damaged.
    """

    def __init__(self, prefix: str | Path, *, index_only: bool = False):
        check_path(prefix)
        if not (index_only and _index(Path(prefix)).is_file()):
            check_files(Path(prefix))
        self.prefix, self._files = _to_open(Path(prefix)), Path(prefix)
        try:
            stored = _stored(Path(prefix))
        except (ValueError, OSError) as error:
            raise ValueError(f"checkpoint {self.prefix!r} cannot be read: {error}") from error
        self._shapes = {key: entry.shape for key, entry in stored.items()}
        self._dtypes = {key: entry.dtype for key, entry in stored.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key to shape, for all entries."""
        return self._shapes

    def compare(
        self, variables: Sequence[Variable], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], list[str], list[str]]:
        """Match variables to the entries of the checkpoint.

        Args:
            variables: variables that need a value.
            entries: variable name to entry, as far as known; other variables are looked up by their
                own names.

        Returns:
            The entries of the variables that match; the names of variables without an entry; and
            descriptions of variables whose shape or dtype differs.
        """
        matched, missing, different = {}, [], []
        for variable in variables:
            entry = entries.get(variable.name, Entry(variable.name))
            if entry.key not in self._shapes:
                missing.append(variable.name)
                continue
            stored = (entry.shape(self._shapes[entry.key]), self._dtypes[entry.key])
            expected = (stored[0] if variable.shape is None else variable.shape, variable.dtype)
            if stored == expected:
                matched[variable.name] = entry
            else:
                different.append(
                    f"{variable.name} (graph {expected[0]} {expected[1].name}, "
                    f"checkpoint {stored[0]} {stored[1].name})"
                )
        return matched, missing, different

    def match(
        self, variables: Sequence[Variable], entries: Mapping[str, Entry]
    ) -> dict[str, Entry]:
        """The entry of each variable, with names, shapes and dtypes checked; see ``compare``.

        Raises:
            MismatchError: lists all missing and different variables, and unmatched entries of the
                checkpoint.
        """
        matched, missing, different = self.compare(variables, entries)
        if missing or different:
            taken = {entry.key for entry in matched.values()}
            extra = sorted(key for key in self._shapes if key not in taken)
            rename = None if different else self._explaining(variables, entries, missing, extra)
            raise MismatchError(
                f"checkpoint {self.prefix!r} does not fit the graph: {len(missing)} of "
                f"{len(variables)} variables missing ({', '.join(missing) or 'none'}), "
                f"{len(different)} different ({', '.join(different) or 'none'}), "
                f"{len(extra)} that the tap does not need ({', '.join(extra[:8]) or 'none'}"
                f"{', ...' * (len(extra) > 8)}); "
                + (
                    f"rename={dict([rename])} gives each of the missing ones an entry"
                    if rename
                    else "look for the checkpoint that was saved with this graph"
                ),
                rename,
            )
        return matched

    def _explaining(
        self,
        variables: Sequence[Variable],
        entries: Mapping[str, Entry],
        missing: Sequence[str],
        extra: Sequence[str],
    ) -> tuple[str, str] | None:
        """A single substitution, a part of a name and a part of a key, with which no variable is
        missing."""
        lacking = {
            entries.get(v.name, Entry(v.name)).key: v for v in variables if v.name in set(missing)
        }
        if not lacking:
            return None

        def fits(name: str, key: str) -> bool:
            shape = lacking[name].shape
            return key in free and shape in (None, self._shapes[key])

        free, first = set(extra), next(iter(lacking))
        for key in sorted(extra, key=lambda key: abs(len(key) - len(first))):
            for part, other in _substitutions(first, key):
                keys = [substituted(name, part, other) for name in lacking]
                if len({*keys}) == len(keys) and all(map(fits, lacking, keys)):
                    return part, other
        return None

    def read(self, entries: Mapping[str, Entry]) -> dict[str, tf.Tensor]:
        """Read the values of entries, in one pass over the files.

        Raises:
            FileNotFoundError: if a data file is missing.
            ValueError: if the data are damaged.
        """
        check_files(self._files)
        self._check_size(entries)
        try:
            values = tf.raw_ops.RestoreV2(
                prefix=self.prefix,
                tensor_names=[entry.key for entry in entries.values()],
                shape_and_slices=[entry.slice for entry in entries.values()],
                dtypes=[self._dtypes[entry.key] for entry in entries.values()],
            )
        except tf.errors.OpError as error:
            raise ValueError(f"checkpoint {self.prefix!r} is damaged: {error.message}") from error
        return dict(zip(entries, values, strict=True))

    def _check_size(self, entries: Mapping[str, Entry]) -> None:
        """Detect truncated data files before memory is allocated."""
        if not _index(self._files).is_file():
            return
        present = sum(path.stat().st_size for path in _shards(self._files))
        keys = {entry.key for entry in entries.values()}
        needed = sum(math.prod(self._shapes[key]) * self._dtypes[key].size for key in keys)
        if present < needed:
            raise ValueError(
                f"checkpoint {self.prefix!r} is damaged: its data have {present:,} bytes, but "
                f"reading needs {needed:,}; it is truncated, get it again"
            )


def check_path(path: str | Path) -> None:
    """Reject a path that TensorFlow interprets as a glob pattern: it could be written but not read.

    Raises:
        ValueError: if it contains one of ``* ? [ ]``.
    """
    if set("*?[]") & set(str(path)):
        raise ValueError(
            f"TensorFlow reads no checkpoint at {str(path)!r}: it takes * ? [ ] in a path as a "
            "pattern; rename the folder or the file"
        )


def exists(prefix: Path) -> bool:
    """Whether a checkpoint with this prefix exists, complete or not."""
    if not prefix.name:  # for example /
        return False
    return (
        _index(prefix).is_file()
        or prefix.is_file()
        or any(prefix.parent.glob(f"{glob.escape(prefix.name)}-?????-of-?????"))
    )


def saver_entries(graph_def: GraphDef, saver_def: SaverDef) -> dict[str, Entry]:
    """Variable name to the entry that the graph's own saver restores into it.

    The saver's operations are parsed, never run. Savers may rename variables and save slices of
    partitioned variables. Empty if the saver's operations are not in the graph.
    """
    nodes = {node.name: node for node in graph_def.node}
    restore_all = split_tensor_name(saver_def.restore_op_name)[0]
    if restore_all not in nodes:
        return {}

    @functools.cache
    def strings(name: str) -> list[str]:
        value = constant(nodes.get(split_tensor_name(name)[0]))
        return [v.decode() for v in (() if value is None else value.ravel()) if type(v) is bytes]

    entries = {}
    assigned = (node[1:] for node in nodes[restore_all].input if node.startswith("^"))
    pending, seen = list(assigned), set()
    while pending:
        node = nodes.get(pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        pending += [edge[1:] for edge in node.input if edge.startswith("^")]
        if node.op not in ("Assign", "AssignVariableOp"):
            continue
        variable, value = split_tensor_name(node.input[0])[0], split_tensor_name(node.input[1])
        for _ in range(MAX_TRACE):
            restore = nodes.get(value[0])
            if restore is None or restore.op not in ("Identity", "Reshape"):
                break
            value = split_tensor_name(restore.input[0])
        if restore is None or restore.op not in ("RestoreV2", "RestoreSlice", "Restore"):
            continue
        keys = strings(restore.input[1])
        slices = strings(restore.input[2]) if restore.op != "Restore" else [""]
        if value[1] < min(len(keys), len(slices)):
            entries[variable] = Entry(keys[value[1]], slices[value[1]])
    return entries


def partition_entries(
    variables: Sequence[NodeDef], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Entry]:
    """The entries of partitioned variables, as slices of the full variables in a checkpoint.

    A saver stores ``w/part_0``, ``w/part_1``, ... as slices of ``w``. If its operations are not in
    the graph, the slices are derived from the shapes: the parts are consecutive along the axis on
    which their sizes sum to that of the full variable.

    Args:
        variables: the variables of a graph.
        shapes: shapes of the checkpoint's entries.
    """
    parts: dict[str, dict[int, NodeDef]] = {}
    for node in variables:
        if (match := _PART.search(node.name)) and node.name[: match.start()] in shapes:
            parts.setdefault(node.name[: match.start()], {})[int(match[1])] = node
    entries = {}
    for whole, numbered in parts.items():
        full = tuple(shapes[whole])
        nodes = [numbered[number] for number in sorted(numbered)]
        sizes = [tuple(dim.size for dim in node.attr["shape"].shape.dim) for node in nodes]
        for axis in range(len(full)):
            rests = {size[:axis] + size[axis + 1 :] for size in sizes if len(size) == len(full)}
            total = sum(size[axis] for size in sizes if len(size) == len(full))
            if rests != {full[:axis] + full[axis + 1 :]} or total != full[axis]:
                continue
            start = 0
            for node, size in zip(nodes, sizes, strict=True):
                extents = ["-"] * len(full)
                extents[axis] = f"{start},{size[axis]}"
                start += size[axis]
                shape = " ".join(map(str, full))
                entries[node.name] = Entry(whole, f"{shape} {':'.join(extents)}")
            break
    return entries


def substituted(name: str, part: str, other: str) -> str:
    """Replace ``part`` in a name by ``other``; an empty ``part`` prepends ``other``."""
    return name.replace(part, other) if part else other + name


def renamed_entries(
    names: Sequence[str],
    entries: Mapping[str, Entry],
    shapes: Mapping[str, Sequence[int]],
    rename: Mapping[str, str],
) -> dict[str, Entry]:
    """The entries of variables whose keys are found by renaming.

    Args:
        names: names of the variables.
        entries: entries of variables that are not stored under their own names.
        shapes: shapes of the checkpoint's entries.
        rename: parts of names to parts of keys, substituted in this order. Variables whose renamed
            key does not exist keep their entry.

    Raises:
        ValueError: if a substitution leads to no entry.
    """
    renamed, used = {}, set()
    for name in names:
        entry = entries.get(name, Entry(name))
        key, passed = entry.key, []
        for part, other in rename.items():
            if part in key:
                key = substituted(key, part, other)
                passed.append(part)
        if passed and key in shapes:
            renamed[name] = Entry(key, entry.slice)
            used.update(passed)
    for part in rename.keys() - used:
        raise ValueError(
            f"rename={ {part: rename[part]} } leads to no entry of the checkpoint; it maps "
            "a part of the graph's names to what the checkpoint has in its place: "
            f"the graph has {', '.join(names[:3])}, the checkpoint {', '.join([*shapes][:3])}"
        )
    return renamed


def _substitutions(name: str, key: str) -> Iterator[tuple[str, str]]:
    """The parts in which a name and a key differ, compared by path components and by characters."""
    for split, join in ((lambda text: text.split("/"), "/"), (list, "")):
        old, new = split(name), split(key)
        start = _num_common(old, new)
        end = _num_common(old[start:][::-1], new[start:][::-1])
        middles = old[start : len(old) - end], new[start : len(new) - end]
        if join and not middles[0] and start == 0:
            yield "", join.join(middles[1]) + join  # in another scope
        elif join and not middles[1] and start == 0:
            yield join.join(middles[0]) + join, ""
        elif middles[0]:
            yield join.join(middles[0]), join.join(middles[1])


def _num_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def average_entries(
    names: Sequence[str], source: Checkpoint, entries: Mapping[str, Entry] | None = None
) -> dict[str, Entry]:
    """The entries of the exponential moving averages (EMA) of variables, as far as they have one.

    ``tf.train.ExponentialMovingAverage`` stores the average of ``w`` in
    ``w/ExponentialMovingAverage``, possibly under a scope and under a custom name.

    Raises:
        ValueError: if the checkpoint has no moving averages.
    """
    averages: dict[str, str] = {}
    for key in sorted(
        source.shapes, key=len, reverse=True
    ):  # the shortest key, without scope, wins
        name, _, last = key.rpartition("/")
        if _AVERAGE.search(last):
            averages[name] = key
    by_end = {
        name.split("/", depth)[depth]: key
        for name, key in averages.items()
        if name not in names  # an exact match belongs to that variable only
        for depth in range(name.count("/") + 1)
    }
    known = by_end | averages
    found = {}
    for name in names:
        # The parts of a partitioned variable have one average, of the whole.
        entry = (entries or {}).get(name, Entry(name))
        if name in known:
            found[name] = Entry(known[name])
        elif entry.key in known:
            found[name] = Entry(known[entry.key], entry.slice)
    if not found:
        raise ValueError(
            f"checkpoint {source.prefix!r} has no moving averages: no entry is named like "
            "<variable>/ExponentialMovingAverage; read the weights themselves"
        )
    return found


def check_files(prefix: Path) -> None:
    """Check that all files of a checkpoint exist.

    Raises:
        FileNotFoundError: lists the missing files.
    """
    if _index(prefix).is_file():
        shards = [
            _SHARD.search(path.name)
            for path in _shards(prefix)
            if path.is_file()  # reading a pipe would block
        ]
        present = {(int(match[1]), int(match[2])) for match in shards if match}
        count = max((total for _, total in present), default=1)
        name = _index(prefix).name.removesuffix(".index")
        missing = [
            f"{name}.data-{shard:05d}-of-{count:05d}"
            for shard in range(count)
            if (shard, count) not in present
        ]
        if missing:
            raise FileNotFoundError(
                f"checkpoint {str(prefix)!r} lacks its data: {', '.join(missing)} is not beside "
                "the index; get the file from where the index came from"
            )
    elif not exists(prefix):
        raise FileNotFoundError(
            f"no checkpoint {str(prefix)!r}: expected {prefix.name}.index with its data files, or "
            f"a V1 checkpoint named {prefix.name}; checkpoints in that folder: "
            f"{', '.join(sorted(p.stem for p in prefix.parent.glob('*.index'))) or 'none'}"
        )


def _stored(prefix: Path) -> dict[str, TensorEntry]:
    if _index(prefix).is_file():
        return read_v2(_index(prefix))
    if prefix.is_file():
        return read_v1([prefix])
    return read_v1(sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}-?????-of-?????")))


def _to_open(prefix: Path) -> str:
    """The path to pass to TensorFlow: the prefix, or a pattern for a sharded V1 checkpoint."""
    if _index(prefix).parent == prefix:
        return f"{prefix}/"
    return (
        str(prefix) if _index(prefix).is_file() or prefix.is_file() else f"{prefix}-?????-of-?????"
    )


def file_of(prefix: Path, suffix: str) -> Path:
    """The file of a model or a checkpoint with a suffix such as ``.meta``.

    ``saver.save(session, "model/")`` writes files without a stem, ``model/.meta``; the prefix is
    then the folder.
    """
    nameless, named = prefix / suffix, prefix.with_name(prefix.name + suffix)
    return nameless if nameless.is_file() and not named.exists() else named


def _index(prefix: Path) -> Path:
    return file_of(prefix, ".index")


def _shards(prefix: Path) -> Iterator[Path]:
    name = _index(prefix).name.removesuffix(".index")
    return _index(prefix).parent.glob(f"{glob.escape(name)}.data-?????-of-?????")
