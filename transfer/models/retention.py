"""Checkpoint retention by the rules of ``tf.compat.v1.train.Saver``, with its state in a file.

The state file ``checkpoint`` lists the checkpoints of a folder, when each was saved, and the time
from which the next one to be kept permanently is due. There is no other state, so that a restarted
program continues correctly.
"""

from __future__ import annotations

import glob
import math
import re
import time
from pathlib import Path

import tensorflow as tf
from google.protobuf import text_format

from transfer.models import checkpoint
from transfer.models.card import read_card

tf1 = tf.compat.v1

STATE = "checkpoint"
"""Name of the state file."""

_FILES = re.compile(r"index|meta|data-[0-9]{5}-of-[0-9]{5}")


def check(max_to_keep: int | None, hours: float | None) -> None:
    """Check the retention options.

    Raises:
        ValueError: if a number is negative or NaN.
    """
    if max_to_keep is not None and not max_to_keep >= 0:
        raise ValueError(
            f"max_to_keep is {max_to_keep}; expected how many checkpoints to keep: "
            "give a number, or None or 0 to keep all"
        )
    if hours is not None and not hours >= 0:
        raise ValueError(
            f"keep_checkpoint_every_n_hours is {hours}; expected a number of hours: "
            "give one, or None to keep none of those that are to be deleted"
        )


def plan(
    prefix: Path, saved: str, max_to_keep: int | None, hours: float | None
) -> tuple[str, list[str]]:
    """Compute the new state file and the checkpoints to delete after a save; changes no files.

    Checkpoints of other prefixes in the folder stay listed and are not counted. As with ``Saver``,
    hours count from the first checkpoint on, including pauses; and if all checkpoints are kept,
    only the last one is listed, so that later calls do not delete the others.

    Args:
        prefix: common checkpoint prefix of all steps.
        saved: name of the new checkpoint.
        max_to_keep: number of checkpoints of the prefix to keep; ``None`` or 0 keeps all.
        hours: keep one checkpoint per this many hours permanently.

    Returns:
        The text of the state file; and the names of the checkpoints to delete, all of which are
        listed in the current state file and named ``<prefix>-<digits>``.
    """
    now = time.time()
    listed, preserved = _read(prefix.parent)
    listed.pop(saved, None)
    listed[saved] = now
    preserved = preserved or now
    step = re.compile(rf"{re.escape(prefix.name)}-[0-9]+")
    own = [name for name in listed if name == saved or step.fullmatch(name)]
    unlisted = own[: -(max_to_keep or 1)]
    deleted = []
    for name in unlisted if max_to_keep else ():
        if listed[name] > preserved + (math.inf if hours is None else hours * 3600):
            preserved += (hours or 0) * 3600
        else:
            deleted.append(name)
    names = [
        name
        for name in listed
        if name not in unlisted and (name in own or checkpoint.exists(prefix.with_name(name)))
    ]
    # Given an absolute folder and plain names, TensorFlow keeps the names relative.
    state = tf1.train.generate_checkpoint_state_proto(
        str(prefix.parent.absolute()), saved, names, [listed[name] for name in names], preserved
    )
    return text_format.MessageToString(state), deleted


def delete(prefix: Path) -> None:
    """Delete the files of a checkpoint, its own meta graph, and their card."""
    card = prefix.with_name(f"{prefix.name}.json")
    for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.*")):
        if _FILES.fullmatch(path.name[len(prefix.name) + 1 :]) or (
            path == card and _is_card_of(path, prefix.name)
        ):
            path.unlink()


def _is_card_of(path: Path, name: str) -> bool:
    try:
        return f"{name}.index" in read_card(path).sha256
    except ValueError:  # an unrelated file
        return False


def _read(folder: Path) -> tuple[dict[str, float], float]:
    """The checkpoints listed in the state file of a folder, oldest first, with their times; and the
    time of the last checkpoint kept permanently, 0 if unknown."""
    try:
        state = tf.train.get_checkpoint_state(str(folder))
    except ValueError:  # lists no checkpoint
        state = None
    if state is None:
        return {}, 0.0
    paths = [Path(path) for path in state.all_model_checkpoint_paths]
    times = list(state.all_model_checkpoint_timestamps)
    if len(times) != len(paths):  # TensorFlow's Saver writes no times
        times = [_time_of(path) for path in paths]
    here = folder.resolve()
    listed = {
        path.name: saved
        for path, saved in zip(paths, times, strict=True)
        if path.parent.resolve() == here
    }
    return listed, state.last_preserved_timestamp


def _time_of(path: Path) -> float:
    index = path.with_name(f"{path.name}.index")
    return index.stat().st_mtime if index.is_file() else 0.0
