"""Which checkpoints are kept: the rule of ``tf.compat.v1.train.Saver``, remembered in a file.

The state file ``checkpoint`` lists the checkpoints of a folder, when each was saved, and since when
one is due that is to be kept for ever. Nothing is remembered elsewhere, so that a program that is
started again goes on.
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
    """Check what is said about which checkpoints to keep.

    Raises:
        ValueError: if a number is negative, or none.
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
    """What follows from a checkpoint that has just been saved. Changes nothing.

    Checkpoints of other prefixes in the folder stay listed and are not counted. As with ``Saver``,
    hours count from the first checkpoint on, a pause included; and where all are kept, only the
    last is listed, so that the others are safe from later calls.

    Args:
        prefix: what the names of all steps begin with.
        saved: name of the new checkpoint.
        max_to_keep: how many checkpoints of the prefix to keep; ``None`` or 0 keeps all.
        hours: keep one for ever for so many hours.

    Returns:
        The text of the state file; and the names of the checkpoints to delete, all of them listed
        in the state file that is there, and named ``<prefix>-<digits>``.
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
    # With names only and an absolute folder, TensorFlow leaves the names as they are: relative.
    state = tf1.train.generate_checkpoint_state_proto(
        str(prefix.parent.absolute()), saved, names, [listed[name] for name in names], preserved
    )
    return text_format.MessageToString(state), deleted


def delete(prefix: Path) -> None:
    """Delete the files of a checkpoint, its own meta graph, and the card of these."""
    card = prefix.with_name(f"{prefix.name}.json")
    for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.*")):
        if _FILES.fullmatch(path.name[len(prefix.name) + 1 :]) or (
            path == card and _is_card_of(path, prefix.name)
        ):
            path.unlink()


def _is_card_of(path: Path, name: str) -> bool:
    try:
        return f"{name}.index" in read_card(path).sha256
    except ValueError:  # somebody's own file
        return False


def _read(folder: Path) -> tuple[dict[str, float], float]:
    """The checkpoints of a folder that its state file lists, oldest first, with their times; and
    the time from which on the next one to be kept for ever is looked for, 0 if not known."""
    try:
        state = tf.train.get_checkpoint_state(str(folder))
    except ValueError:  # names no checkpoint
        state = None
    if state is None:
        return {}, 0.0
    paths = [Path(path) for path in state.all_model_checkpoint_paths]
    times = list(state.all_model_checkpoint_timestamps)
    if len(times) != len(paths):  # TensorFlow's Saver writes none
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
