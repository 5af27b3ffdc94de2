"""Checkpoints of a training run: its full state for resuming, and the best weights so far.

A run that is killed at any time and resumed gives the same result as an uninterrupted one: a
checkpoint holds everything that the next step depends on. A checkpoint is never overwritten. Old
ones are deleted only after new ones are complete and on the disk, and if one cannot be read, the
previous one is used.

Checkpoints are written in the background, from copies of the variables as of the step at which they
were saved: that of a full VGG16 takes 2.2 GB. One is written at a time, so that memory holds one
copy.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.core import files
from transfer.models.checkpoint import PART
from transfer.models.checkpoint_index import read_v2
from transfer.training.trainer import EpochSums, Trainer

_SYNC_S = 1.0
"""Seconds between two times at which files are synced, and then old ones deleted: syncing takes as
long as writing."""
_MARK = "mark.index"
"""A file in the temporary folder of a checkpoint, which shows that it is still the same folder. If
it is left over, it is deleted with the files of checkpoints, as it is named like one."""
_LEFT = re.compile(r"\.writing-(step|best)-\d+(_temp|\.index|\.data-\d{5}-of-\d{5})")
"""Temporary files that earlier versions left behind when they were killed."""
# Raised by TensorFlow's readers for files that are truncated, changed, or of another model.
_UNREADABLE = (tf.errors.OpError, AssertionError, IndexError, RuntimeError, ValueError)


class RunCheckpoint:
    """The checkpoints of a run, or of one of its stages, in a folder.

    They hold weights, the states of optimizers, of random layers and of loss scaling, step and
    epoch, and the progress within the epoch. They use TensorFlow's object-based format with
    variables by position, because the names of Keras variables differ between sessions.

    Args:
        directory: folder of the checkpoints, created when needed.
        keep: number of checkpoints to keep.
        every_s: seconds between checkpoints within an epoch, see ``save_if_due``; ``None`` writes
            none within an epoch.
        is_mine: whether this process writes and deletes checkpoints; if false, it only reads those
            of another process.

    ``damaged`` has one message per checkpoint that ``restore`` skipped, with the reason.

    One checkpoint is written at a time, by a thread of this object. Python ends only when it is
    complete.
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
        self._synced_at = -math.inf
        self._is_unsynced = False
        self._has_begun = False
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._copies: dict[str, dict[str, Any]] = {}
        self._best: tuple[str, dict[str, Any]] | None = None

    def begin(self) -> None:
        """Create the folder, once: if it is missing later, it was removed from outside."""
        if not self._has_begun:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._has_begun = True

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint, then delete old ones, in the background.

        If the previous checkpoint is not complete, waits for it first.

        Raises:
            OSError: if the previous checkpoint could not be written; names the last complete one.
        """
        self.wait()
        number = max(self._numbers("step"), default=0) + 1
        best, self._best = self._best, None
        last = f"step-{number}", self._copied("step", _state(trainer))
        self._pending = self._writer.submit(self._write_all, best, last)
        self._saved_at = time.monotonic()

    def save_if_due(self, trainer: Trainer) -> None:
        """Save if ``every_s`` seconds have passed since the last time and that checkpoint is
        complete; does not wait for it.

        Raises:
            OSError: if it could not be written, see ``save``.
        """
        if self._pending is not None:
            if not self._pending.done():
                return
            self.wait()
        if time.monotonic() - self._saved_at >= self._every_s:
            self.save(trainer)

    def save_best(self, trainer: Trainer) -> None:
        """Keep the weights as those of the best epoch so far; the next ``save`` writes them.

        The previous best weights are deleted after it, as the run may be killed before.

        Raises:
            OSError: see ``save``.
        """
        self.wait()
        self._best = f"best-{trainer.epoch}", self._copied("best", _weights(trainer))

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            OSError: if it could not be written, see ``save``.
        """
        if self._pending is None:
            return
        wait([self._pending])  # stays pending if this is interrupted
        pending, self._pending = self._pending, None
        pending.result()

    def end(self) -> None:
        """Wait until the last checkpoint is complete, and free the memory of the copies.

        Raises:
            OSError: see ``wait``.
        """
        self.wait()
        if self._is_unsynced:
            self._delete_old()
        self._copies.clear()

    def restore(self, trainer: Trainer) -> bool:
        """Restore a trainer from the last readable checkpoint; false if there are no checkpoints.

        Raises:
            ValueError: if there are checkpoints, but all are unreadable.
        """
        self.wait()
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
                if epoch >= trainer.epoch:  # of an epoch that will be repeated
                    self._delete(f"best-{epoch}")
            return True
        if numbers:
            raise ValueError(f"no readable checkpoint is left: {'; '.join(self.damaged)}")
        for epoch in self._numbers("best"):
            self._delete(f"best-{epoch}")
        return False

    def best_weights(self, trainer: Trainer) -> list[np.ndarray] | None:
        """The weights saved by ``save_best``, in the order of ``trainer.model.weights``; ``None``
        if there are none yet.

        Raises:
            ValueError: if they cannot be read.
        """
        self.wait()
        numbers = self._numbers("best")
        if not numbers:
            return None
        copies = _zeros(_weights(trainer))
        try:
            self._read(f"best-{numbers[-1]}", copies)
        except _UNREADABLE as error:
            raise ValueError(
                f"the best weights of the run, {str(self.directory / f'best-{numbers[-1]}')!r}, "
                f"cannot be read ({_first_line(error)}); start a new run"
            ) from error
        return [variable.numpy() for variable in copies["weights"]]

    def _copied(self, kind: str, state: dict[str, Any]) -> dict[str, Any]:
        """The state with copies of the variables, in the memory of the host.

        Their memory is used again for the next checkpoint: it takes the system several times as
        long to allocate it as it takes to copy the values.
        """
        if kind not in self._copies:
            self._copies[kind] = _zeros(state)
        copies = self._copies[kind]
        tf.nest.map_structure(lambda copy, variable: copy[...].assign(variable), copies, state)
        return copies

    def _write_all(
        self, best: tuple[str, dict[str, Any]] | None, last: tuple[str, dict[str, Any]]
    ) -> None:
        """Write the best weights, if there are new ones, and a checkpoint; then delete old ones, if
        that has not just been done."""
        self._is_unsynced = False  # an error keeps the best weights that the last checkpoint needs
        if best is not None:
            self._write(*best)
        self._write(*last)
        self._is_unsynced = True
        if time.monotonic() - self._synced_at >= _SYNC_S:
            self._delete_old()

    def _delete_old(self) -> None:
        """Delete old checkpoints, after the others are on the disk: after a loss of power, files
        that were written last may be empty."""
        steps = [f"step-{number}" for number in self._numbers("step")]
        if not steps:  # the folder was removed
            return
        bests = [f"best-{number}" for number in self._numbers("best")]
        with self._explained(steps[-1]):
            for name in (*steps[-self._keep :], *bests[-1:]):
                for path in self.directory.glob(f"{name}.*"):
                    files.sync(path)
            files.sync(self.directory)
        for name in (*steps[: -self._keep], *bests[:-1]):
            self._delete(name)
        self._synced_at, self._is_unsynced = time.monotonic(), False

    def _write(self, name: str, state: dict[str, Any]) -> None:
        with self._explained(name):
            self._remove_drafts()
            with files.draft_folder(self.directory) as draft:
                mark = draft / _MARK
                mark.touch()
                tf.train.Checkpoint(**state).write(str(draft / name))
                mark.unlink()  # fails if the folder was removed and TensorFlow created it again
                # TensorFlow does not write the index atomically. Here it is complete, and moved
                # last.
                for part in sorted(draft.iterdir()):
                    os.replace(part, self.directory / part.name)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Explain errors of writing checkpoint ``name``, and what is left."""
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            steps = [f"step-{number}" for number in self._numbers("step")]
            complete = [step for step in steps if step != name]
            is_missing = isinstance(error, (FileNotFoundError, tf.errors.NotFoundError))
            if not self.directory.is_dir() or (is_missing and not complete):
                raise FileNotFoundError(
                    f"{str(self.directory)!r} was removed while the run went on; its checkpoints "
                    "are lost"
                ) from error
            raise OSError(
                f"cannot write checkpoint {str(self.directory / name)!r} ({_first_line(error)}); "
                + (f"{complete[-1]} is complete: " if complete else "there is no earlier one: ")
                + "free disk space or repair the folder, and continue with resume=True"
            ) from error

    def _read(self, name: str, state: dict[str, Any]) -> None:
        path = self.directory / name
        read_v2(path.with_name(f"{name}.index"))  # TensorFlow aborts on some damaged files
        tf.train.Checkpoint(**state).read(str(path)).assert_consumed()

    def _numbers(self, kind: str) -> list[int]:
        """Numbers of the complete checkpoints: those with an index, which is written last."""
        matches = (re.fullmatch(rf"{kind}-(\d+)\.index", p.name) for p in self.directory.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    def _delete(self, name: str) -> None:
        if not self._is_mine:
            return
        # The index first: without it, the rest does not count as a checkpoint.
        for path in sorted(self.directory.glob(f"{name}.*"), reverse=True):
            if PART.search(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _remove_drafts(self) -> None:
        """Remove temporary files of sessions that were killed."""
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
    if trainer.loss_scale is not None:
        variables += trainer.loss_scale.variables
    sums = trainer.sums
    counts = [trainer.epoch, trainer.step, sums.num_batches, sums.num_examples, sums.num_right]
    return {
        "variables": [variable.value for variable in variables],
        "counts": tf.Variable(counts, dtype=tf.int64),
        "losses": tf.Variable([sums.loss, trainer.best_loss], dtype=tf.float64),
        "stopped": tf.Variable(trainer.model.stop_training),
    }


def _take(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore the part of the state that is not in variables of the model or an optimizer."""
    counts = [int(count) for count in state["counts"].numpy()]
    loss, trainer.best_loss = (float(value) for value in state["losses"].numpy())
    trainer.epoch, trainer.step, num_batches, num_examples, num_right = counts
    trainer.sums = EpochSums(num_batches, num_examples, num_right, loss)
    trainer.model.stop_training = bool(state["stopped"].numpy())


def _weights(trainer: Trainer) -> dict[str, Any]:
    return {"weights": [variable.value for variable in trainer.model.weights]}


def _zeros(state: dict[str, Any]) -> dict[str, Any]:
    """The state with new variables, of the same shapes, in the memory of the host."""
    with tf.device("CPU:0"):
        return tf.nest.map_structure(
            lambda variable: tf.Variable(tf.zeros(variable.shape, variable.dtype)), state
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
