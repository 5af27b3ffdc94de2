"""Meta graphs to disk, as ``tf.compat.v1.train.Saver`` writes them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow as tf

from transfer import checkpoint
from transfer.card import Card, write_card

tf1 = tf.compat.v1


def save_meta_graph(
    graph: tf.Graph,
    prefix: str | Path,
    values: Mapping[str, np.ndarray | tf.Tensor],
    card: Card | None = None,
) -> None:
    """Write a graph and the values of its variables as meta graph, V2 checkpoint and card.

    ``tf.compat.v1.train.import_meta_graph`` and ``Saver.restore`` open them, and so does
    ``load_meta_graph``. The files are complete before any of them gets its name.

    Args:
        graph: with variables in its collections, made by ``tf.compat.v1``; a saver is added to it.
        prefix: path without ``.meta``; its folder is made if need be.
        values: variable's name (``fc7/weights``) to value, for every variable of the graph.
        card: written beside it, with the hashes of the files.

    Raises:
        ValueError: if a variable has no value, or one of another shape.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with graph.as_default():
        variables = tf1.global_variables()
        _check_values(variables, values)
        saver = tf1.train.Saver(variables, write_version=tf1.train.SaverDef.V2)
        meta = tf1.train.export_meta_graph(graph=graph, saver_def=saver.as_saver_def())
    tensors = {
        v.op.name: tf.convert_to_tensor(values[v.op.name], v.dtype.base_dtype) for v in variables
    }
    with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".saving-") as temporary:
        draft = Path(temporary, prefix.name)
        checkpoint.write(draft, tensors)
        draft.with_name(prefix.name + ".meta").write_bytes(meta.SerializeToString())
        names = sorted(path.name for path in Path(temporary).iterdir())
        if card is not None:
            hashes = {name: _sha256(Path(temporary, name)) for name in names}
            names.append(f"{prefix.name}.json")
            write_card(Path(temporary, names[-1]), replace(card, sha256=hashes))
        for name in names:
            os.replace(Path(temporary, name), prefix.parent / name)
    name = json.dumps(prefix.name)
    state = f"model_checkpoint_path: {name}\nall_model_checkpoint_paths: {name}\n"
    (prefix.parent / "checkpoint").write_text(state)


def _check_values(variables: list, values: Mapping[str, np.ndarray | tf.Tensor]) -> None:
    missing = [v.op.name for v in variables if v.op.name not in values]
    different = [
        f"{v.op.name} (graph {tuple(v.shape)}, value {tuple(values[v.op.name].shape)})"
        for v in variables
        if v.op.name in values and tuple(v.shape) != tuple(values[v.op.name].shape)
    ]
    if missing or different:
        raise ValueError(
            f"cannot save: no value for {', '.join(missing) or 'none'}; "
            f"another shape for {', '.join(different) or 'none'}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
