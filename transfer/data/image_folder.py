"""Image folders: one subfolder of images per class, perhaps within split folders."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transfer.data import folder_index
from transfer.data.dataset import EVAL_SPLITS, TRAIN_SPLITS, Source
from transfer.data.folder_index import Listing
from transfer.data.labelled_files import labelled_files
from transfer.data.names import Names
from transfer.images import image_files
from transfer.images.decoding import suffixes
from transfer.images.image_files import PassedOver, class_folders

_UNLISTED, _BROKEN = "a folder that cannot be listed", "a link to nothing"


def open_image_folder(folder: Path, min_classes: int = 2) -> Source:
    """The images of a folder, labelled by the names of their folders; see ``open_source``.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it has fewer than ``min_classes`` classes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} does not exist")
    folder = folder.resolve()
    listing = folder_index.remembered(folder, functools.partial(_list, folder))
    if len(listing.class_names) < min_classes:
        raise ValueError(_too_few_classes(folder, listing.class_names, listing.passed_over))
    class_labels = np.arange(len(listing.class_names))
    return labelled_files(
        folder.name,
        listing.class_names,
        folder,
        listing.files,
        {split: np.repeat(class_labels, counts) for split, counts in listing.counts.items()},
        passed_over=listing.passed_over,
        refused=listing.refused,
    )


@dataclass
class _Search:
    """What is found beside the images while a folder is listed.

    ``refused`` maps files that must not be read to the reasons, ``folders`` the folders that were
    searched to their states before, and ``is_lasting`` tells whether these determine what is found:
    they do not if there are links.
    """

    passed_over: PassedOver = field(default_factory=PassedOver)
    refused: dict[str, str] = field(default_factory=dict)
    folders: dict[str, os.stat_result] = field(default_factory=dict)
    is_lasting: bool = True

    def begin(self, folder: str) -> None:
        """Note the state of a folder that is about to be searched."""
        if folder not in self.folders:
            try:
                self.folders[folder] = os.stat(folder)
            except OSError:
                self.is_lasting = False


def _list(folder: Path) -> Listing:
    search = _Search()
    by_class = _split_folders(folder, search)
    class_names = sorted({name for classes in by_class.values() for name in classes})
    passed_over = search.passed_over
    passed_over.empty_classes = sorted(
        {child.name for split in by_class for child in class_folders(split)} - {*class_names}
    )
    passed_over.files = sorted(
        (os.path.relpath(name, folder), reason) for name, reason in passed_over.files
    )
    start = len(os.path.join(folder, ""))
    files, counts = {}, {}
    for split, classes in by_class.items():
        split_name = "train" if split == folder else split.name
        files[split_name] = Names.of(
            path[start:] for name in class_names for path in classes.get(name, ())
        )
        counts[split_name] = np.array(
            [len(classes.get(name, ())) for name in class_names], np.int64
        )
    uncertain = {_UNLISTED, _BROKEN, image_files.LINK_TO_FOLDER}
    return Listing(
        class_names,
        files,
        counts,
        passed_over,
        {path[start:]: reason for path, reason in search.refused.items()},
        search.folders,
        is_lasting=search.is_lasting
        and uncertain.isdisjoint(reason for _, reason in passed_over.files),
    )


def _split_folders(folder: Path, search: _Search) -> dict[Path, dict[str, list[str]]]:
    """The split folders, or the folder itself if it has none: for each, the images by class."""
    search.begin(os.fspath(folder))
    children = class_folders(folder)
    for child in children:
        search.begin(os.fspath(child))
    splits = [child for child in children if child.name in TRAIN_SPLITS + EVAL_SPLITS]
    splits = [child for child in splits if any(map(_has_images, class_folders(child)))] or [folder]
    by_class = {
        split: {
            child.name: images
            for child in class_folders(split)
            if (images := _images(child, search))
        }
        for split in splits
    }
    for parent in {*splits, folder}:
        image_files.outside_classes(parent, search.passed_over)
        with os.scandir(parent) as entries:  # a link to nothing may become one to a class folder
            if any(e.is_symlink() and not e.is_dir() for e in entries):
                search.is_lasting = False
    if splits != [folder]:
        ignored = PassedOver()
        beside = (
            path
            for child in children
            if child not in splits
            for path in image_files.find_names(child, ignored, listed=search.begin)
        )
        search.passed_over.files += [(path, "outside the split folders") for path in beside]
        # A folder of another split may be a link to a class whose images are still to come.
        if any(reason == image_files.LINK_TO_FOLDER for _, reason in ignored.files):
            search.is_lasting = False
    return by_class


def _has_images(folder: Path) -> bool:
    return any(True for _ in image_files.find_names(folder, PassedOver()))


def _images(folder: Path, search: _Search) -> list[str]:
    """The images in a folder and its subfolders, in a fixed, shuffled order.

    Not sorted by name, because neighbours are often similar (frames of a video). Files that must
    not be read (pipes, devices, too large ones: reading a pipe may never end) are included, and
    added to ``search.refused`` with the reasons. Takes one ``stat`` per file.
    """
    images, passed_over = [], search.passed_over
    for path in image_files.find_names(folder, passed_over, listed=search.begin):
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                search.is_lasting = False
                status = os.stat(path)
            image_files.checked(status)
        except (OSError, ValueError) as error:
            is_folder = os.path.isdir(path)
            if isinstance(error, OSError) or is_folder:
                passed_over.files.append((path, _UNLISTED if is_folder else _BROKEN))
                passed_over.num_images -= not is_folder
                continue
            search.refused[path] = str(error)
        images.append(path)
    return sorted(images, key=_shuffling)


def _shuffling(path: str) -> tuple[bytes, str]:
    """By the hash of the name; files of the same name by path, as folders are in no order."""
    return hashlib.sha256(os.fsencode(os.path.basename(path))).digest(), path


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
