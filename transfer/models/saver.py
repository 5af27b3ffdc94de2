"""Save graphs and the values of their variables, like ``tf.compat.v1.train.Saver``.

``<prefix>.meta`` contains the graph, ``<prefix>-<step>.index`` and ``.data-...`` the values, and
the state file ``checkpoint`` lists the checkpoints; ``transfer.models.retention`` decides which are
kept.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import tensorflow as tf

from transfer.core.files import draft_folder
from transfer.core.private_api import eager_mode
from transfer.models import checkpoint, retention
from transfer.models.card import Card, write_card
from transfer.models.checkpoint import Entry

tf1 = tf.compat.v1

_BIG = 2**20
"""Arrays of at least this many bytes are saved without copying them."""


def save_meta_graph(
    graph: tf.Graph,
    prefix: str | Path,
    values: Mapping[str, np.ndarray | tf.Tensor | float],
    card: Card | None = None,
    *,
    step: SupportsIndex | None = None,
    variables: Iterable[str] | None = None,
    write_meta_graph: bool | None = None,
    max_to_keep: int | None = None,
    keep_checkpoint_every_n_hours: float | None = None,
) -> Path:
    """Write a graph and the values of its variables as meta graph, V2 checkpoint and card.

    ``tf.compat.v1.train.import_meta_graph`` and ``Saver.restore`` open them, and so does
    ``load_meta_graph``. Writing is atomic: all files are complete before they get their names. The
    graph is not modified and may be finalized.

    Args:
        graph: a graph with variables in its collections, created by ``tf.compat.v1``.
        prefix: path without ``.meta``; its folder is created if necessary.
        values: variable name (``fc7/weights``) to value, for every saved variable.
        card: written beside the meta graph, with the hashes of the files.
        step: saves the values to ``<prefix>-<step>``.
        variables: names of the variables to save; defaults to all global variables of the graph.
            The saver in the meta graph restores the same variables.
        write_meta_graph: by default, all steps share one ``<prefix>.meta``, which is written unless
            it already contains this graph. ``True`` writes ``<prefix>-<step>.meta`` for each step,
            deleted together with its checkpoint, as ``Saver`` does. ``False`` writes neither a meta
            graph nor a card, which saves time with large graphs.
        max_to_keep: number of checkpoints of this prefix to keep; older ones are deleted. Only
            checkpoints listed in the state file and named ``<prefix>-<step>`` are ever deleted.
            ``None`` or 0 keeps all.
        keep_checkpoint_every_n_hours: of the checkpoints to be deleted, keep one per this many
            hours.

    Returns:
        The prefix of the checkpoint: ``prefix``, or ``<prefix>-<step>``.

    Raises:
        TypeError: if ``step`` is not an integer, or ``variables`` is a string.
        ValueError: if a variable has no value, or one of another shape; if ``variables`` contains
            an unknown name, or there is no variable to save; or if a number is negative.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from transfer import save_meta_graph
        >>> with tf.Graph().as_default() as graph:
        ...     _ = tf.compat.v1.get_variable("weights", [4, 2])
        >>> for step in range(0, 10_000, 1000):  # after each thousand steps of a training loop
        ...     values = {"weights": np.full((4, 2), step, np.float32)}
        ...     prefix = save_meta_graph(graph, "run/model", values, step=step, max_to_keep=4)
        >>> prefix.name
        'model-9000'
    """
    prefix = Path(prefix)
    checkpoint.check_path(prefix)
    if prefix.name == retention.STATE:
        raise ValueError(
            f"cannot save to {str(prefix)!r}: {retention.STATE} is the file that lists the "
            "checkpoints of a folder; give the prefix another name"
        )
    retention.check(max_to_keep, keep_checkpoint_every_n_hours)
    saved = prefix if step is None else prefix.with_name(f"{prefix.name}-{_integer(step)}")
    chosen = _choose(graph, variables)
    _check_values(chosen, values)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(prefix.parent) as draft:
        _write_values(draft / saved.name, chosen, values)
        if write_meta_graph is not False:
            model = saved.name if write_meta_graph else prefix.name
            (draft / f"{model}.meta").write_bytes(
                _with_saver(graph, chosen, max_to_keep, keep_checkpoint_every_n_hours)
            )
            if card is not None:
                hashes = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
                write_card(draft / f"{model}.json", replace(card, sha256=hashes))
        for path in sorted(draft.iterdir()):
            if path.suffix != ".meta" or not _same(path, prefix.with_name(path.name)):
                os.replace(path, prefix.with_name(path.name))
        state, deleted = retention.plan(
            prefix, saved.name, max_to_keep, keep_checkpoint_every_n_hours
        )
        (draft / retention.STATE).write_text(state, encoding="utf-8")
        os.replace(draft / retention.STATE, prefix.with_name(retention.STATE))
    for name in deleted:
        retention.delete(prefix.with_name(name))
    return saved


def _integer(step: SupportsIndex) -> int:
    try:
        number = operator.index(step)
    except TypeError as error:
        raise TypeError(
            f"step is {step!r}; expected an integer: of a tensor, give the value that "
            "Session.run returns"
        ) from error
    if number < 0:
        raise ValueError(f"step is {number}; expected an integer of at least 0: count from there")
    return number


def _choose(graph: tf.Graph, names: Iterable[str] | None) -> list[tf.Variable]:
    if isinstance(names, str):
        raise TypeError(
            f"variables is the string {names!r}; expected several names: write [{names!r}]"
        )
    known = {v.op.name: v for v in graph.get_collection(tf1.GraphKeys.GLOBAL_VARIABLES)}
    names_to_save = list(known if names is None else dict.fromkeys(names))
    unknown = [name for name in names_to_save if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=8, cutoff=0.3) or list(known)
        shown = list(known) if len(known) <= 8 else [*near[:8], f"... ({len(known)} in all)"]
        raise ValueError(
            f"cannot save {', '.join(unknown)}: the graph's variables are "
            f"{', '.join(shown) or 'none'}; name some of these"
        )
    if not names_to_save:
        raise ValueError(
            f"cannot save: of {len(known)} variables in the graph none is to be saved, and a "
            "checkpoint has at least one; name some, or make one (tf.compat.v1.get_variable)"
        )
    return [known[name] for name in names_to_save]


def _check_values(
    variables: Sequence[tf.Variable], values: Mapping[str, np.ndarray | tf.Tensor | float]
) -> None:
    missing = [v.op.name for v in variables if v.op.name not in values]
    different = [
        f"{v.op.name} (graph {_shown(v.shape)}, value {tuple(np.shape(values[v.op.name]))})"
        for v in variables
        if v.op.name in values and not v.shape.is_compatible_with(np.shape(values[v.op.name]))
    ]
    if missing or different:
        raise ValueError(
            f"cannot save: no value for {', '.join(missing) or 'none'}; "
            f"another shape for {', '.join(different) or 'none'}; give every variable that is "
            "saved a value of its own shape, or name those to save"
        )


def _shown(shape: tf.TensorShape) -> str:
    return str(tuple(shape)) if shape.rank is not None else "of any shape"


def _with_saver(
    graph: tf.Graph,
    variables: Sequence[tf.Variable],
    max_to_keep: int | None,
    hours: float | None,
) -> bytes:
    """Serialize a graph as a meta graph with a saver for ``variables``, deterministically.

    The saver's operations are added to a copy, so that repeated saving does not grow the graph.
    """
    with graph.as_default():
        meta = tf1.train.export_meta_graph()
    options = {} if hours is None else {"keep_checkpoint_every_n_hours": hours}
    with tf.Graph().as_default() as copy:
        tf1.train.import_meta_graph(meta)
        copies = {v.op.name: v for v in tf1.global_variables()}
        saver = tf1.train.Saver(
            [copies[v.op.name] for v in variables],
            max_to_keep=max_to_keep,
            write_version=tf1.train.SaverDef.V2,
            save_relative_paths=True,
            **options,
        )
        meta = tf1.train.export_meta_graph(graph=copy, saver_def=saver.as_saver_def())
    return meta.SerializeToString(deterministic=True)


def _write_values(
    prefix: Path,
    variables: Sequence[tf.Variable],
    values: Mapping[str, np.ndarray | tf.Tensor | float],
) -> None:
    """Write a V2 checkpoint; also works while a graph is built or with eager execution disabled.

    Eager execution is used because a session would copy the fed values.
    """
    entries = [_entry(v) for v in variables]
    with eager_mode():
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=[entry.key for entry in entries],
            shape_and_slices=[entry.slice for entry in entries],
            tensors=[_to_tensor(values[v.op.name], v.dtype.base_dtype) for v in variables],
        )


def _entry(variable: tf.Variable) -> Entry:
    """The entry of a variable in a saver: its name, or a slice of a partitioned variable."""
    with variable.graph.as_default():  # a resource variable needs a graph for to_proto
        info = variable.to_proto().save_slice_info_def
    if not info.full_name:
        return Entry(variable.op.name)
    return Entry(info.full_name, tf1.Variable.SaveSliceInfo(save_slice_info_def=info).spec)


def _to_tensor(value: np.ndarray | tf.Tensor | float, dtype: tf.DType) -> tf.Tensor:
    """Convert a value to a tensor; a large array and its tensor share memory.

    ``tf.convert_to_tensor`` copies an array, and needs twice its memory to do so.
    """
    if isinstance(value, np.ndarray) and value.nbytes >= _BIG and dtype != tf.string:
        value = value.astype(dtype.as_numpy_dtype, "C", "same_kind", copy=False)
        with contextlib.suppress(BufferError):  # a TensorFlow-specific dtype, or read-only
            return tf.experimental.dlpack.from_dlpack(value.__dlpack__())
    return tf.convert_to_tensor(value, dtype)


def _same(draft: Path, path: Path) -> bool:
    return path.is_file() and path.read_bytes() == draft.read_bytes()


def file_sha256(*paths: Path) -> str:
    """Hexadecimal SHA-256 of the concatenated contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
