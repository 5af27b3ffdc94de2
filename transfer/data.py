"""Labelled images from tfds datasets, prepared tfds directories and folders of images, all alike.

Data contract: a ``Source`` knows the class names and the splits. A ``Split`` is a selection of its
examples in a fixed order, with the labels in memory and the images still encoded (JPEG, PNG, ...).
``Split.batches`` decodes and preprocesses them: float32 ``[batch, size, size, channels]`` and int64
``[batch]`` labels.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from transfer.augment import random_view
from transfer.preprocess import Preprocess

HELD_OUT_SHARE = 0.2  # of a dataset that comes with nothing but a training split
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test", "testing")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
SHUFFLE_BUFFER = 16_384  # encoded images; up to this many, a shuffle is perfect
_AUTO = "auto"
# Examples in the order of the shards, so that position i is the one that tfds calls split[i].
_IN_ORDER = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)


@dataclass(frozen=True)
class Source:
    """One dataset.

    Args:
        name: for people.
        class_names: in the order of the labels.
        sizes: split's name to the number of its examples.
        read: split's name to its examples in a fixed order: ``{"image": encoded bytes, "label":
            int64, "name": str}``.

    Raises:
        ValueError: if there are fewer than two classes.
    """

    name: str
    class_names: list[str]
    sizes: Mapping[str, int]
    read: Callable[[str], tf.data.Dataset]
    _labels: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(
                f"dataset {self.name!r} has {len(self.class_names)} class {self.class_names}; "
                "a classifier needs at least 2"
            )

    @property
    def split_names(self) -> list[str]:
        return list(self.sizes)

    def split(self, expression: str) -> Split:
        """The examples that a tfds split expression names: ``train``, ``train[:80%]``, ``a+b``.

        Raises:
            ValueError: if the expression or the split is unknown, selects nothing, or has a label
                that is not the number of a class.
        """
        infos = tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
                for name, size in self.sizes.items()
            ]
        )
        try:
            parts = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
        except (ValueError, KeyError, AssertionError) as error:
            raise ValueError(
                f"cannot take split {expression!r} of {self.name!r} ({_one_line(error)}); "
                f"its splits are {self.split_names}; slices are written like 'train[:80%]'"
            ) from error
        split = Split(
            self,
            tuple(
                (part.splitname, np.arange(self.sizes[part.splitname])[part.from_ : part.to])
                for part in parts
            ),
        )
        if not len(split):
            raise ValueError(f"split {expression!r} of {self.name!r} has no images")
        _check_labels(split)
        return split

    def labels(self, split_name: str) -> np.ndarray:
        """int64, one per example of a split; read once."""
        if split_name not in self._labels:
            labels = self.read(split_name).map(lambda example: example["label"])
            self._labels[split_name] = np.fromiter(labels.as_numpy_iterator(), np.int64)
        return self._labels[split_name]

    def examples(self, split_name: str, indices: np.ndarray) -> tf.data.Dataset:
        """The examples of a split at sorted positions, still encoded."""
        first, last = int(indices[0]), int(indices[-1])
        wanted = np.zeros(last - first + 1, bool)
        wanted[indices - first] = True
        wanted = tf.constant(wanted)
        examples = self.read(split_name).skip(first).take(last - first + 1).enumerate()
        return examples.filter(lambda index, _: wanted[index]).map(lambda _, example: example)


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
            [self.source.labels(name)[indices] for name, indices in self.parts if len(indices)]
            or [np.zeros(0, np.int64)]
        )

    @functools.cached_property
    def names(self) -> list[str]:
        """A name per example: its file, or ``split/index``."""
        names = self.encoded().map(lambda example: example["name"]).as_numpy_iterator()
        return [name.decode() for name in names]

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
        datasets = [self.source.examples(name, idx) for name, idx in self.parts if len(idx)]
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
            unreadable.append(example["name"].numpy().decode())
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
        if prepared := _prepared_directory(directory):
            builder = tfds.builder_from_directory(prepared)
            if dataset.split("/")[0].split(":")[0] not in ("", builder.name):
                raise ValueError(
                    f"data dir {str(directory)!r} is that of the dataset {builder.name!r}, "
                    f"not of {dataset!r}"
                )
            return _from_builder(builder, dataset or builder.name)
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
        evaluation = train.where(stratified_holdout(train.labels, train.names, HELD_OUT_SHARE))
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


def stratified_holdout(labels: np.ndarray, names: Sequence[str], share: float) -> np.ndarray:
    """Boolean ``[len(labels)]``: true for ``share`` of each class.

    Which ones follows from a hash of their names, so that a few images more or less change little.
    At least one example of each class that has two or more, none of a class that has only one.
    """
    digests = np.array([hashlib.sha256(name.encode()).hexdigest() for name in names])
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(digests[members])]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out[members[:count]] = True
    return held_out


def few_shot(split: Split, shots_per_class: int, seed: int) -> Split:
    """``shots_per_class`` examples of each class, chosen by the seed.

    Raises:
        ValueError: if a class has fewer, or none are asked for.
    """
    if shots_per_class < 1:
        raise ValueError(f"shots per class must be at least 1, got {shots_per_class}")
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
    splits = [child for child in _folders(folder) if child.name in TRAIN_SPLITS + EVAL_SPLITS]
    splits = [child for child in splits if any(_images(c) for c in _folders(child))] or [folder]
    by_class = {
        split: {child.name: images for child in _folders(split) if (images := _images(child))}
        for split in splits
    }
    class_names = sorted({name for classes in by_class.values() for name in classes})
    if not class_names:
        raise ValueError(
            f"image folder {str(folder)!r} has no images; expected one folder per class with "
            f"{', '.join(IMAGE_SUFFIXES)} files: class/image.jpg, or train/class/image.jpg"
        )
    files = {
        "train" if split == folder else split.name: [
            (path, class_names.index(name)) for name, paths in classes.items() for path in paths
        ]
        for split, classes in by_class.items()
    }

    def read(split_name: str) -> tf.data.Dataset:
        paths = [str(path) for path, _ in files[split_name]]
        names = [str(path.relative_to(folder)) for path, _ in files[split_name]]
        labels = np.array([label for _, label in files[split_name]], np.int64)
        return tf.data.Dataset.from_tensor_slices((paths, names, labels)).map(
            lambda path, name, label: {
                "image": tf.io.read_file(path),
                "label": label,
                "name": name,
            },
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    source = Source(
        folder.name, class_names, {name: len(examples) for name, examples in files.items()}, read
    )
    for split_name, examples in files.items():
        source._labels[split_name] = np.array([label for _, label in examples], np.int64)
    return source


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones and the litter of macOS."""
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".") and child.name != "__MACOSX"
    )


def _images(folder: Path) -> list[Path]:
    """The images in a folder and below, by their suffix, shuffled the same way each time.

    Not in the order of their names: neighbours there are often alike (frames of a film).
    """
    images = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(images, key=lambda path: hashlib.sha256(path.name.encode()).digest())


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
    return _from_builder(builder, name)


def _from_builder(builder: tfds.core.DatasetBuilder, name: str) -> Source:
    features = builder.info.features
    image_key = _only_feature(features, tfds.features.Image, name)
    label_key = _only_feature(features, tfds.features.ClassLabel, name)

    def read(split_name: str) -> tf.data.Dataset:
        examples = builder.as_dataset(
            split=split_name,
            decoders={image_key: tfds.decode.SkipDecoding()},
            read_config=_IN_ORDER,
            shuffle_files=False,
        )
        return examples.enumerate().map(
            lambda index, example: {
                "image": example[image_key],
                "label": example[label_key],
                "name": tf.strings.join([split_name, tf.strings.as_string(index)], "/"),
            }
        )

    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    return Source(name, list(features[label_key].names or ()), sizes, read)


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return bool(builder.info.splits) and Path(builder.data_dir).is_dir()


def _unknown_dataset(name: str) -> str:
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


def _prepared_directory(directory: Path) -> Path | None:
    """The directory itself, or its newest version, if it is that of one prepared dataset."""
    found = [p.parent for p in directory.glob("features.json")]
    found += sorted(p.parent for p in directory.glob("*/features.json"))
    return found[-1] if found else None


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
