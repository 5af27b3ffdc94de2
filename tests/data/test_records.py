"""Random access to records of tfds datasets, compared with tfds."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from transfer.data.batches import shuffled
from transfer.data.sources import open_source
from transfer.images.preprocess import Preprocess


class Sharded(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset sorted by class, in several shards."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(4, 4, 1)),
                    "label": tfds.features.ClassLabel(num_classes=4),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(48):
            image = np.full((4, 4, 1), number, np.uint8)
            image[: number % 4] = 255 - number  # records of different sizes
            yield number, {"image": image, "label": number // 12}


def prepared(folder, file_format="tfrecord", num_shards=5):
    builder = Sharded(data_dir=folder, file_format=file_format)
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=config)
    return builder


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record", "parquet"])
def test_positions_equal_tfds(tmp_path, file_format):
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    builder = prepared(tmp_path, file_format)
    assert len(builder.info.splits["train"].shard_lengths) == 5
    if file_format == "tfrecord":
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        theirs = builder.as_dataset(split="train", read_config=in_order).as_numpy_iterator()
    else:
        theirs = builder.as_data_source("train")
    pixels = np.array([example["image"][3, 3, 0] for example in theirs])
    split = open_source(data_dir=str(builder.data_dir)).split("train")
    found = [tf.io.decode_png(example["image"])[3, 3, 0] for example in split.encoded()]
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(split.labels, pixels // 12)
    order = shuffled(48, 1)
    batches = split.batches(Preprocess("none", 4), 10, shuffle_seed=1, first_batch=2)
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    np.testing.assert_array_equal(images[:, 3, 3, 0], pixels[order[20:]])
    np.testing.assert_array_equal(labels, split.labels[order[20:]])
    names = [example["name"].numpy().decode() for example in split.examples(order)]
    assert names == [split.names[position] for position in order]


def test_single_record_is_read_without_others(tmp_path):
    builder = prepared(tmp_path, num_shards=1)
    split = open_source(data_dir=str(builder.data_dir)).split("train")
    whole = [example["image"].numpy() for example in split.encoded()]
    (path,) = builder.info.splits["train"].filepaths
    content = path.read_bytes()
    damaged = content.index(whole[3])
    path.write_bytes(content[:damaged] + b"?" + content[damaged + 1 :])
    (other,) = split.examples(np.array([30]))
    assert other["image"] == whole[30]
    with pytest.raises(tf.errors.InvalidArgumentError, match="corrupted record at byte"):
        list(split.examples(np.array([3])))


def test_truncated_files_are_named(tmp_path):
    builder = prepared(tmp_path, num_shards=1)
    (path,) = builder.info.splits["train"].filepaths
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ValueError, match="is cut short or damaged: record 47 would end at byte"):
        open_source(data_dir=str(builder.data_dir)).split("train")
    path.write_bytes(content + content)
    with pytest.raises(ValueError, match="has 96 records; expected 48"):
        open_source(data_dir=str(builder.data_dir)).split("train")


def test_format_without_random_access_is_refused(tmp_path):
    builder = prepared(tmp_path)
    info = Path(builder.data_dir) / "dataset_info.json"
    info.write_text(info.read_text().replace("tfrecord", "riegeli"))
    with pytest.raises(ValueError, match=r"prepared as riegeli.* `tfds convert_format`"):
        open_source(data_dir=str(builder.data_dir)).split("train")
