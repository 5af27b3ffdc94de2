"""Checks that the files of a list exist, by listing their folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transfer.images import image_files


def check_files(root: Path, names: pa.Array) -> tuple[np.ndarray, dict[int, str]]:
    """Positions of the files that do not exist, and of those that must not be read, with reasons.

    A file is asked for only if the list of its folder does not show it as a regular file: links,
    pipes, and names that the file system spells differently.

    Args:
        root: folder of relative names.
        names: ``pa.LargeBinaryArray`` of paths.
    """
    folders = pc.replace_substring_regex(names, "[^/]*$", "").dictionary_encode()
    of_folder = folders.indices.to_numpy()
    order = np.argsort(of_folder, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(of_folder[order])) + 1)
    missing: list[int] = []
    refused: dict[int, str] = {}
    for positions in parts if len(order) else ():
        folder = os.path.join(
            os.fsencode(root), folders.dictionary[of_folder[positions[0]]].as_py()
        )
        try:
            regular = _regular_files(folder)
        except (FileNotFoundError, NotADirectoryError):
            missing += positions.tolist()
            continue
        except OSError:  # a folder that must not be listed may have files that can be read
            regular = set()
        for position, name in zip(
            positions.tolist(), names.take(positions).to_pylist(), strict=True
        ):
            if name.rpartition(b"/")[2] in regular:
                continue
            try:
                image_files.check(Path(os.fsdecode(folder), os.fsdecode(name.rpartition(b"/")[2])))
            except OSError:
                missing.append(position)
            except ValueError as error:
                refused[position] = str(error)
    return np.array(sorted(missing), np.int64), refused


def _regular_files(folder: bytes) -> set[bytes]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
