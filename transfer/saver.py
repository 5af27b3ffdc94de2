"""Meta graphs to disk, with what ``tf.compat.v1.train.Saver`` does: steps, and which are kept.

``<prefix>.meta`` holds the graph, ``<prefix>-<step>.index`` and ``.data-...`` the values, and the
state file ``checkpoint`` which of them are there. All that is remembered from one call to the next
is in that file, so that a program that is started again goes on.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.python.training.checkpoint_state_pb2 import CheckpointState

from transfer import checkpoint
from transfer.card import Card, write_card

tf1 = tf.compat.v1

STATE = "checkpoint"


def save_meta_graph(
    graph: tf.Graph,
    prefix: str | Path,
    values: Mapping[str, np.ndarray | tf.Tensor | float],
    card: Card | None = None,
    *,
    step: int | None = None,
    variables: Iterable[str] | None = None,
    write_meta_graph: bool | None = None,
    max_to_keep: int | None = None,
    keep_checkpoint_every_n_hours: float | None = None,
) -> Path:
    """Write a graph and the values of its variables as meta graph, V2 checkpoint and card.

    ``tf.compat.v1.train.import_meta_graph`` and ``Saver.restore`` open them, and so does
    ``load_meta_graph``. The files are complete before any of them gets its name. The graph itself
    is left as it is; it may be finalized.

    Args:
        graph: with variables in its collections, made by ``tf.compat.v1``.
        prefix: path without ``.meta``; its folder is made if need be.
        values: variable's name (``fc7/weights``) to value, for every variable that is saved.
        card: written beside it, with the hashes of the files.
        step: saves to ``<prefix>-<step>``. The graph is in ``<prefix>.meta`` for all steps.
        variables: names of those to save; by default all global variables of the graph.
        write_meta_graph: by default the graph is written where there is no ``<prefix>.meta`` yet,
            and always without a step.
        max_to_keep: how many checkpoints of this prefix to keep; older ones are deleted, and those
            that the state file does not list are never touched. ``None`` or 0 deletes none.
        keep_checkpoint_every_n_hours: of those to be deleted, keep one for so many hours.

    Returns:
        The prefix of the checkpoint: ``prefix``, or ``<prefix>-<step>``.

    Raises:
        ValueError: if a variable has no value, or one of another shape; or if there is no variable
            of a name in ``variables``.
    """
    prefix = Path(prefix)
    checkpoint.check_path(prefix)
    chosen = _choose(graph, variables)
    _check_values(chosen, values)
    if write_meta_graph is None:
        write_meta_graph = step is None or not _meta_path(prefix).is_file()
    saved = prefix if step is None else prefix.with_name(f"{prefix.name}-{step}")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".saving-") as temporary:
        draft = Path(temporary)
        checkpoint.write(
            draft / saved.name,
            {v.op.name: (values[v.op.name], v.dtype.base_dtype) for v in chosen},
        )
        if write_meta_graph:
            meta = _with_saver(graph, [v.op.name for v in chosen], max_to_keep)
            _meta_path(draft / prefix.name).write_bytes(meta.SerializeToString())
        names = sorted(path.name for path in draft.iterdir())
        if card is not None:
            hashes = {name: _sha256(draft / name) for name in names}
            names.append(f"{prefix.name}.json")
            write_card(draft / names[-1], replace(card, sha256=hashes))
        for name in names:
            os.replace(draft / name, prefix.parent / name)
    _keep(prefix, saved.name, max_to_keep, keep_checkpoint_every_n_hours)
    return saved


def _choose(graph: tf.Graph, names: Iterable[str] | None) -> list[tf.Variable]:
    known = {v.op.name: v for v in graph.get_collection(tf1.GraphKeys.GLOBAL_VARIABLES)}
    if names is None:
        return list(known.values())
    wanted = list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"cannot save {', '.join(unknown)}: the graph's variables are {', '.join(known)}"
        )
    return [known[name] for name in wanted]


def _with_saver(graph: tf.Graph, names: Iterable[str], max_to_keep: int | None) -> MetaGraphDef:
    """A graph as a meta graph with a saver for some variables. The saver's operations are added to
    a copy: in a loop that saves, the graph must not grow."""
    with graph.as_default():
        meta = tf1.train.export_meta_graph()
    with tf.Graph().as_default() as copy:
        tf1.train.import_meta_graph(meta)
        copies = {v.op.name: v for v in tf1.global_variables()}
        saver = tf1.train.Saver(
            [copies[name] for name in names],
            max_to_keep=max_to_keep,
            write_version=tf1.train.SaverDef.V2,
            save_relative_paths=True,
        )
        return tf1.train.export_meta_graph(graph=copy, saver_def=saver.as_saver_def())


def _keep(prefix: Path, name: str, max_to_keep: int | None, hours: float | None) -> None:
    """Write the state file, and delete what is not to be kept; the rule is that of TensorFlow's
    ``Saver``, whose clock starts with the first checkpoint."""
    now = time.time()
    known, preserved = _read_state(prefix)
    known = {n: t for n, t in known.items() if n != name} | {name: now}
    preserved = preserved or now
    deleted = []
    names = list(known)
    while max_to_keep and len(names) > max_to_keep:
        oldest = names.pop(0)
        if known[oldest] > preserved + (math.inf if hours is None else hours * 3600):
            preserved += (hours or 0) * 3600
        else:
            deleted.append(oldest)
    if not max_to_keep:
        names = [name]  # as TensorFlow does: nothing is deleted, and only the last is listed
    state = CheckpointState(
        model_checkpoint_path=name,
        all_model_checkpoint_paths=names,
        all_model_checkpoint_timestamps=[known[n] for n in names],
        last_preserved_timestamp=preserved,
    )
    path = prefix.with_name(STATE)
    draft = path.with_name(f".{STATE}.tmp")
    draft.write_text(text_format.MessageToString(state))
    os.replace(draft, path)
    for old in deleted:
        for path in prefix.parent.glob(f"{glob.escape(old)}.*"):
            if re.fullmatch(r"index|meta|data-\d{5}-of-\d{5}", path.name[len(old) + 1 :]):
                path.unlink()


def _read_state(prefix: Path) -> tuple[dict[str, float], float]:
    """The checkpoints of a prefix that the state file lists, oldest first, with their times; and
    the time from which on the next one to be kept for ever is looked for."""
    path = prefix.with_name(STATE)
    try:
        state = text_format.Parse(path.read_bytes(), CheckpointState())
    except (OSError, text_format.ParseError):
        return {}, 0.0
    names = list(state.all_model_checkpoint_paths)
    times = [*state.all_model_checkpoint_timestamps, *[0.0] * len(names)]
    steps = re.compile(rf"{re.escape(prefix.name)}-\d+")
    mine = {n: t for n, t in zip(names, times, strict=False) if steps.fullmatch(n)}
    return mine, state.last_preserved_timestamp


def _check_values(
    variables: list[tf.Variable], values: Mapping[str, np.ndarray | tf.Tensor | float]
) -> None:
    missing = [v.op.name for v in variables if v.op.name not in values]
    different = [
        f"{v.op.name} (graph {tuple(v.shape)}, value {tuple(np.shape(values[v.op.name]))})"
        for v in variables
        if v.op.name in values and tuple(v.shape) != tuple(np.shape(values[v.op.name]))
    ]
    if missing or different:
        raise ValueError(
            f"cannot save: no value for {', '.join(missing) or 'none'}; "
            f"another shape for {', '.join(different) or 'none'}; give every variable that is "
            "saved a value of its own shape, or name those to save"
        )


def _meta_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".meta")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
