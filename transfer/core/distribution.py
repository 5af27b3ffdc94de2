"""Synchronous data-parallel training: replicas on the devices of a process or of a cluster.

The batch size is global. Each replica computes its shard of a batch, and losses and gradients are
summed, so that the result equals that of a single replica up to rounding. ``tf.distribute``
communicates; this module assigns rows and examples to processes and replicas.

Data contract: in a process, ``(inputs, labels)`` are its own rows of a batch. A label of -1 marks a
padding row of a replica with an empty shard: it is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

NO_LABEL = -1
STRATEGIES = ("auto", "none", "mirrored", "multi_worker")

# Raised by TensorFlow in the remaining workers when a worker dies or stops responding.
_GONE = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)
_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", ...}}'

_SEED_STRIDE = 1_000_003

Rows: TypeAlias = Any  # a NumPy array or a tensor


class LostWorkerError(ConnectionError):
    """Another worker of the run has died."""


@dataclass(frozen=True)
class Replicas:
    """All replicas of a run, as seen from one of its processes.

    Args:
        strategy: exchanges gradients and creates the variables. Defaults to TensorFlow's default
            strategy, a single replica.
        worker: index of this process, from 0. Worker 0 is the chief, which writes the files.
        num_workers: number of processes.
    """

    strategy: tf.distribute.Strategy = field(default_factory=tf.distribute.get_strategy)
    worker: int = 0
    num_workers: int = 1

    @property
    def is_chief(self) -> bool:
        return self.worker == 0

    @property
    def num_local(self) -> int:
        """Replicas of this process."""
        return self.strategy.num_replicas_in_sync // self.num_workers

    @property
    def count(self) -> int:
        """Replicas of all processes."""
        return self.strategy.num_replicas_in_sync

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on every replica of this process, each with its part of the arguments.

        Returns:
            The result, a single value, of the first replica.
        """
        values = self.strategy.run(function, arguments)
        return self.strategy.experimental_local_results(values)[0]

    def shard(self, inputs: Rows, labels: Rows) -> tuple[Any, Any]:
        """Shard the rows of a batch among the replicas of this process, for ``run``."""
        if self.num_local == 1:
            return inputs, labels
        shards = [
            take_shard(inputs, labels, index, self.num_local) for index in range(self.num_local)
        ]
        return self.each([shard[0] for shard in shards]), self.each([shard[1] for shard in shards])

    def each(self, values: Sequence[Any]) -> Any:
        """One value for each replica of this process, for ``run``."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.convert_to_tensor(
                values[context.replica_id_in_sync_group % self.num_local]
            )
        )

    # Communication between processes. All processes must call these methods in the same order.

    def examples_of_worker(self, num_examples: int, batch_size: int) -> np.ndarray:
        """Boolean ``[num_examples]``: the examples that this process computes if each example is
        computed by one process only.

        Whole batches are assigned: activations depend on the batch they are computed in, at float
        precision.
        """
        return np.arange(num_examples) // batch_size % self.num_workers == self.worker

    def join(self, rows: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """The rows of all processes, in the order of the examples.

        Args:
            rows: ``[mine.sum(), ...]``, rows of this process.
            mine: boolean ``[num_examples]``, the examples they belong to.
        """
        if self.num_workers == 1:
            return rows
        everything, positions = self.gather(rows), self.gather(np.flatnonzero(mine))
        joined = np.empty_like(everything)
        joined[positions] = everything
        return joined

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all processes, concatenated in the order of the workers."""
        if self.num_workers == 1:
            return rows
        values = self.each([rows] + [rows[:0]] * (self.num_local - 1))
        return self.strategy.gather(values, axis=0).numpy()

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        return int(self.gather(np.array([number])).sum())

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.gather(np.zeros(1, np.int32))

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """Context in which the chief runs before the other processes."""
        if not self.is_chief:
            self.barrier()
        yield
        if self.is_chief:
            self.barrier()

    def from_chief(self, text: str) -> str:
        """Broadcast the chief's ``text`` to all processes."""
        mine = text.encode() if self.is_chief else b""
        return bytes(self.gather(np.frombuffer(mine, np.uint8).astype(np.int32)).tolist()).decode()

    def check_same(self, name: str, value: Any) -> None:
        """Check that a value, compared by its ``repr``, is the same in all processes.

        Raises:
            ValueError: if it differs.
        """
        digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
        numbers = self.gather(np.array([self.worker]))
        digests = self.gather(digest.astype(np.int32)[None])
        (chief,) = digests[numbers == 0]
        different = sorted(numbers[(digests != chief).any(axis=1)].tolist())
        if different:
            raise ValueError(
                f"workers {different} have another {name} than worker 0; all must be given the same"
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which the failure of another process raises ``LostWorkerError``.

        Raises:
            LostWorkerError: if another process has died.
        """
        try:
            yield
        except _GONE as error:
            if self.num_workers == 1:
                raise
            raise LostWorkerError(
                f"another worker is gone; worker {self.worker} of {self.num_workers} stops, since "
                "no worker can continue alone. See the log of the other worker, and restart all "
                "workers with resume=True"
            ) from error


def open_replicas(kind: str = "auto") -> Replicas:
    """Create the replicas of this process. Must be called before TensorFlow executes any operation.

    Args:
        kind: ``none``: one replica. ``mirrored``: all GPUs of this process or, without GPUs, its
            logical CPUs. ``multi_worker``: all devices of the processes listed in ``TF_CONFIG``;
            waits for them. ``auto``: chosen by ``TF_CONFIG`` and the number of GPUs.

    Raises:
        ValueError: if ``TF_CONFIG`` is missing or invalid.
        LostWorkerError: if another worker does not start.
    """
    if kind not in STRATEGIES:
        raise ValueError(f"strategy {kind!r}: choose from {', '.join(STRATEGIES)}")
    workers = 0 if kind in ("none", "mirrored") else num_workers()
    if kind == "multi_worker" and not workers:
        raise ValueError(
            f"strategy multi_worker needs the variable TF_CONFIG, in each process: {_EXAMPLE}"
        )
    if kind == "multi_worker" or workers > 1:
        return _multi_worker(workers)
    devices = tf.config.list_logical_devices("GPU")
    if kind == "none" or (kind == "auto" and len(devices) < 2):
        return Replicas()
    devices = devices or tf.config.list_logical_devices("CPU")
    return Replicas(tf.distribute.MirroredStrategy([device.name for device in devices]))


def num_workers() -> int:
    """Number of processes listed in ``TF_CONFIG``; 0 if it is not set.

    Raises:
        ValueError: if it is invalid.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return 0
    try:
        config = json.loads(text)
        tasks = {job: len(hosts) for job, hosts in config["cluster"].items()}
        job, number = config["task"]["type"], int(config["task"]["index"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"TF_CONFIG is {text!r}; expected {_EXAMPLE}") from error
    if job not in ("chief", "worker") or not 0 <= number < tasks.get(job, 0):
        raise ValueError(
            f"TF_CONFIG makes this process {job} {number} of the cluster {tasks}; "
            "expected a chief or a worker that the cluster names"
        )
    return tasks.get("chief", 0) + tasks.get("worker", 0)


def _multi_worker(workers: int) -> Replicas:
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except _GONE as error:
        raise LostWorkerError(
            f"not all {workers} workers of TF_CONFIG connected ({str(error).splitlines()[0]}); "
            "check the others, and restart all of them"
        ) from error
    task = strategy.cluster_resolver
    chiefs = len(task.cluster_spec().as_dict().get("chief", ()))
    number = task.task_id if task.task_type == "chief" else chiefs + task.task_id
    return Replicas(strategy, number, workers)


def sum_over_replicas(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Within ``Replicas.run``: each value, summed over all replicas."""
    context = tf.distribute.get_replica_context()
    # Captured tensors have no device, which tf.distribute requires.
    values = [tf.identity(value) for value in values]
    if context.num_replicas_in_sync == 1:
        # TensorFlow registers the gradient of each reduction in a graph and never removes it, so
        # the graph, and with it 45 MB per run, would stay in memory until the process ends.
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def seed_of_replica(seed: tf.Tensor) -> tf.Tensor:
    """Derive a different seed for each replica from a common seed ``[2]``; the first replica keeps
    it."""
    context = tf.distribute.get_replica_context()
    number = 0 if context is None else context.replica_id_in_sync_group
    # The second element counts the draws: adding to it would repeat the numbers of other replicas.
    return seed + tf.cast(tf.stack([number * _SEED_STRIDE, 0]), seed.dtype)


def shard_indices(
    num_rows: int, index: int, num_shards: int, batch_size: int | None = None
) -> np.ndarray:
    """Sorted row indices of one shard of a batch.

    A shard contains row ``i`` together with row ``num_rows - 1 - i``, in mirrored positions, so
    that mixup, which pairs these rows, works within each shard.

    Args:
        num_rows: number of rows of the batch.
        index: index of the shard, from 0.
        num_shards: number of shards.
        batch_size: size of a full batch. A shard of a smaller batch is never larger than the same
            shard of a full batch.
    """
    full = batch_size or num_rows
    half = np.array_split(np.arange(-(-full // 2)), num_shards)[index]
    half = half[half < -(-num_rows // 2)]
    return np.unique(np.concatenate([half, num_rows - 1 - half]))


def take_shard(inputs: Rows, labels: Rows, index: int, num_shards: int) -> tuple[Rows, Rows]:
    """The rows of a shard; an empty shard gets one padding row, with label -1."""
    rows = shard_indices(len(labels), index, num_shards)
    if not len(rows):
        return inputs[:1], np.full(1, NO_LABEL)
    if isinstance(inputs, np.ndarray):
        return inputs[rows], np.asarray(labels)[rows]
    return tf.gather(inputs, rows), tf.gather(labels, rows)


def shards_of_batches(
    num_examples: int, batch_size: int, index: int, num_shards: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples, in the order of their batches, are in the shards of one process.

    Returns:
        Boolean ``[num_examples]`` twice: the examples to read, and those among them that are
        padding rows of an otherwise empty shard.
    """

    def of_batch(num_rows: int) -> np.ndarray:
        rows = shard_indices(num_rows, index, num_shards, batch_size)
        marks = np.zeros([2, num_rows], bool)
        marks[0, rows] = True
        if not len(rows):
            marks[:, :1] = True
        return marks

    num_full, rest = divmod(num_examples, batch_size)
    full = np.tile(of_batch(batch_size), num_full)
    is_read, is_padding = np.concatenate([full, of_batch(rest)], axis=1)
    return is_read, is_padding
