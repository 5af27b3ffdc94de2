"""A selection of images reads these images and no others, in every layout."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from test_records import Sharded

from transfer.data.dataset import few_shot, train_and_eval_splits
from transfer.data.sources import open_source
from transfer.images.preprocess import Preprocess

COUNTER = Path("/proc/self/io")
pytestmark = pytest.mark.skipif(not COUNTER.is_file(), reason="counts bytes on Linux only")
CLASSES, PER_CLASS, BATCH = 4, 24, 12
PREPROCESS = Preprocess("none", 8)


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)


class Noise(Sharded, skip_registration=True):
    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(64, 64, 3)),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        for number in range(CLASSES * PER_CLASS):
            yield number, {"image": noise(number), "label": number // PER_CLASS}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same images in each layout, opened."""
    folder = tmp_path_factory.mktemp("layouts")
    builder = Noise(data_dir=folder / "tfds")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    lines = ["path,label"]
    for number in range(CLASSES * PER_CLASS):
        path = folder / "photos" / f"class{number // PER_CLASS}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(noise(number)).numpy())
        lines.append(f"photos/{path.parent.name}/{path.name},{path.parent.name}")
    (folder / "labels.csv").write_text("\n".join(lines))
    opened = {
        "tfrecord": open_source(data_dir=str(builder.data_dir)),
        "folder": open_source(image_folder=str(folder / "photos")),
        "csv": open_source(csv=str(folder / "labels.csv")),
    }
    for source in opened.values():
        consume(source.split("train[:2]"))  # what TensorFlow and tfds load when first used
    return opened


def consume(split, **options):
    for _ in split.batches(PREPROCESS, BATCH, **options):
        pass


def num_read():
    return int(re.search(r"rchar: (\d+)", COUNTER.read_text())[1])


def splits(source):
    return train_and_eval_splits(source, max_compared=0)


def third_batch_on(source):
    train, _ = splits(source)
    return train, {"shuffle_seed": 1, "first_batch": 2}


def second_of_three_workers(source):
    return splits(source)[0], {"shuffle_seed": 1, "shard": (1, 3)}


def few_shots(source):
    return few_shot(splits(source)[0], 2, seed=3), {"shuffle_seed": 1}


def held_out(source):
    return splits(source)[1], {}


def middle_image(source):
    return source.split("train[50:51]"), {}


@pytest.mark.parametrize("layout", ["folder", "csv", "tfrecord"])
@pytest.mark.parametrize(
    "select", [few_shots, held_out, second_of_three_workers, third_batch_on, middle_image]
)
def test_bytes_read_are_those_of_the_images_used(sources, layout, select):
    source = sources[layout]
    before = num_read()
    split, options = select(source)
    consume(split, **options)
    read = num_read() - before
    used, _ = split.batches(PREPROCESS, BATCH, **options)._examples()
    size = sum(len(example["image"]) for example in used.as_numpy_iterator())
    assert size <= read < 1.05 * size
    assert size < 0.9 * CLASSES * PER_CLASS * len(tf.io.encode_png(noise(0)).numpy())
