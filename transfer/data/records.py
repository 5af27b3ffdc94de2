"""Random access to the records of a prepared tfds dataset: reads requested positions only.

Data contract: ``Records`` are the serialized examples of one split. Position i is ``split[i]`` in
tfds: the concatenation of the shards, each in file order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow as tf
from tensorflow_datasets.core.file_adapters import FileFormat

from transfer.data.tfds import tfds

# Layout of a record: its length, uint64, and a checksum; the data; a checksum. See
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
_READ_TOGETHER = 32  # records per call into Python, which takes longer than reading a record


class Records(Protocol):
    """The serialized examples of a split."""

    def read(self, positions: np.ndarray) -> tf.data.Dataset:
        """The records (bytes) at positions, int64 ``[n]`` in any order."""

    def read_all(self) -> tf.data.Dataset:
        """All records in order, read sequentially."""


def open_records(builder: tfds.core.DatasetBuilder, split_name: str) -> Records:
    """The records of a split.

    Raises:
        ValueError: if the format of the dataset has no random access, or its files do not match
            ``dataset_info.json``.
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

    Raises:
        ValueError: if a file is damaged or has a different number of records.
    """

    def __init__(self, files: Sequence[str], num_examples: Sequence[int]):
        self._files = tf.constant(list(files), tf.string)
        offsets = [_offsets(Path(file)) for file in files]
        for file, starts, expected in zip(files, offsets, num_examples, strict=True):
            if len(starts) != expected:
                raise ValueError(
                    f"{str(file)!r} has {len(starts)} records; expected {expected}, as the "
                    "dataset's dataset_info.json says: copy or prepare it again"
                )
        self._offsets = np.concatenate([*offsets, np.zeros(0, np.int64)])
        self._file_numbers = np.repeat(np.arange(len(files)), [len(shard) for shard in offsets])

    def read(self, positions: np.ndarray) -> tf.data.Dataset:
        places = self._file_numbers[positions], self._offsets[positions]
        return tf.data.Dataset.from_tensor_slices(places).map(
            self._read_one, num_parallel_calls=tf.data.AUTOTUNE
        )

    def read_all(self) -> tf.data.Dataset:
        return tf.data.TFRecordDataset(self._files)

    def _read_one(self, file_number: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        # tf.data.TFRecordDataset has no argument for a byte offset; the underlying op has one.
        from_there = tf.raw_ops.TFRecordDatasetV2(
            filenames=self._files[file_number][None],
            compression_type="",
            buffer_size=0,  # reads only the record
            byte_offsets=offset[None],
        )
        records = tf.data.experimental.from_variant(from_there, tf.TensorSpec([], tf.string))
        return records.take(1).get_single_element()


class IndexedRecords:
    """Formats with built-in random access: ArrayRecord, and Parquet, which tfds keeps in memory."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split_name: str):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._source = builder.as_data_source(split_name, deserialize_method=raw)

    def read(self, positions: np.ndarray) -> tf.data.Dataset:
        def read_some(chosen: np.ndarray) -> np.ndarray:
            return np.array([bytes(x) for x in self._source.__getitems__(chosen.tolist())], object)

        def in_graph(chosen: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.numpy_function(read_some, [chosen], tf.string), [None])

        batches = tf.data.Dataset.from_tensor_slices(positions).batch(_READ_TOGETHER)
        return batches.map(in_graph).unbatch()

    def read_all(self) -> tf.data.Dataset:
        return self.read(np.arange(len(self._source)))


def _offsets(path: Path) -> np.ndarray:
    """Byte offsets of the records of a TFRecord file, int64 ``[num_records]``; reads no data."""
    offsets, position = [], 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            file.seek(position)
            length = int.from_bytes(file.read(_HEADER_BYTES)[:8], "little")
            offsets.append(position)
            position += _HEADER_BYTES + length + _FOOTER_BYTES
    if position != size:
        raise ValueError(
            f"{str(path)!r} is cut short or damaged: record {len(offsets) - 1} would end at byte "
            f"{position:,} of {size:,}; copy or prepare the dataset again"
        )
    return np.array(offsets, np.int64)
