"""The replicas that train one classifier together: devices of a process, processes of a cluster.

A batch is one batch for all of them. Each replica takes its piece, and what they find is added up,
so that several do what one does with the same batch, but for rounding. The exchange is
``tf.distribute``'s; here is who does which part.

Data contract: in a process, ``(inputs, labels)`` are the rows of a batch that are its own. A label
of -1 marks a row that stands in where a replica has none: it counts for nothing.
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

# What TensorFlow raises in the others when a worker is gone, at once or when it stays silent.
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
    """Another worker of the run is gone."""


@dataclass(frozen=True)
class Replicas:
    """All replicas of a run, seen from one of its processes.

    Args:
        strategy: what exchanges gradients, and makes the variables. The default is TensorFlow's
            own for a single replica.
        worker: number of this process, from 0; that is the chief, who writes the files.
        num_workers: how many processes there are.
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
        """Call a function on every replica of this process, each with its part of the arguments;
        what it returns, one value, on the first of them."""
        values = self.strategy.run(function, arguments)
        return self.strategy.experimental_local_results(values)[0]

    def pieces(self, inputs: Rows, labels: Rows) -> tuple[Any, Any]:
        """Rows of a batch, divided among the replicas of this process for ``run``."""
        if self.num_local == 1:
            return inputs, labels
        parts = [take(inputs, labels, number, self.num_local) for number in range(self.num_local)]
        return self.each([part[0] for part in parts]), self.each([part[1] for part in parts])

    def each(self, values: Sequence[Any]) -> Any:
        """One value for each replica of this process, for ``run``."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.convert_to_tensor(
                values[context.replica_id_in_sync_group % self.num_local]
            )
        )

    # Between processes. All of them must call these, in the same order.

    def share(self, num_examples: int, batch_size: int) -> np.ndarray:
        """Boolean ``[num_examples]``: what this process computes where each example is computed by
        one of them. Whole batches: a row depends on its company, in the last bit."""
        return np.arange(num_examples) // batch_size % self.num_workers == self.worker

    def join(self, rows: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """The rows of all processes, in order.

        Args:
            rows: ``[mine.sum(), ...]``, of this process.
            mine: boolean ``[num_examples]``, which ones they are.
        """
        if self.num_workers == 1:
            return rows
        everything, positions = self.gather(rows), self.gather(np.flatnonzero(mine))
        joined = np.empty_like(everything)
        joined[positions] = everything
        return joined

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all processes, one process after the other; those of a process stay in
        order."""
        if self.num_workers == 1:
            return rows
        values = self.each([rows] + [rows[:0]] * (self.num_local - 1))
        return self.strategy.gather(values, axis=0).numpy()

    def total(self, number: int) -> int:
        """The sum of a number of each process."""
        return int(self.gather(np.array([number])).sum())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(np.zeros(1, np.int32))

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """Let the chief do something before the others do it."""
        if not self.is_chief:
            self.barrier()
        yield
        if self.is_chief:
            self.barrier()

    def from_chief(self, text: str) -> str:
        """What the chief calls this with."""
        mine = text.encode() if self.is_chief else b""
        return bytes(self.gather(np.frombuffer(mine, np.uint8).astype(np.int32)).tolist()).decode()

    def check_same(self, what: str, value: Any) -> None:
        """Compare a value by its ``repr``.

        Raises:
            ValueError: if another process has another one, and all must have it alike.
        """
        digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
        numbers = self.gather(np.array([self.worker]))
        digests = self.gather(digest.astype(np.int32)[None])
        (chief,) = digests[numbers == 0]
        different = sorted(numbers[(digests != chief).any(axis=1)].tolist())
        if different:
            raise ValueError(
                f"workers {different} have another {what} than worker 0; all must be given the same"
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While other processes are needed.

        Raises:
            LostWorkerError: when one of them is gone.
        """
        try:
            yield
        except _GONE as error:
            if self.num_workers == 1:
                raise
            raise LostWorkerError(
                f"another worker is gone; worker {self.worker} of {self.num_workers} stops, for "
                "none can go on alone. See what the other one says, and start all of them again "
                "with resume=True"
            ) from error


def open_replicas(kind: str = "auto") -> Replicas:
    """The replicas that this process belongs to. Call it before TensorFlow computes anything.

    Args:
        kind: ``none``: one replica. ``mirrored``: all GPUs of this process or, where there is none,
            its logical CPUs. ``multi_worker``: all devices of the processes that ``TF_CONFIG``
            names; waits for them. ``auto``: what there is.

    Raises:
        ValueError: if ``TF_CONFIG`` is missing or is not what TensorFlow expects.
        LostWorkerError: if another worker does not come.
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
    """The processes that ``TF_CONFIG`` names; 0 if it is not set.

    Raises:
        ValueError: if it is not what TensorFlow expects.
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
            f"not all {workers} workers of TF_CONFIG came ({str(error).splitlines()[0]}); look at "
            "the others, and start all of them again"
        ) from error
    task = strategy.cluster_resolver
    chiefs = len(task.cluster_spec().as_dict().get("chief", ()))
    number = task.task_id if task.task_type == "chief" else chiefs + task.task_id
    return Replicas(strategy, number, workers)


def sum_over_replicas(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Within ``Replicas.run``: each value, added up over all replicas."""
    context = tf.distribute.get_replica_context()
    # What comes from outside has no device yet, and tf.distribute wants one.
    return context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.identity(v) for v in values])


def seed_of_replica(seed: tf.Tensor) -> tf.Tensor:
    """From a seed ``[2]`` that all replicas have one of their own, for what each draws at random;
    the first keeps it."""
    context = tf.distribute.get_replica_context()
    number = 0 if context is None else context.replica_id_in_sync_group
    # The second number counts what is drawn: added to it, replicas would repeat each other.
    return seed + tf.cast(tf.stack([number * _SEED_STRIDE, 0]), seed.dtype)


def piece(num_rows: int, number: int, count: int, batch_size: int | None = None) -> np.ndarray:
    """Positions of a piece of a batch, in order.

    With a row its counterpart from the other end is in the same piece, and at the other end of it:
    what pairs them up, as mixup does, may do so in each piece alone.

    Args:
        num_rows: of the batch.
        number: of the piece, from 0.
        count: number of pieces.
        batch_size: of batches with all rows. A piece of a smaller one has no more rows than that of
            a full one.
    """
    full = batch_size or num_rows
    half = np.array_split(np.arange(-(-full // 2)), count)[number]
    half = half[half < -(-num_rows // 2)]
    return np.unique(np.concatenate([half, num_rows - 1 - half]))


def take(inputs: Rows, labels: Rows, number: int, count: int) -> tuple[Rows, Rows]:
    """The rows of a piece; one without a label where it has none."""
    chosen = piece(len(labels), number, count)
    if not len(chosen):
        return inputs[:1], np.full(1, NO_LABEL)
    if isinstance(inputs, np.ndarray):
        return inputs[chosen], np.asarray(labels)[chosen]
    return tf.gather(inputs, chosen), tf.gather(labels, chosen)


def pieces_of_batches(
    num_examples: int, batch_size: int, number: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of examples in the order of their batches: which are in the pieces of one process.

    Returns:
        Boolean ``[num_examples]`` twice: those to be read, and those of these that only stand in
        where a piece would be empty.
    """

    def of_batch(num_rows: int) -> np.ndarray:
        chosen = piece(num_rows, number, count, batch_size)
        marks = np.zeros([2, num_rows], bool)
        marks[0, chosen] = True
        if not len(chosen):
            marks[:, :1] = True
        return marks

    num_full, rest = divmod(num_examples, batch_size)
    full = np.tile(of_batch(batch_size), num_full)
    is_read, stands_in = np.concatenate([full, of_batch(rest)], axis=1)
    return is_read, stands_in
