"""Image folders: one subfolder of images per class, perhaps within split folders."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from transfer.data.dataset import EVAL_SPLITS, TRAIN_SPLITS, Source
from transfer.data.labelled_files import labelled_files
from transfer.data.names import Names
from transfer.images import image_files
from transfer.images.decoding import suffixes
from transfer.images.image_files import PassedOver, class_folders


def open_image_folder(folder: Path) -> Source:
    """The images of a folder, labelled by the names of their folders; see ``open_source``.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it has fewer than two classes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} does not exist")
    folder = folder.resolve()
    passed_over = PassedOver()
    refused: dict[str, str] = {}
    splits, by_class = _split_folders(folder, passed_over, refused)
    class_names = sorted({name for classes in by_class.values() for name in classes})
    passed_over.empty_classes = sorted(
        {child.name for split in splits for child in class_folders(split)} - {*class_names}
    )
    passed_over.files = sorted(
        (os.path.relpath(name, folder), reason) for name, reason in passed_over.files
    )
    if len(class_names) < 2:
        raise ValueError(_too_few_classes(folder, class_names, passed_over))
    label_of = {name: label for label, name in enumerate(class_names)}
    start = len(os.path.join(folder, ""))
    files, labels = {}, {}
    for split, classes in by_class.items():
        split_name = "train" if split == folder else split.name
        files[split_name] = Names.of(path[start:] for paths in classes.values() for path in paths)
        labels[split_name] = np.repeat(
            np.array([label_of[name] for name in classes], np.int64),
            [len(paths) for paths in classes.values()],
        )
    return labelled_files(
        folder.name,
        class_names,
        folder,
        files,
        labels,
        passed_over=passed_over,
        refused={path[start:]: reason for path, reason in refused.items()},
    )


def _split_folders(
    folder: Path, passed_over: PassedOver, refused: dict[str, str]
) -> tuple[list[Path], dict[Path, dict[str, list[str]]]]:
    """The split folders, or the folder itself if it has none; and for each, the images by class."""
    children = class_folders(folder)
    splits = [child for child in children if child.name in TRAIN_SPLITS + EVAL_SPLITS]
    splits = [child for child in splits if any(map(_has_images, class_folders(child)))] or [folder]
    by_class = {
        split: {
            child.name: images
            for child in class_folders(split)
            if (images := _images(child, passed_over, refused))
        }
        for split in splits
    }
    for split in {*splits, folder}:
        image_files.outside_classes(split, passed_over)
    if splits != [folder]:
        beside = (
            path
            for child in children
            if child not in splits
            for path in image_files.find_names(child, PassedOver())
        )
        passed_over.files += [(path, "outside the split folders") for path in beside]
    return splits, by_class


def _has_images(folder: Path) -> bool:
    return any(True for _ in image_files.find_names(folder, PassedOver()))


def _images(folder: Path, passed_over: PassedOver, refused: dict[str, str]) -> list[str]:
    """The images in a folder and its subfolders, in a fixed, shuffled order.

    Not sorted by name, because neighbours are often similar (frames of a video). Files that must
    not be read (pipes, devices, too large ones: reading a pipe may never end) are included, and
    added to ``refused`` with the reasons. Takes one ``stat`` per file.
    """
    images = []
    for path in image_files.find_names(folder, passed_over):
        try:
            image_files.check(path)
        except (OSError, ValueError) as error:
            is_folder = os.path.isdir(path)
            if isinstance(error, OSError) or is_folder:
                # Broken links, and folders that cannot be listed.
                reason = "a folder that cannot be listed" if is_folder else "a link to nothing"
                passed_over.files.append((path, reason))
                passed_over.num_images -= not is_folder
                continue
            refused[path] = str(error)
        images.append(path)
    return sorted(images, key=_shuffling)


def _shuffling(path: str) -> bytes:
    return hashlib.sha256(os.fsencode(os.path.basename(path))).digest()


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
