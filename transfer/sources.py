"""Where labelled images come from: tfds datasets, prepared tfds directories, folders of images."""

from __future__ import annotations

import difflib
import hashlib
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from transfer.data import EVAL_SPLITS, TRAIN_SPLITS, Source

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# Examples in the order of the shards, so that position i is the one that tfds calls split[i].
_IN_ORDER = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)


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
    source = _open(dataset, data_dir, image_folder)
    origin = {
        "dataset": dataset or (None if image_folder or data_dir else "digits"),
        "data_dir": _absolute(data_dir),
        "image_folder": _absolute(image_folder),
    }
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

    def names(split_name: str) -> list[str]:
        return [str(path.relative_to(folder)) for path, _ in files[split_name]]

    def read(split_name: str) -> tf.data.Dataset:
        paths = [str(path) for path, _ in files[split_name]]
        labels = np.array([label for _, label in files[split_name]], np.int64)
        return tf.data.Dataset.from_tensor_slices((paths, names(split_name), labels)).map(
            lambda path, name, label: {
                "image": tf.io.read_file(path),
                "label": label,
                "name": name,
            },
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def ids(split_name: str) -> list[bytes]:
        return [_digest(str(path), *_state_of(path)) for path, _ in files[split_name]]

    sizes = {name: len(examples) for name, examples in files.items()}
    source = Source(folder.name, class_names, sizes, read, names, ids)
    for split_name, examples in files.items():
        source._labels[split_name] = np.array([label for _, label in examples], np.int64)
    return source


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file does, without reading it."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(*words: object) -> bytes:
    return hashlib.blake2b(repr(words).encode(), digest_size=16).digest()


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


def other_files(folder: Path) -> list[str]:
    """Files below a folder of images that are passed over, by their names: of kinds that TensorFlow
    does not decode, or no images at all. Those in the folder itself are nobody's images."""
    others = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() not in IMAGE_SUFFIXES and path.parent != folder and path.is_file()
    ]
    return sorted(
        str(path) for path in others if not any(part.startswith(".") for part in path.parts)
    )


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
        read,
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
