"""Sources of labelled images: tfds datasets, prepared tfds directories, image folders."""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import os
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow as tf

from transfer.data.dataset import EVAL_SPLITS, TRAIN_SPLITS, Source
from transfer.data.records import Records, open_records
from transfer.data.tfds import tfds
from transfer.images import image_files
from transfer.images.decoding import suffixes
from transfer.images.image_files import PassedOver, class_folders

logger = logging.getLogger(__name__)

_LABELS_TOGETHER = 1024  # batch size for reading labels; one by one, overhead dominates


def open_source(
    dataset: str = "", *, data_dir: str | None = None, image_folder: str | None = None
) -> Source:
    """Open a dataset, and prepare it with tfds if necessary. Logs which files of a folder are
    ignored.

    Args:
        dataset: a tfds name such as ``tf_flowers`` or ``cmaterdb/telugu:1.0.0``, or ``digits``
            (embedded, needs no network). Optional if ``data_dir`` holds a single dataset.
        data_dir: directory of tfds datasets, prepared or to be prepared; or the directory of one
            prepared dataset. Default: that of tfds, ``~/tensorflow_datasets``.
        image_folder: a folder with one subfolder of images per class, or with split folders
            (``train``, ``test``, ...) that contain such subfolders. Excludes ``dataset``.

    Raises:
        ValueError, FileNotFoundError: if it cannot be found, is not an image classification
            dataset, or is neither prepared nor can be downloaded.

    Example:
        >>> from transfer import open_source
        >>> source = open_source("digits")
        >>> source.class_names[:3]
        ['0', '1', '2']
        >>> train, held_out = source.train_and_eval_splits()
        >>> len(train), len(held_out)
        (1438, 359)
    """
    source = _open(dataset, data_dir, image_folder)
    origin = {
        "dataset": dataset or (None if image_folder or data_dir else "digits"),
        "data_dir": _absolute(data_dir),
        "image_folder": _absolute(image_folder),
    }
    for line in source.passed_over.describe():
        logger.warning(line)
    return replace(source, origin=origin)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _open(dataset: str, data_dir: str | None, image_folder: str | None) -> Source:
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


def _open_image_folder(folder: Path) -> Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} does not exist")
    folder = folder.resolve()
    passed_over = PassedOver()
    splits, by_class = _split_folders(folder, passed_over)
    class_names = sorted({name for classes in by_class.values() for name in classes})
    passed_over.empty_classes = sorted(
        {child.name for split in splits for child in class_folders(split)} - {*class_names}
    )
    passed_over.files = sorted(
        (os.path.relpath(name, folder), reason) for name, reason in passed_over.files
    )
    if len(class_names) < 2:
        raise ValueError(_too_few_classes(folder, class_names, passed_over))
    files = {
        "train" if split == folder else split.name: [
            (path, class_names.index(name)) for name, paths in classes.items() for path in paths
        ]
        for split, classes in by_class.items()
    }

    refused = {
        str(path.relative_to(folder)): reason
        for labelled in files.values()
        for path, _ in labelled
        if (reason := _refused(path))
    }

    def names(split_name: str) -> list[str]:
        return [str(path.relative_to(folder)) for path, _ in files[split_name]]

    @functools.cache
    def labels(split_name: str) -> np.ndarray:
        return np.array([label for _, label in files[split_name]], np.int64)

    @functools.cache
    def columns(split_name: str) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # File names are bytes: not all of them are UTF-8.
        paths = [
            os.fsencode(os.devnull if name in refused else path)
            for name, (path, _) in zip(names(split_name), files[split_name], strict=True)
        ]
        return (
            tf.constant(paths, tf.string),
            tf.constant([os.fsencode(name) for name in names(split_name)], tf.string),
            tf.constant(labels(split_name)),
        )

    def examples(split_name: str, positions: np.ndarray) -> tf.data.Dataset:
        # Positions instead of paths save memory: a path takes a hundred bytes per image and epoch.
        paths, names, labels = columns(split_name)
        return tf.data.Dataset.from_tensor_slices(positions).map(
            lambda position: {
                "image": tf.io.read_file(paths[position]),
                "label": labels[position],
                "name": names[position],
            },
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def ids(split_name: str) -> list[bytes]:
        return [_digest(str(path), *_state_of(path)) for path, _ in files[split_name]]

    sizes = {name: len(labelled) for name, labelled in files.items()}
    return Source(
        folder.name,
        class_names,
        sizes,
        examples,
        labels,
        names,
        ids,
        passed_over=passed_over,
        refused=refused,
    )


def _refused(path: Path) -> str:
    """Why a file must not be read (e.g. reading a pipe may never end); empty if it may be read."""
    try:
        image_files.check(path)
    except OSError:  # deleted in the meantime
        return ""
    except ValueError as error:
        return str(error)
    return ""


def _state_of(path: Path) -> tuple[int, ...]:
    """File size and times, which change with the content, without reading the file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(*words: object) -> bytes:
    return hashlib.blake2b(repr(words).encode(), digest_size=16).digest()


def _split_folders(
    folder: Path, passed_over: PassedOver
) -> tuple[list[Path], dict[Path, dict[str, list[Path]]]]:
    """The split folders, or the folder itself if it has none; and for each, the images by class."""
    children = class_folders(folder)
    splits = [child for child in children if child.name in TRAIN_SPLITS + EVAL_SPLITS]
    splits = [child for child in splits if any(map(_has_images, class_folders(child)))] or [folder]
    by_class = {
        split: {
            child.name: images
            for child in class_folders(split)
            if (images := _images(child, passed_over))
        }
        for split in splits
    }
    for split in {*splits, folder}:
        image_files.outside_classes(split, passed_over)
    if splits != [folder]:
        beside = (
            path for c in children if c not in splits for path in image_files.find(c, PassedOver())
        )
        passed_over.files += [(str(path), "outside the split folders") for path in beside]
    return splits, by_class


def _has_images(folder: Path) -> bool:
    return any(True for _ in image_files.find(folder, PassedOver()))


def _images(folder: Path, passed_over: PassedOver) -> list[Path]:
    """The images in a folder and its subfolders, in a fixed, shuffled order.

    Not sorted by name, because neighbours are often similar (frames of a video). Files that must
    not be read (pipes, devices, too large ones) are included, see ``_refused``.
    """
    images = []
    for path in image_files.find(folder, passed_over):
        try:
            image_files.check(path)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not path.is_dir():
                images.append(path)
                continue
            # Broken links, and folders that cannot be listed.
            reason = "a folder that cannot be listed" if path.is_dir() else "a link to nothing"
            passed_over.files.append((str(path), reason))
            passed_over.num_images -= not path.is_dir()
            continue
        images.append(path)
    return sorted(images, key=lambda path: hashlib.sha256(os.fsencode(path.name)).digest())


def _too_few_classes(folder: Path, class_names: list[str], passed_over: PassedOver) -> str:
    reasons = "".join(f"; {line}" for line in passed_over.describe())
    if class_names:
        return (
            f"image folder {str(folder)!r} has 1 class {class_names}; a classifier needs at least "
            f"2{reasons}"
        )
    return (
        f"image folder {str(folder)!r} has no images{reasons}; expected one folder per class with "
        f"{', '.join(sorted(suffixes()))} files: class/image.jpg, or train/class/image.jpg"
    )


def _open_tfds(name: str, data_dir: str | None) -> Source:
    import transfer.data.digits  # noqa: F401 - registers the embedded dataset with tfds

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
        shards = [(str(path), *_state_of(Path(path))) for path in info.filepaths]
        dataset = _digest(builder.info.full_name, shards)
        return [_digest(dataset, index) for index in range(sizes[split_name])]

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


def _prepared_directory(directory: Path) -> Path | None:
    """The directory of a prepared dataset, or of its newest version; ``None`` if it is not one."""
    prepared = [p.parent for p in directory.glob("features.json")]
    prepared += sorted(p.parent for p in directory.glob("*/features.json"))
    return prepared[-1] if prepared else None


def _only_dataset_in(directory: Path) -> str:
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
