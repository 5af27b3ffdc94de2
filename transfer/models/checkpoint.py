"""Checkpoints: which key feeds which variable, reading only those, and writing.

A checkpoint is named by its prefix. V2 has ``prefix.index`` and ``prefix.data-?????-of-?????``; V1
(TensorFlow 0.12 and older) is a file named ``prefix`` itself, or several ``prefix-?????-of-?????``.
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
from transfer.models.checkpoint_index import Stored, read_v1, read_v2

PART = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")
"""What the name of a V2 checkpoint's file has after the prefix."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_SLICE = re.compile(r"(\d{1,18} )*((-|\d{1,18},\d{1,18}):)*(-|\d{1,18},\d{1,18})")
_PART = re.compile(r"/part_(\d+)$")
_AVERAGE = re.compile(r"average|(?<![a-z])ema(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """Where the value of a variable is: a key, and the slice of it (``""`` for all) as Saver writes
    it: ``"<full shape> <start,length per axis, joined by :>"``."""

    key: str
    slice: str = ""

    def shape(self, full_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the slice of a tensor of shape ``full_shape``.

        Raises:
            ValueError: if the slice is not written as Saver writes it, or of another rank.
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
    """A checkpoint does not have what a graph needs. ``rename`` is the one substitution, part of a
    name and part of a key, after which it would; ``None`` if there is no such."""

    def __init__(self, message: str, rename: tuple[str, str] | None):
        super().__init__(message)
        self.rename = rename


class Checkpoint:
    """A checkpoint on disk, opened to look at and to read from.

    Args:
        prefix: of its files.
        index_only: do without the data; ``read`` will fail.

    Raises:
        FileNotFoundError: if a file of it is missing; names it.
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
        """Key to shape."""
        return self._shapes

    def compare(
        self, variables: Sequence[Variable], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], list[str], list[str]]:
        """What of the checkpoint belongs to which variable.

        Args:
            variables: those that need a value.
            entries: variable's name to entry where that is known; any other variable is looked up
                by its own name.

        Returns:
            The entry of each variable that has one; the names of those that have none; and
            descriptions of those whose shape or type is another one.
        """
        matched, missing, different = {}, [], []
        for variable in variables:
            entry = entries.get(variable.name, Entry(variable.name))
            if entry.key not in self._shapes:
                missing.append(variable.name)
                continue
            found = (entry.shape(self._shapes[entry.key]), self._dtypes[entry.key])
            wanted = (found[0] if variable.shape is None else variable.shape, variable.dtype)
            if found == wanted:
                matched[variable.name] = entry
            else:
                different.append(
                    f"{variable.name} (graph {wanted[0]} {wanted[1].name}, "
                    f"checkpoint {found[0]} {found[1].name})"
                )
        return matched, missing, different

    def match(
        self, variables: Sequence[Variable], entries: Mapping[str, Entry]
    ) -> dict[str, Entry]:
        """The entry of each variable, all names, shapes and types checked; see ``compare``.

        Raises:
            MismatchError: lists all that is missing or different, and what the checkpoint has
                instead.
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
        """The one substitution, part of a name and part of a key, after which nothing is
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
                found = [substituted(name, part, other) for name in lacking]
                if len({*found}) == len(found) and all(map(fits, lacking, found)):
                    return part, other
        return None

    def read(self, entries: Mapping[str, Entry]) -> dict[str, tf.Tensor]:
        """The values of some entries, all in one pass over the file.

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
        """A file that is cut short is told from one that is damaged, before memory is asked for."""
        if not _index(self._files).is_file():
            return
        found = sum(path.stat().st_size for path in _shards(self._files))
        keys = {entry.key for entry in entries.values()}
        needed = sum(math.prod(self._shapes[key]) * self._dtypes[key].size for key in keys)
        if found < needed:
            raise ValueError(
                f"checkpoint {self.prefix!r} is damaged: its data have {found:,} bytes, and what "
                f"is to be read needs {needed:,}; it was cut short, get it again"
            )


def check_path(path: str | Path) -> None:
    """Refuse a path that TensorFlow takes for a pattern; it could be written to but not read from.

    Raises:
        ValueError: if there is one of ``* ? [ ]`` in it.
    """
    if set("*?[]") & set(str(path)):
        raise ValueError(
            f"TensorFlow reads no checkpoint at {str(path)!r}: it takes * ? [ ] in a path for a "
            "pattern; rename the folder or the file"
        )


def exists(prefix: Path) -> bool:
    """Whether there is a checkpoint of this prefix, complete or not."""
    if not prefix.name:  # such as /
        return False
    return (
        _index(prefix).is_file()
        or prefix.is_file()
        or any(prefix.parent.glob(f"{glob.escape(prefix.name)}-?????-of-?????"))
    )


def saver_entries(graph_def: GraphDef, saver_def: SaverDef) -> dict[str, Entry]:
    """What the graph's own saver restores into each variable: its name to the entry.

    The saver's operations are read, never run. Savers may rename variables and save slices of
    partitioned ones. Empty where the saver's operations are not in the graph.
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
    """For the parts of partitioned variables, the slices of the whole that a checkpoint has.

    A saver stores ``w/part_0``, ``w/part_1``, ... as slices of ``w``. Where its operations are not
    in the graph, the shapes say which: the parts follow one another along the axis on which they
    add up to the whole.

    Args:
        variables: the variables of a graph.
        shapes: of the checkpoint's entries.
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
    """A name with ``other`` for ``part``; at its beginning where ``part`` is empty."""
    return name.replace(part, other) if part else other + name


def renamed_entries(
    names: Sequence[str],
    entries: Mapping[str, Entry],
    shapes: Mapping[str, Sequence[int]],
    rename: Mapping[str, str],
) -> dict[str, Entry]:
    """Where the variables are whose keys differ from their names by a rule.

    Args:
        names: of the variables.
        entries: of those that are not stored under their names.
        shapes: of the checkpoint's entries.
        rename: parts of names to parts of keys, put in one after the other. What then names no
            entry stays what it was.

    Raises:
        ValueError: if one of them leads to no entry.
    """
    found, used = {}, set()
    for name in names:
        entry = entries.get(name, Entry(name))
        key, passed = entry.key, []
        for part, other in rename.items():
            if part in key:
                key = substituted(key, part, other)
                passed.append(part)
        if passed and key in shapes:
            found[name] = Entry(key, entry.slice)
            used.update(passed)
    for part in rename.keys() - used:
        raise ValueError(
            f"rename={ {part: rename[part]} } leads to no entry of the checkpoint; it maps "
            "a part of the graph's names to what the checkpoint has in its place: "
            f"the graph has {', '.join(names[:3])}, the checkpoint {', '.join([*shapes][:3])}"
        )
    return found


def _substitutions(name: str, key: str) -> Iterator[tuple[str, str]]:
    """The parts, of a name and of a key, in which they differ: of their paths, and of their
    letters."""
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
    """How many items two lists begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def average_entries(names: Sequence[str], source: Checkpoint) -> dict[str, Entry]:
    """For each variable that has a moving average in the checkpoint, where that is.

    ``tf.train.ExponentialMovingAverage`` keeps the average of ``w`` in
    ``w/ExponentialMovingAverage``, maybe under a scope; its name can be chosen.

    Raises:
        ValueError: if there is none at all.
    """
    averages: dict[str, str] = {}
    for key in sorted(source.shapes, key=len, reverse=True):  # the shortest, without a scope, wins
        name, _, last = key.rpartition("/")
        if _AVERAGE.search(last):
            averages[name] = key
    by_end = {
        name.split("/", depth)[depth]: key
        for name, key in averages.items()
        if name not in names  # else it is that variable's, whatever scope another one is in
        for depth in range(name.count("/") + 1)
    }
    known = by_end | averages
    found = {name: Entry(known[name]) for name in names if name in known}
    if not found:
        raise ValueError(
            f"checkpoint {source.prefix!r} has no moving averages: no entry is named like "
            "<variable>/ExponentialMovingAverage; read the weights themselves"
        )
    return found


def check_files(prefix: Path) -> None:
    """Look whether all files of a checkpoint are there.

    Raises:
        FileNotFoundError: names those that are missing.
    """
    if _index(prefix).is_file():
        shards = [
            _SHARD.search(path.name)
            for path in _shards(prefix)
            if path.is_file()  # a pipe would be read for ever
        ]
        found = {(int(match[1]), int(match[2])) for match in shards if match}
        count = max((total for _, total in found), default=1)
        name = _index(prefix).name.removesuffix(".index")
        missing = [
            f"{name}.data-{shard:05d}-of-{count:05d}"
            for shard in range(count)
            if (shard, count) not in found
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


def _stored(prefix: Path) -> dict[str, Stored]:
    if _index(prefix).is_file():
        return read_v2(_index(prefix))
    if prefix.is_file():
        return read_v1([prefix])
    return read_v1(sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}-?????-of-?????")))


def _to_open(prefix: Path) -> str:
    """What TensorFlow opens: the prefix, or a pattern for the files of a sharded V1 checkpoint."""
    if _index(prefix).parent == prefix:
        return f"{prefix}/"
    return (
        str(prefix) if _index(prefix).is_file() or prefix.is_file() else f"{prefix}-?????-of-?????"
    )


def file_of(prefix: Path, suffix: str) -> Path:
    """The file of a model or a checkpoint with a suffix such as ``.meta``.

    ``saver.save(session, "model/")`` gives files without a name, ``model/.meta``: there the prefix
    is the folder.
    """
    nameless, named = prefix / suffix, prefix.with_name(prefix.name + suffix)
    return nameless if nameless.is_file() and not named.exists() else named


def _index(prefix: Path) -> Path:
    return file_of(prefix, ".index")


def _shards(prefix: Path) -> Iterator[Path]:
    name = _index(prefix).name.removesuffix(".index")
    return _index(prefix).parent.glob(f"{glob.escape(name)}.data-?????-of-?????")
