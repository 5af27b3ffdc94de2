"""Index of an image folder, on disk: names and labels of its images, about 40 bytes per image.

The second opening of a large folder reads it instead of listing the folder. It is used only if
every folder in it has the times that it had when it was listed: they change whenever an entry is
added, removed or renamed. A file that is changed in place does not change its folder; its id, by
which caches know it, is computed from its own size and times whenever it is needed.

An index is written only if it can be trusted: for file systems that keep the times of folders, if
no folder was changed just before it was listed, and if no link or unusual file has a part in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transfer.data import index_files
from transfer.data.index_files import Index
from transfer.data.labelled_files import digest
from transfer.data.names import Names
from transfer.images.decoding import suffixes
from transfer.images.image_files import PassedOver

_LAYOUT = 2  # version of the file layout, and of the order of the images; part of the name
_MIN_IMAGES = 10_000  # of a folder that is remembered; fewer are listed in a moment
# Seconds after which a later change surely has another time: of local file systems, and of others,
# where the clock may be that of another machine. btrfs is absent, because its device numbers
# cannot be found in the table of mounts.
_SETTLED_S = {
    **dict.fromkeys(("ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"), 5),
    **dict.fromkeys(("ceph", "gpfs", "lustre", "nfs", "nfs4"), 120),
}
_MOUNTS = Path("/proc/self/mountinfo")  # Linux only: elsewhere, folders are not remembered


@dataclass
class Listing:
    """The images of a folder.

    Args:
        class_names: in the order of the labels.
        files: maps the name of a split to its files, relative to the folder, class after class.
        counts: maps the name of a split to the number of its files of each class, int64
            ``[num_classes]``.
        passed_over: the other files.
        refused: maps names of files that must not be read to the reasons.
        folders: all folders that were listed, with their states before.
        is_lasting: whether the folders determine the rest: no links, no files with problems.
    """

    class_names: list[str]
    files: Mapping[str, Names]
    counts: Mapping[str, np.ndarray]
    passed_over: PassedOver
    refused: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, os.stat_result] = field(default_factory=dict)
    is_lasting: bool = False


def remembered(folder: Path, make: Callable[[], Listing], directory: Path | None = None) -> Listing:
    """The listing of a folder: from disk, or else made, and written to disk if it can be trusted.

    Args:
        folder: an absolute path without links.
        make: lists the folder.
        directory: of the indexes. Default: ``index_files.default_directory("folder")``.
    """

    def made() -> tuple[Listing, Index | None]:
        start_ns = time.time_ns()
        listing = make()
        return listing, _index(listing, start_ns)

    where = directory or index_files.default_directory("folder")
    # Which files are images depends on the installed decoders.
    path = where / f"{digest(_LAYOUT, os.fspath(folder), sorted(suffixes())).hex()}.npz"
    return index_files.remembered(path, _listing, made, os.fspath(folder))


def _index(listing: Listing, start_ns: int) -> Index | None:
    """The arrays of a listing that was begun at ``start_ns``; ``None`` if it cannot be trusted."""
    num_images = sum(map(len, listing.files.values()))
    if num_images < _MIN_IMAGES or not listing.is_lasting or listing.refused:
        return None
    statuses = listing.folders.values()
    settled_s = _settled_s({status.st_dev for status in statuses})
    latest_ns = max(max(status.st_mtime_ns, status.st_ctime_ns) for status in statuses)
    if settled_s is None or latest_ns > start_ns - settled_s * 10**9:
        return None
    skipped = listing.passed_over
    text = {
        "class_names": listing.class_names,
        "splits": [*listing.files],
        "folders": [*listing.folders],
        "skipped": skipped.files,
        "num_images": skipped.num_images,
        "empty_classes": skipped.empty_classes,
    }
    index: Index = {
        "text": np.frombuffer(json.dumps(text).encode(), np.uint8),
        "states": np.array([_state(status) for status in statuses], np.int64),
    }
    for number, (split, names) in enumerate(listing.files.items()):
        index[f"names {number}"] = np.frombuffer(names.data, np.uint8)
        index[f"lengths {number}"] = names.lengths
        index[f"counts {number}"] = listing.counts[split]
    return index


def _listing(index: Index) -> Listing | None:
    """The listing of an index; ``None`` if its folders have changed."""
    try:
        text = json.loads(index["text"].tobytes())
        states = [_state(os.stat(name)) for name in text["folders"]]
        if index["states"].tolist() != states:
            return None
        files, counts = {}, {}
        for number, split in enumerate(text["splits"]):
            lengths = index[f"lengths {number}"]
            data = index[f"names {number}"].tobytes()
            files[split] = Names(data, np.cumsum(lengths) - lengths, lengths)
            counts[split] = index[f"counts {number}"]
            if (lengths.sum(), counts[split].sum()) != (len(data), len(lengths)):
                return None
        skipped = [(name, reason) for name, reason in text["skipped"]]
        passed_over = PassedOver(skipped, text["num_images"], text["empty_classes"])
        return Listing(text["class_names"], files, counts, passed_over)
    except (OSError, KeyError, ValueError):  # folders that are gone, another layout
        return None


def _state(status: os.stat_result) -> list[int]:
    """What changes with the entries of a folder, or if another one takes its place."""
    return [status.st_ino % 2**63, status.st_mtime_ns, status.st_ctime_ns]


def _settled_s(devices: Iterable[int]) -> int | None:
    """How old the last change of a folder on these devices must be, in seconds, for its times to
    tell whether it is changed again; ``None`` if they do not tell."""
    try:
        lines = _MOUNTS.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    type_of = {}
    for line in lines:  # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
        mount, _, system = line.partition(" - ")
        type_of[mount.split()[2]] = system.split()[0]
    types = [type_of.get(f"{os.major(device)}:{os.minor(device)}") for device in devices]
    settled = [_SETTLED_S.get(name or "") for name in types]
    return None if None in settled else max(s for s in settled if s is not None)
