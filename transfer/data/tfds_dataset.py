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
from transfer.data.labelled_files import digest, state_of
from transfer.data.records import Records, open_records
from transfer.data.tfds import tfds

_LABELS_TOGETHER = 1024  # batch size for reading labels; one by one, overhead dominates


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

    @functools.cache
    def records(split_name: str) -> Records:
        return open_records(builder, split_name)

    def deserialize(record: tf.Tensor) -> dict[str, tf.Tensor]:
        return features.deserialize_example(
            record, decoders={image_key: tfds.decode.SkipDecoding()}
        )

    def examples(split_name: str, positions: np.ndarray) -> tf.data.Dataset:
        def labelled(position: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
            example = deserialize(record)
            return {
                "image": example[image_key],
                "label": example[label_key],
                "name": tf.strings.join([split_name, tf.strings.as_string(position)], "/"),
            }

        return tf.data.Dataset.zip(
            tf.data.Dataset.from_tensor_slices(positions), records(split_name).read(positions)
        ).map(labelled, num_parallel_calls=tf.data.AUTOTUNE)

    @functools.cache
    def labels(split_name: str) -> np.ndarray:
        batches = (
            records(split_name)
            .read_all()
            .map(lambda record: deserialize(record)[label_key], num_parallel_calls=tf.data.AUTOTUNE)
            .batch(_LABELS_TOGETHER)
        )
        return np.concatenate([np.zeros(0, np.int64), *batches.as_numpy_iterator()])

    def ids(split_name: str) -> list[bytes]:
        info = builder.info.splits[split_name]
        shards = [(str(path), *state_of(path)) for path in info.filepaths]
        dataset = digest(builder.info.full_name, shards)
        return [digest(dataset, index) for index in range(sizes[split_name])]

    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    return Source(
        name,
        list(features[label_key].names or ()),
        sizes,
        examples,
        labels,
        names=lambda split_name: [f"{split_name}/{index}" for index in range(sizes[split_name])],
        ids=ids,
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
    prepared += sorted(p.parent for p in directory.glob("*/features.json"))
    return prepared[-1] if prepared else None


def only_dataset_in(directory: Path) -> str:
    """The name of the only prepared dataset in a data dir.

    Raises:
        ValueError: if there are none or several.
    """
    names = sorted(
        str(path.parent.parent.relative_to(directory))
        for depth in ("*/*", "*/*/*")
        for path in directory.glob(f"{depth}/features.json")
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
