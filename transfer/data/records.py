"""Random access to the records of a prepared tfds dataset: reads requested positions only.

Data contract: ``Records`` are the serialized examples of one split. Position i is ``split[i]`` in
tfds: the concatenation of the shards, each in file order. One pass over a split notes the labels
and the byte offset of every record; it is kept on disk, see ``record_index``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import tensorflow as tf
from tensorflow_datasets.core.file_adapters import FileFormat

from transfer.data.pipeline import without_autotuning
from transfer.data.tfds import tfds

# Layout of a record: its length, uint64, and a checksum; the data; a checksum. See
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
_FRAME_BYTES = _HEADER_BYTES + _FOOTER_BYTES
_PASSED_TOGETHER = 1024  # records per step of a pass over all; one by one, overhead dominates


class Records(Protocol):
    """The serialized examples of a split."""

    num_parallel_reads: int
    """Number of calls of ``read`` that may run at the same time."""

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The records (bytes) at positions, int64 ``[n]`` in any order: object ``[n]``."""

    def index(self, label_key: str) -> dict[str, np.ndarray]:
        """Labels, int64 ``[num_records]``, and what else ``use`` needs; reads all records."""

    def use(self, index: dict[str, np.ndarray]) -> bool:
        """Take what ``index`` has returned, now or in an earlier process, before the first
        ``read``; returns whether it fits the files."""


def open_records(builder: tfds.core.DatasetBuilder, split_name: str) -> Records:
    """The records of a split.

    Raises:
        ValueError: if the format of the dataset has no random access.
    """
    file_format = builder.info.file_format or FileFormat.TFRECORD
    if file_format == FileFormat.TFRECORD:
        instructions = builder.info.splits[split_name].file_instructions
        return TFRecords(
            [instruction.filename for instruction in instructions],
            [instruction.examples_in_shard for instruction in instructions],
        )
    if file_format in FileFormat.with_random_access():
        return IndexedRecords(builder, split_name)
    readable = sorted({FileFormat.TFRECORD, *FileFormat.with_random_access()}, key=str)
    raise ValueError(
        f"dataset {builder.info.full_name!r} is prepared as {file_format.value}, whose records "
        "cannot be read in any order; expected "
        f"{', '.join(one.value for one in readable)}: convert it with `tfds convert_format`"
    )


class TFRecords:
    """TFRecord files with random access by byte offset. Checksums are verified.

    Args:
        files: shards, in order.
        num_examples: expected number of records of each shard.
    """

    num_parallel_reads = 4

    def __init__(self, files: Sequence[str], num_examples: Sequence[int]):
        self._files = [os.fspath(file) for file in files]
        self._num_examples = np.array(num_examples, np.int64)
        # First record of each shard, and the end.
        self._firsts = np.cumsum([0, *num_examples])
        self._offsets = np.zeros(0, np.int64)
        self._sizes = np.zeros(0, np.int64)

    def read(self, positions: np.ndarray) -> np.ndarray:
        # An operation graph per record (`TFRecordDatasetV2` takes an offset) takes ten times as
        # long as these positional reads.
        shards = np.searchsorted(self._firsts, positions, "right") - 1
        records = np.empty(len(positions), object)
        for shard in np.unique(shards).tolist():
            path = self._files[shard]
            with open(path, "rb", buffering=0) as file:
                for row in np.flatnonzero(shards == shard).tolist():
                    position = int(positions[row])
                    offset, size = int(self._offsets[position]), int(self._sizes[position])
                    records[row] = _checked(os.pread(file.fileno(), size, offset), path, offset)
        return records

    def index(self, label_key: str) -> dict[str, np.ndarray]:
        """See ``Records``.

        Raises:
            ValueError: if a file is damaged or has a different number of records.
        """

        def summary(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.strings.length(records), labels_of(records, label_key)

        records = without_autotuning(tf.data.TFRecordDataset(self._files))
        batches = records.batch(_PASSED_TOGETHER).map(summary)
        lengths, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        try:
            for length, label in batches.as_numpy_iterator():
                lengths.append(length.astype(np.int64))
                labels.append(label)
        except tf.errors.OpError as error:
            self._diagnose()
            raise ValueError(
                f"a record of {self._files[0]!r} or another shard is damaged "
                f"({error.message}); copy or prepare the dataset again"
            ) from error
        sizes = np.concatenate(lengths) + _FRAME_BYTES
        index = {"labels": np.concatenate(labels), "sizes": sizes}
        if not self.use(index):
            self._diagnose()
            raise ValueError(f"{self._files[0]!r} or another shard changed while it was read")
        return index

    def use(self, index: dict[str, np.ndarray]) -> bool:
        sizes = index.get("sizes", np.zeros(0, np.int64))
        if len(sizes) != self._firsts[-1] or (sizes < _FRAME_BYTES).any():
            return False
        ends = np.concatenate([[0], np.cumsum(sizes)])
        starts_of_shards = ends[self._firsts]
        file_sizes = [os.stat(file).st_size for file in self._files]
        if np.diff(starts_of_shards).tolist() != file_sizes:
            return False
        self._sizes = sizes
        self._offsets = ends[:-1] - np.repeat(starts_of_shards[:-1], self._num_examples)
        return True

    def _diagnose(self) -> None:
        """Find the first file that is cut short, or has another number of records than expected.

        Raises:
            ValueError: names the file.
        """
        for file, expected in zip(self._files, self._num_examples.tolist(), strict=True):
            found = _count(Path(file))
            if found != expected:
                raise ValueError(
                    f"{file!r} has {found} records; expected {expected}, as the dataset's "
                    "dataset_info.json says: copy or prepare it again"
                )


class IndexedRecords:
    """Formats with built-in random access: ArrayRecord, and Parquet, which tfds keeps in memory."""

    num_parallel_reads = 1

    def __init__(self, builder: tfds.core.DatasetBuilder, split_name: str):
        self._builder, self._split_name = builder, split_name

    @functools.cached_property
    def _source(self) -> Any:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return self._builder.as_data_source(self._split_name, deserialize_method=raw)

    def read(self, positions: np.ndarray) -> np.ndarray:
        records = self._source.__getitems__(positions.tolist())
        return np.array([bytes(record) for record in records], object)

    def index(self, label_key: str) -> dict[str, np.ndarray]:
        labels = [
            labels_of(tf.constant(self.read(positions), tf.string), label_key).numpy()
            for positions in _chunks(len(self._source))
        ]
        return {"labels": np.concatenate([np.zeros(0, np.int64), *labels])}

    def use(self, index: dict[str, np.ndarray]) -> bool:
        return True


def labels_of(records: tf.Tensor, label_key: str) -> tf.Tensor:
    """The labels of serialized examples, string ``[n]``: int64 ``[n]``."""
    feature = tf.io.FixedLenFeature([], tf.int64)
    return tf.io.parse_example(records, {label_key: feature})[label_key]


def _checked(record: bytes, path: str, offset: int) -> bytes:
    """The data of a record, whose checksum is verified."""
    data = record[_HEADER_BYTES:-_FOOTER_BYTES]
    length, checksum = record[:8], record[-_FOOTER_BYTES:]
    if int.from_bytes(length, "little") != len(data) or _masked_crc32c(data) != checksum:
        raise ValueError(f"corrupted record at byte {offset:,} of {path!r}; copy the file again")
    return data


def _masked_crc32c(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def _chunks(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, _PASSED_TOGETHER):
        yield np.arange(start, min(start + _PASSED_TOGETHER, count))


def _count(path: Path) -> int:
    """Number of records of a TFRecord file; reads no data.

    Raises:
        ValueError: if the last one is incomplete.
    """
    count = position = 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            file.seek(position)
            length = int.from_bytes(file.read(_HEADER_BYTES)[:8], "little")
            count += 1
            position += _HEADER_BYTES + length + _FOOTER_BYTES
    if position != size:
        raise ValueError(
            f"{str(path)!r} is cut short or damaged: record {count - 1} would end at byte "
            f"{position:,} of {size:,}; copy or prepare the dataset again"
        )
    return count
