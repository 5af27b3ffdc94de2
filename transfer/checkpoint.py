"""Checkpoints: which key feeds which variable, reading only those, and writing.

A checkpoint is named by its prefix. V2 has ``prefix.index`` and ``prefix.data-?????-of-?????``; V1
(TensorFlow 0.12 and older) is a file named ``prefix`` itself, or several ``prefix-?????-of-?????``.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.protobuf.saver_pb2 import SaverDef

from transfer.surgery import Variable, split_tensor_name

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Entry:
    """Where the value of a variable is: a key, and the slice of it (``""`` for all) as Saver writes
    it: ``"<full shape> <start,length per axis, joined by :>"``."""

    key: str
    slice: str = ""

    def shape(self, full_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the slice of a tensor of shape ``full_shape``."""
        if not self.slice:
            return tuple(full_shape)
        extents = self.slice.split(" ")[-1].split(":")
        return tuple(
            size if extent == "-" else int(extent.split(",")[1])
            for size, extent in zip(full_shape, extents, strict=True)
        )


class Checkpoint:
    """A checkpoint on disk, opened to look at and to read from.

    Raises:
        FileNotFoundError: if a file of it is missing; names it.
        ValueError: if it is damaged.
    """

    def __init__(self, prefix: str | Path):
        check_path(prefix)
        _check_files(Path(prefix))
        self.prefix = _to_open(Path(prefix))
        try:
            reader = tf.train.load_checkpoint(self.prefix)
            self._shapes = reader.get_variable_to_shape_map()
            self._dtypes = reader.get_variable_to_dtype_map()
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint {self.prefix!r} cannot be read: {error}") from error

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Key to shape."""
        return self._shapes

    def match(
        self, variables: Sequence[Variable], entries: Mapping[str, Entry]
    ) -> dict[str, Entry]:
        """The entry of each variable, all names, shapes and types checked.

        Args:
            variables: those that need a value.
            entries: variable's name to entry where the graph's saver says so; any other variable is
                looked up by its own name.

        Raises:
            ValueError: lists all that is missing or different.
        """
        matched, missing, different = {}, [], []
        for variable in variables:
            entry = entries.get(variable.name, Entry(variable.name))
            if entry.key not in self._shapes:
                missing.append(variable.name)
                continue
            matched[variable.name] = entry
            found = (entry.shape(self._shapes[entry.key]), self._dtypes[entry.key])
            wanted = (found[0] if variable.shape is None else variable.shape, variable.dtype)
            if found != wanted:
                different.append(
                    f"{variable.name} (graph {wanted[0]} {wanted[1].name}, "
                    f"checkpoint {found[0]} {found[1].name})"
                )
        if missing or different:
            raise ValueError(
                f"checkpoint {self.prefix!r} does not fit the graph: {len(missing)} of "
                f"{len(variables)} variables missing ({', '.join(missing) or 'none'}), "
                f"{len(different)} different ({', '.join(different) or 'none'}); "
                f"it holds {', '.join(sorted(self._shapes)[:8])}{' ...' * (len(self._shapes) > 8)}"
            )
        return matched

    def read(self, entry: Entry) -> tf.Tensor:
        """The value of one entry.

        Raises:
            ValueError: if the data are damaged.
        """
        try:
            return tf.raw_ops.RestoreV2(
                prefix=self.prefix,
                tensor_names=[entry.key],
                shape_and_slices=[entry.slice],
                dtypes=[self._dtypes[entry.key]],
            )[0]
        except tf.errors.OpError as error:
            raise ValueError(
                f"checkpoint {self.prefix!r} is damaged at {entry.key!r}: {error.message}"
            ) from error


def write(prefix: str | Path, values: Mapping[str, np.ndarray | tf.Tensor]) -> None:
    """Write a V2 checkpoint with these keys."""
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
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
    return (
        prefix.with_name(prefix.name + ".index").is_file()
        or prefix.is_file()
        or any(prefix.parent.glob(f"{_glob_escape(prefix.name)}-?????-of-?????"))
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

    def constant(name: str) -> list[str]:
        node = nodes.get(split_tensor_name(name)[0])
        if node is None or node.op != "Const":
            return []
        return [v.decode() for v in tf.make_ndarray(node.attr["value"].tensor).ravel()]

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
        while value[0] in nodes and nodes[value[0]].op in ("Identity", "Reshape"):
            value = split_tensor_name(nodes[value[0]].input[0])
        restore = nodes.get(value[0])
        if restore is None or restore.op not in ("RestoreV2", "RestoreSlice", "Restore"):
            continue
        keys = constant(restore.input[1])
        slices = constant(restore.input[2]) if restore.op != "Restore" else [""]
        if value[1] < min(len(keys), len(slices)):
            entries[variable] = Entry(keys[value[1]], slices[value[1]])
    return entries


def _check_files(prefix: Path) -> None:
    if prefix.with_name(prefix.name + ".index").is_file():
        shards = [
            _SHARD.search(path.name)
            for path in prefix.parent.glob(f"{_glob_escape(prefix.name)}.data-?????-of-?????")
        ]
        found = {(int(match[1]), int(match[2])) for match in shards if match}
        count = max((total for _, total in found), default=1)
        missing = [
            f"{prefix.name}.data-{shard:05d}-of-{count:05d}"
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
            f"a V1 checkpoint named {prefix.name}"
        )


def _to_open(prefix: Path) -> str:
    """What TensorFlow opens: the prefix, or a pattern for the files of a sharded V1 checkpoint."""
    is_v2 = prefix.with_name(prefix.name + ".index").is_file()
    return str(prefix) if is_v2 or prefix.is_file() else f"{prefix}-?????-of-?????"


def _glob_escape(name: str) -> str:
    return glob.escape(name)
