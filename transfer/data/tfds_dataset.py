"""Datasets of TensorFlow Datasets as a ``Source``: opened, prepared if necessary."""

from __future__ import annotations

import difflib
import functools
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import tensorflow as tf

from transfer.data.dataset import Source
from transfer.data.labelled_files import digest, joined, state_of
from transfer.data.names import Names
from transfer.data.record_index import remembered
from transfer.data.records import Records, open_records
from transfer.data.tfds import tfds

_READ_TOGETHER = 32  # records per call into Python, which takes longer than reading a record


def open_tfds(name: str, data_dir: str | None) -> Source:
    """The dataset of this name, prepared if necessary; see ``open_source``."""
    import transfer.data.digits  # noqa: F401 - registers the embedded dataset with tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(_unknown_dataset(name)) from error
    if not _is_prepared(builder):
        if builder.name != "digits":
            _require_network(name, str(builder.data_dir))
        builder.download_and_prepare(file_format="tfrecord")
    return from_builder(builder, name)


def from_builder(builder: tfds.core.DatasetBuilder, name: str) -> Source:
    """A prepared dataset under a display name."""
    features = builder.info.features
    image_key = _only_feature(features, tfds.features.Image, name)
    label_key = _only_feature(features, tfds.features.ClassLabel, name)
    dtype = np.dtype(features[image_key].np_dtype)
    if dtype not in (np.uint8, np.uint16):  # tfds stores floats as four channels of bytes
        raise ValueError(
            f"dataset {name!r} has images of dtype {dtype}; expected uint8 or uint16, like "
            "those of image files"
        )

    images_and_labels = {
        image_key: tf.io.FixedLenFeature([], tf.string),
        label_key: tf.io.FixedLenFeature([], tf.int64),
    }

    @functools.cache
    def indexed(split_name: str) -> tuple[Records, np.ndarray]:
        """The records of a split, ready to be read, and their labels."""
        records = open_records(builder, split_name)

        def fits(index: dict[str, np.ndarray]) -> bool:
            return len(index.get("labels", ())) == sizes[split_name] and records.use(index)

        index = remembered(
            f"{builder.info.full_name} {split_name} {label_key}",
            [str(path) for path in builder.info.splits[split_name].filepaths],
            lambda: records.index(label_key),
            fits,
        )
        return records, index["labels"]

    def examples(split_name: str, positions: np.ndarray) -> tf.data.Dataset:
        records, _ = indexed(split_name)

        def read(chosen: tf.Tensor) -> dict[str, tf.Tensor]:
            serialized = tf.numpy_function(records.read, [chosen], tf.string, stateful=False)
            parsed = tf.io.parse_example(tf.ensure_shape(serialized, [None]), images_and_labels)
            return {
                "image": parsed[image_key],
                "label": parsed[label_key],
                "name": tf.strings.join([split_name, tf.strings.as_string(chosen)], "/"),
            }

        batches = tf.data.Dataset.from_tensor_slices(positions).batch(_READ_TOGETHER)
        return batches.map(read, num_parallel_calls=records.num_parallel_reads).unbatch()

    def labels(split_name: str) -> np.ndarray:
        return indexed(split_name)[1]

    def ids(split_name: str) -> np.ndarray:
        info = builder.info.splits[split_name]
        shards = [(str(path), *state_of(path)) for path in info.filepaths]
        dataset = digest(builder.info.full_name, shards)
        return joined(digest(dataset, index) for index in range(sizes[split_name]))

    def names(split_name: str) -> Names:
        return Names.of(f"{split_name}/{index}" for index in range(sizes[split_name]))

    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    return Source(
        name,
        list(features[label_key].names or ()),
        sizes,
        examples,
        labels,
        names,
        ids,
    )


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return bool(builder.info.splits) and Path(builder.data_dir).is_dir()


def _unknown_dataset(name: str) -> str:
    near = difflib.get_close_matches(name.split("/")[0], tfds.list_builders())
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"tfds knows no dataset {name!r}{hint} (for images of your own use an image folder)"


def _require_network(name: str, data_dir: str, timeout_s: float = 3.0) -> None:
    """Fail immediately without a network, where tfds would retry for minutes."""
    reached: list[bool] = []

    def probe() -> None:
        try:
            urllib.request.urlopen("https://storage.googleapis.com", timeout=timeout_s).close()
        except urllib.error.HTTPError:
            pass  # any response shows that there is a network
        except OSError:
            return
        reached.append(True)

    # In a thread: the DNS lookup ignores the timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not reached:
        raise ValueError(
            f"dataset {name!r} is not prepared in {data_dir!r} and there is no network to download "
            f"it; run `tfds build {name}` where there is one, copy the directory and pass it as "
            "the data dir, or use an image folder"
        )


def prepared_directory(directory: Path) -> Path | None:
    """The directory of a prepared dataset, or of its newest version; ``None`` if it is not one."""
    prepared = [p.parent for p in directory.glob("features.json")]
    versions = (path.parent for path in directory.glob("*/features.json"))
    prepared += sorted(versions, key=_version)
    return prepared[-1] if prepared else None


def _version(directory: Path) -> tuple[bool, list[int], str]:
    """A key by which 1.10.0 comes after 1.9.0, and both after folders that are no versions."""
    numbers = directory.name.split(".")
    is_version = all(number.isdecimal() for number in numbers)
    return is_version, [int(number) for number in numbers] if is_version else [], directory.name


def only_dataset_in(directory: Path) -> str:
    """The name of the only prepared dataset in a data dir.

    Raises:
        ValueError: if there are none or several.
    """
    names = sorted(
        {
            str(path.parent.parent.relative_to(directory))
            for depth in ("*/*", "*/*/*")
            for path in directory.glob(f"{depth}/features.json")
        }
    )
    if len(names) == 1:
        return names[0]
    content = f"holds {len(names)} datasets ({', '.join(names)})" if names else "holds no dataset"
    raise ValueError(f"data dir {str(directory)!r} {content}; say which with a dataset name")


def _only_feature(features: tfds.features.FeaturesDict, kind: type, name: str) -> str:
    keys = [key for key, feature in features.items() if isinstance(feature, kind)]
    preferred = [key for key in keys if key in ("image", "label")]
    if len(keys) == 1 or preferred:
        return (preferred or keys)[0]
    raise ValueError(
        f"dataset {name!r} is not for image classification: expected one {kind.__name__} feature, "
        f"found {keys or 'none'} among {sorted(features)}"
    )
