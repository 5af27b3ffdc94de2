"""Checkpoints of a training run: what it needs to go on, and the best weights so far.

A run that is killed at any moment and resumed ends as if it had not been: everything that its next
step depends on is in a checkpoint. A checkpoint is never written over. The new one is whole before
an old one is deleted, and one that cannot be read gives way to the one before it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.core import files
from transfer.models.checkpoint import PART
from transfer.models.checkpoint_index import read_v2
from transfer.training.trainer import EpochSums, Trainer

_LEFT = re.compile(r"\.writing-(step|best)-\d+(_temp|\.index|\.data-\d{5}-of-\d{5})")
"""Names of what earlier versions left behind when they were killed."""
# What TensorFlow's readers raise for files that are cut short, changed, or of another model.
_UNREADABLE = (tf.errors.OpError, AssertionError, IndexError, RuntimeError, ValueError)


class RunCheckpoint:
    """The checkpoints of a run, or of a stage of one, in a folder.

    They hold weights, the states of optimizers and of random layers, step and epoch, and how much
    of the epoch is done. They are made of TensorFlow's object-based format, by position: the names
    of Keras variables differ between two sessions.

    Args:
        directory: made when there is something to save.
        keep: how many.
        every_s: so many seconds after one, another ``is_due`` within an epoch; ``None`` makes none
            there.
        is_mine: false for a process that reads checkpoints which another one writes, and deletes
            none.

    ``damaged`` says of each checkpoint that ``restore`` passed over why it did.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        every_s: float | None = None,
        is_mine: bool = True,
    ):
        self.directory = directory
        self.damaged: list[str] = []
        self._keep = keep
        self._is_mine = is_mine
        self._every_s = math.inf if every_s is None else every_s
        self._saved_at = time.monotonic()
        self._has_begun = False

    def begin(self) -> None:
        """Make the folder, once. If it is gone later, somebody has removed it."""
        if not self._has_begun:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._has_begun = True

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint; then delete those that are not kept.

        Raises:
            OSError: if it cannot be written: says which one is there to go on from.
        """
        numbers = self._numbers("step")
        self._write(f"step-{max(numbers, default=0) + 1}", _state(trainer))
        self._saved_at = time.monotonic()
        for number in numbers[: len(numbers) + 1 - self._keep]:
            self._delete(f"step-{number}")
        for number in self._numbers("best")[:-1]:
            self._delete(f"best-{number}")

    def save_best(self, trainer: Trainer) -> None:
        """Keep the weights as those of the best epoch so far.

        Those of the best before stay until the next ``save``: the run may be killed until then.

        Raises:
            OSError: see ``save``.
        """
        self._write(f"best-{trainer.epoch}", _weights(trainer))

    def restore(self, trainer: Trainer) -> bool:
        """Bring a trainer to the last checkpoint that can be read; false if there is none.

        Raises:
            ValueError: if there are some and none can be read.
        """
        numbers = self._numbers("step")
        for number in reversed(numbers):
            name = f"step-{number}"
            state = _state(trainer)
            try:
                self._read(name, state)
            except _UNREADABLE as error:
                self.damaged.append(
                    f"checkpoint {str(self.directory / name)!r} cannot be read "
                    f"({_first_line(error)})"
                )
                continue
            _take(trainer, state)
            for later in numbers[numbers.index(number) + 1 :]:
                self._delete(f"step-{later}")
            for epoch in self._numbers("best"):
                if epoch >= trainer.epoch:  # of an epoch that is still to come
                    self._delete(f"best-{epoch}")
            return True
        if numbers:
            raise ValueError(f"no checkpoint is left to go on from: {'; '.join(self.damaged)}")
        for epoch in self._numbers("best"):
            self._delete(f"best-{epoch}")
        return False

    def best_weights(self, trainer: Trainer) -> list[np.ndarray] | None:
        """What ``save_best`` kept, in the order of ``trainer.model.weights``; ``None`` if it did
        not yet.

        Raises:
            ValueError: if it cannot be read.
        """
        numbers = self._numbers("best")
        if not numbers:
            return None
        copies = {
            "weights": [
                tf.Variable(tf.zeros(v.shape, v.dtype)) for v in _weights(trainer)["weights"]
            ]
        }
        try:
            self._read(f"best-{numbers[-1]}", copies)
        except _UNREADABLE as error:
            raise ValueError(
                f"the best weights of the run, {str(self.directory / f'best-{numbers[-1]}')!r}, "
                f"cannot be read ({_first_line(error)}); start the run anew"
            ) from error
        return [variable.numpy() for variable in copies["weights"]]

    def _write(self, name: str, state: dict[str, Any]) -> None:
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"{str(self.directory)!r} was removed while the run went on; its checkpoints are "
                "lost"
            )
        path = self.directory / name
        self._remove_drafts()
        try:
            with files.draft_folder(self.directory) as draft:
                tf.train.Checkpoint(**state).write(str(draft / name))
                # TensorFlow writes the index under its final name, and may be killed at that. Here
                # it is whole, and comes last.
                for part in sorted(draft.iterdir()):
                    os.replace(part, self.directory / part.name)
        except (OSError, tf.errors.OpError) as error:
            left = [f"step-{number}" for number in self._numbers("step")]
            raise OSError(
                f"cannot write checkpoint {str(path)!r} ({_first_line(error)}); "
                + (f"{left[-1]} is whole: " if left else "there is none before it: ")
                + "make room, or mend the folder, and start again with resume=True"
            ) from error

    def _read(self, name: str, state: dict[str, Any]) -> None:
        path = self.directory / name
        read_v2(path.with_name(f"{name}.index"))  # TensorFlow ends the process at some damages
        tf.train.Checkpoint(**state).read(str(path)).assert_consumed()

    def _numbers(self, kind: str) -> list[int]:
        """Of the checkpoints whose index is there: it is written last."""
        found = (re.fullmatch(rf"{kind}-(\d+)\.index", p.name) for p in self.directory.glob("*"))
        return sorted(int(match[1]) for match in found if match)

    def _delete(self, name: str) -> None:
        if not self._is_mine:
            return
        # The index first: what has none is no checkpoint.
        for path in sorted(self.directory.glob(f"{name}.*"), reverse=True):
            if PART.search(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _remove_drafts(self) -> None:
        """Of sessions that were killed."""
        if not self._is_mine:
            return
        files.remove_drafts(self.directory)
        for path in self.directory.glob(".writing-*"):
            if _LEFT.fullmatch(path.name):
                if path.is_dir():
                    files.remove_folder(path, files.CHECKPOINT_FILES)
                elif files.is_regular(path):
                    path.unlink(missing_ok=True)


def _state(trainer: Trainer) -> dict[str, Any]:
    variables = [*trainer.model.variables, *trainer.random_states]
    for group in trainer.groups:
        variables += group.optimizer.variables
    sums = trainer.sums
    counts = [trainer.epoch, trainer.step, sums.num_batches, sums.num_examples, sums.num_right]
    return {
        "variables": [variable.value for variable in variables],
        "counts": tf.Variable(counts, dtype=tf.int64),
        "losses": tf.Variable([sums.loss, trainer.best_loss], dtype=tf.float64),
        "stopped": tf.Variable(trainer.model.stop_training),
    }


def _take(trainer: Trainer, state: dict[str, Any]) -> None:
    """What is no variable of the model or an optimizer."""
    counts = [int(count) for count in state["counts"].numpy()]
    loss, trainer.best_loss = (float(value) for value in state["losses"].numpy())
    trainer.epoch, trainer.step, num_batches, num_examples, num_right = counts
    trainer.sums = EpochSums(num_batches, num_examples, num_right, loss)
    trainer.model.stop_training = bool(state["stopped"].numpy())


def _weights(trainer: Trainer) -> dict[str, Any]:
    return {"weights": [variable.value for variable in trainer.model.weights]}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
