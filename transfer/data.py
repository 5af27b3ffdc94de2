"""Labelled images from tfds datasets, prepared tfds directories and folders of images, all alike.

Data contract: a ``Source`` knows the class names and the splits. A ``Split`` is a selection of its
examples in a fixed order, with the labels in memory and the images still encoded (JPEG, PNG, ...).
``Split.batches`` decodes and preprocesses them: float32 ``[batch, size, size, channels]`` and int64
``[batch]`` labels.
"""

from __future__ import annotations

import functools
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from transfer.augment import random_view
from transfer.preprocess import Preprocess

HELD_OUT_SHARE = 0.2  # of a dataset that comes with nothing but a training split
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test", "testing")
SHUFFLE_BUFFER = 16_384  # encoded images; up to this many, a shuffle is perfect
_AUTO = "auto"
# Examples in the order of the shards, so that position i is the one that tfds calls split[i].
_IN_ORDER = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)


class Source:
    """One dataset: where its examples are read from, its class names and its splits."""

    def __init__(self, builder: tfds.core.DatasetBuilder, *, name: str, root: Path | None = None):
        self._builder = builder
        self._root = root  # of a folder of images: file names are given relative to it
        self.name = name
        self._labels_read: dict[str, np.ndarray] = {}
        features = builder.info.features
        self._image_key = _only_feature(features, tfds.features.Image, name)
        self._label_key = _only_feature(features, tfds.features.ClassLabel, name)
        self.class_names: list[str] = list(features[self._label_key].names or ())
        if len(self.class_names) < 2:
            raise ValueError(
                f"dataset {name!r} has {len(self.class_names)} class {self.class_names}; "
                "a classifier needs at least 2"
            )

    @property
    def split_names(self) -> list[str]:
        return list(self._builder.info.splits)

    def split(self, expression: str) -> Split:
        """The examples that a tfds split expression names: ``train``, ``train[:80%]``, ``a+b``.

        Raises:
            ValueError: if the expression or the split is unknown, selects nothing, or has a label
                that is not the number of a class.
        """
        try:
            parts = tfds.core.ReadInstruction.from_spec(expression).to_absolute(
                self._builder.info.splits
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise ValueError(
                f"cannot take split {expression!r} of {self.name!r} ({_one_line(error)}); "
                f"its splits are {self.split_names}; slices are written like 'train[:80%]'"
            ) from error
        selected = []
        for part in parts:
            size = self._builder.info.splits[part.splitname].num_examples
            selected.append((part.splitname, np.arange(size)[part.from_ : part.to]))
        split = Split(self, tuple(selected))
        if not len(split):
            raise ValueError(f"split {expression!r} of {self.name!r} has no images")
        _check_labels(split)
        return split

    def _labels(self, split_name: str) -> np.ndarray:
        if split_name not in self._labels_read:
            labels = self._read(split_name).map(lambda example: example[self._label_key])
            self._labels_read[split_name] = np.fromiter(labels.as_numpy_iterator(), np.int64)
        return self._labels_read[split_name]

    def _read(self, split_name: str) -> tf.data.Dataset:
        return self._builder.as_dataset(
            split=split_name,
            decoders={self._image_key: tfds.decode.SkipDecoding()},
            read_config=_IN_ORDER,
            shuffle_files=False,
        )

    def _encoded(self, split_name: str, indices: np.ndarray) -> tf.data.Dataset:
        """``{"image": encoded bytes, "label", "name"}`` of the examples at sorted indices."""
        first, last = int(indices[0]), int(indices[-1])
        wanted = np.zeros(last - first + 1, bool)
        wanted[indices - first] = True
        wanted = tf.constant(wanted)

        def to_example(index: tf.Tensor, example: dict) -> dict:
            if self._root is not None:
                name = example["image/filename"]
            else:
                name = tf.strings.join([split_name, tf.strings.as_string(index + first)], "/")
            return {
                "image": example[self._image_key],
                "label": example[self._label_key],
                "name": name,
            }

        examples = self._read(split_name).skip(first).take(last - first + 1).enumerate()
        return examples.filter(lambda index, _: wanted[index]).map(to_example)

    def display_name(self, name: bytes) -> str:
        """An example's name for people: its file below the folder, or ``split/index``."""
        text = name.decode()
        return str(Path(text).relative_to(self._root)) if self._root is not None else text


@dataclass(frozen=True)
class Split:
    """Some examples of a source, in a fixed order.

    ``parts`` are pairs of a split's name and the sorted positions within it.
    """

    source: Source
    parts: tuple[tuple[str, np.ndarray], ...]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.parts)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64 ``[len(self)]``."""
        return np.concatenate(
            [self.source._labels(name)[indices] for name, indices in self.parts if len(indices)]
            or [np.zeros(0, np.int64)]
        )

    @functools.cached_property
    def names(self) -> list[str]:
        """A name per example: its file, or ``split/index``."""
        names = self.encoded().map(lambda example: example["name"]).as_numpy_iterator()
        return [self.source.display_name(name) for name in names]

    def where(self, keep: np.ndarray) -> Split:
        """The examples at which the boolean array ``keep`` ``[len(self)]`` is true."""
        ends = np.cumsum([len(indices) for _, indices in self.parts])[:-1]
        masks = np.split(keep, ends)
        return replace(
            self,
            parts=tuple(
                (name, indices[mask])
                for (name, indices), mask in zip(self.parts, masks, strict=True)
            ),
        )

    def without(self, other: Split) -> Split:
        """The examples that are not in ``other``."""
        taken = {(name, index) for name, indices in other.parts for index in indices.tolist()}
        keep = [
            (name, index) not in taken for name, indices in self.parts for index in indices.tolist()
        ]
        return self.where(np.array(keep, bool))

    def encoded(self) -> tf.data.Dataset:
        """``{"image": encoded bytes, "label": int64, "name": bytes}`` in order."""
        datasets = [self.source._encoded(name, idx) for name, idx in self.parts if len(idx)]
        return functools.reduce(lambda first, second: first.concatenate(second), datasets)

    def batches(
        self,
        preprocess: Preprocess,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augment: bool = False,
    ) -> Batches:
        """Decoded, preprocessed batches; the last one may be smaller, none is left out.

        Args:
            preprocess: applied to every image.
            batch_size: images per batch.
            shuffle_seed: gives the order, and the random views; ``None`` keeps the split's order.
            augment: show a random view (shift, flip) of each image; needs a ``shuffle_seed``.
        """
        return Batches(self, preprocess, batch_size, shuffle_seed, augment)


@dataclass(frozen=True)
class Batches:
    """Iterates over ``(images, labels)``; see ``Split.batches``."""

    split: Split
    preprocess: Preprocess
    batch_size: int
    shuffle_seed: int | None
    augment: bool

    def __post_init__(self) -> None:
        if self.augment and self.shuffle_seed is None:
            raise ValueError("random views need a seed: pass shuffle_seed")

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def dataset(self) -> tf.data.Dataset:
        """The same as a ``tf.data.Dataset``; unreadable images raise TensorFlow's own errors."""
        examples = self.split.encoded()
        if self.shuffle_seed is not None:
            buffer = min(len(self.split), SHUFFLE_BUFFER)
            examples = examples.shuffle(buffer, seed=self.shuffle_seed)
        return (
            examples.enumerate()
            .map(self._to_pair, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(self.batch_size)
            .prefetch(tf.data.AUTOTUNE)
        )

    def _to_pair(self, step: tf.Tensor, example: dict) -> tuple[tf.Tensor, tf.Tensor]:
        image = decode(example["image"])
        if self.augment:
            image = random_view(image, tf.stack([tf.cast(self.shuffle_seed, tf.int64), step]))
        return self.preprocess(image), example["label"]

    def __iter__(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        try:
            yield from self.dataset()
        except tf.errors.InvalidArgumentError as error:
            unreadable = find_unreadable(self.split)
            if not unreadable:
                raise
            more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
            raise ValueError(
                f"{len(unreadable)} of {len(self.split)} images cannot be decoded: "
                f"{', '.join(unreadable[:5])}{more}; repair or remove them "
                "(expected JPEG, PNG, GIF or BMP)"
            ) from error


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Encoded JPEG, PNG, GIF (first frame) or BMP to uint8 RGB ``[height, width, 3]``."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def find_unreadable(split: Split) -> list[str]:
    """Names of the images of a split that do not decode."""
    unreadable = []
    for example in split.encoded():
        try:
            decode(example["image"])
        except tf.errors.InvalidArgumentError:
            unreadable.append(split.source.display_name(example["name"].numpy()))
    return unreadable


def open_source(
    dataset: str = "", *, data_dir: str | None = None, image_folder: str | None = None
) -> Source:
    """Open a dataset; prepare it if tfds can do so.

    Args:
        dataset: a tfds name such as ``tf_flowers`` or ``cmaterdb/telugu:1.0.0``, or ``digits``
            (embedded, needs no network). May be left out where ``data_dir`` holds one dataset only.
        data_dir: where tfds datasets are, or are to be prepared; or the directory of one prepared
            dataset. Default: tfds' own, ``~/tensorflow_datasets``.
        image_folder: a folder with one folder of images per class, or with split folders
            (``train``, ``test``, ...) that hold them. Excludes ``dataset``.

    Raises:
        ValueError, FileNotFoundError: if it cannot be found, is not about classifying images, or is
            neither prepared nor can be downloaded.
    """
    if image_folder is not None:
        if dataset or data_dir:
            raise ValueError("give either an image folder or a dataset with its data dir, not both")
        return _open_image_folder(Path(image_folder).expanduser())
    if data_dir is not None:
        directory = Path(data_dir).expanduser()
        if not directory.is_dir() and dataset != "digits":
            raise FileNotFoundError(f"data dir {str(directory)!r} does not exist")
        if (directory / "features.json").is_file():
            builder = tfds.builder_from_directory(directory)
            return Source(builder, name=builder.name)
        data_dir = str(directory)
        dataset = dataset or _only_dataset_in(directory)
    return _open_tfds(dataset or "digits", data_dir)


def train_and_eval_splits(
    source: Source, train_split: str = _AUTO, eval_split: str = _AUTO
) -> tuple[Split, Split]:
    """The two splits to train and to evaluate on, which never share an image.

    ``auto`` takes ``train`` and the first there is of validation and test. Where there is none, 20
    % of each class is held out of the training split, always the same images.

    Raises:
        ValueError: if a split is unknown or empty, or the two overlap.
    """
    train = source.split(_first(source, TRAIN_SPLITS) if train_split == _AUTO else train_split)
    candidates = [name for name in EVAL_SPLITS if name in source.split_names]
    if eval_split != _AUTO:
        evaluation = source.split(eval_split)
    elif candidates:
        evaluation = source.split(candidates[0])
    else:
        evaluation = train.where(stratified_holdout(train.labels, HELD_OUT_SHARE))
        if not len(evaluation):
            raise ValueError(
                f"{source.name!r} has too few images to hold some out for evaluation: "
                f"{len(train)} in {len(source.class_names)} classes"
            )
        return train.without(evaluation), evaluation
    rest = train.without(evaluation)
    shared = len(train) - len(rest)
    if shared and train_split != _AUTO:
        raise ValueError(
            f"train split {train_split!r} and eval split {eval_split!r} share {shared} images; "
            "choose splits that do not overlap"
        )
    if not len(rest):
        raise ValueError(f"eval split {eval_split!r} leaves no images to train on")
    return rest, evaluation


def whole_eval_split(source: Source) -> Split:
    """What to evaluate a finished classifier on: validation or test, else all there is."""
    return source.split(_first(source, EVAL_SPLITS + TRAIN_SPLITS))


def stratified_holdout(labels: np.ndarray, share: float) -> np.ndarray:
    """Boolean ``[len(labels)]``: true for ``share`` of each class, always the same for the same
    labels.

    At least one example of each class that has two or more, none of a class that has only one.
    """
    generator = np.random.default_rng(0)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out[members[:count]] = True
    return held_out


def few_shot(split: Split, shots_per_class: int, seed: int) -> Split:
    """``shots_per_class`` examples of each class, chosen by the seed.

    Raises:
        ValueError: if a class has fewer.
    """
    generator = np.random.default_rng(seed)
    keep = np.zeros(len(split), bool)
    for label, name in enumerate(split.source.class_names):
        members = np.flatnonzero(split.labels == label)
        if len(members) < shots_per_class:
            raise ValueError(
                f"class {name!r} has {len(members)} training images; "
                f"{shots_per_class} per class were asked for"
            )
        keep[generator.choice(members, shots_per_class, replace=False)] = True
    return split.where(keep)


def _open_image_folder(folder: Path) -> Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} does not exist")
    folder = folder.resolve()
    splits = [path for path in folder.iterdir() if path.name in TRAIN_SPLITS + EVAL_SPLITS]
    if splits and any(child.is_dir() for path in splits for child in path.iterdir()):
        root, keep = folder, None
    else:
        # tfds wants root/split/class/image: show it the classes under a split named train.
        keep = tempfile.TemporaryDirectory(prefix="image-folder-")
        (Path(keep.name) / "train").symlink_to(folder, target_is_directory=True)
        root = Path(keep.name)
    builder = tfds.ImageFolder(str(root))
    builder.keep_alive = keep  # the link lives as long as the builder that reads through it
    if not sum(info.num_examples for info in builder.info.splits.values()):
        raise ValueError(
            f"image folder {str(folder)!r} has no images; expected one folder per class with .jpg, "
            ".jpeg or .png files: class/image.jpg, or train/class/image.jpg"
        )
    return Source(builder, name=folder.name, root=root if keep is None else root / "train")


def _open_tfds(name: str, data_dir: str | None) -> Source:
    import transfer.digits  # noqa: F401 - registers the embedded dataset with tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(_unknown_dataset(name)) from error
    if not _is_prepared(builder):
        if builder.name != "digits":
            _require_network(name, str(builder.data_dir))
        builder.download_and_prepare(file_format="tfrecord")
    return Source(builder, name=name)


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return bool(builder.info.splits) and Path(builder.data_dir).is_dir()


def _unknown_dataset(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name.split("/")[0], tfds.list_builders())
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"tfds knows no dataset {name!r}{hint} (for images of your own use an image folder)"


def _require_network(name: str, data_dir: str, timeout_s: float = 3.0) -> None:
    """Fail at once where tfds would retry for minutes."""
    reached: list[bool] = []

    def probe() -> None:
        try:
            urllib.request.urlopen("https://storage.googleapis.com", timeout=timeout_s).close()
        except urllib.error.HTTPError:
            pass  # an answer is an answer
        except OSError:
            return
        reached.append(True)

    # In a thread: the look-up of the host's name does not keep to the timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not reached:
        raise ValueError(
            f"dataset {name!r} is not prepared in {data_dir!r} and there is no network to download "
            f"it; run `tfds build {name}` where there is one, copy the directory and pass it as "
            "the data dir, or use an image folder"
        )


def _only_dataset_in(directory: Path) -> str:
    names = sorted(
        str(path.parent.parent.relative_to(directory))
        for depth in ("*/*", "*/*/*")
        for path in directory.glob(f"{depth}/features.json")
    )
    if len(names) == 1:
        return names[0]
    found = f"holds {len(names)} datasets ({', '.join(names)})" if names else "holds no dataset"
    raise ValueError(f"data dir {str(directory)!r} {found}; say which with a dataset name")


def _only_feature(features: tfds.features.FeaturesDict, kind: type, name: str) -> str:
    keys = [key for key, feature in features.items() if isinstance(feature, kind)]
    preferred = [key for key in keys if key in ("image", "label")]
    if len(keys) == 1 or preferred:
        return (preferred or keys)[0]
    raise ValueError(
        f"dataset {name!r} is not for image classification: expected one {kind.__name__} feature, "
        f"found {keys or 'none'} among {sorted(features)}"
    )


def _first(source: Source, candidates: tuple[str, ...]) -> str:
    for name in candidates:
        if name in source.split_names:
            return name
    raise ValueError(
        f"{source.name!r} has no split named {' or '.join(candidates)} but {source.split_names}; "
        "say which one to use"
    )


def _check_labels(split: Split) -> None:
    num_classes = len(split.source.class_names)
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{len(wrong)} labels of {split.source.name!r} are out of range: image "
            f"{split.names[first]} has label {split.labels[first]}; expected 0 to "
            f"{num_classes - 1} (a split without labels has -1)"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
