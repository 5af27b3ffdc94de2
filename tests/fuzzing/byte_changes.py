"""Changes to files regardless of their format: bytes, and the type of file at a path."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
from common import GIANT, Generator


def _span(size: int, rng: Generator) -> tuple[int, int]:
    """A random range of bytes, whose length is uniform on a logarithmic scale."""
    start = int(rng.integers(size)) if size else 0
    return start, min(size, start + int(2 ** rng.uniform(0, max(np.log2(size or 1), 1))))


def truncated(content: bytes, rng: Generator, donor: bytes) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def head_lost(content: bytes, rng: Generator, donor: bytes) -> bytes:
    return content[int(rng.integers(len(content) + 1)) :]


def bits_flipped(content: bytes, rng: Generator, donor: bytes) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    if len(changed):
        count = int(2 ** rng.uniform(0, 10))
        np.bitwise_xor.at(
            changed,
            rng.integers(len(changed), size=count),
            np.uint8(1) << rng.integers(8, size=count, dtype=np.uint8),
        )
    return changed.tobytes()


def zeroed(content: bytes, rng: Generator, donor: bytes) -> bytes:
    start, end = _span(len(content), rng)
    return content[:start] + bytes(end - start) + content[end:]


def scrambled(content: bytes, rng: Generator, donor: bytes) -> bytes:
    start, end = _span(len(content), rng)
    return content[:start] + rng.bytes(end - start) + content[end:]


def duplicated(content: bytes, rng: Generator, donor: bytes) -> bytes:
    start, end = _span(len(content), rng)
    times = int(2 ** rng.uniform(0, 8)) if end - start < 4096 else 1
    return content[:end] + content[start:end] * times + content[end:]


def deleted(content: bytes, rng: Generator, donor: bytes) -> bytes:
    start, end = _span(len(content), rng)
    return content[:start] + content[end:]


def empty(content: bytes, rng: Generator, donor: bytes) -> bytes:
    return b""


def noise(content: bytes, rng: Generator, donor: bytes) -> bytes:
    return rng.bytes(int(2 ** rng.uniform(0, 20)))


def spliced(content: bytes, rng: Generator, donor: bytes) -> bytes:
    cut, start = int(rng.integers(len(content) + 1)), int(rng.integers(len(donor) + 1))
    return content[:cut] + donor[start:]


def swapped(content: bytes, rng: Generator, donor: bytes) -> bytes:
    return donor


def lfs_pointer(content: bytes, rng: Generator, donor: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%064x\nsize %d\n" % (
        zlib.crc32(content),
        len(content),
    )


_OFTEN = (truncated, bits_flipped, scrambled, deleted)


_LESS_OFTEN = (head_lost, zeroed, duplicated, spliced)


BYTES = _OFTEN * 3 + _LESS_OFTEN * 2 + (empty, noise, swapped, lfs_pointer)


def is_missing(path: Path, rng: Generator) -> None:
    path.unlink()


def is_a_folder(path: Path, rng: Generator) -> None:
    path.unlink()
    path.mkdir()


def is_a_pipe(path: Path, rng: Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def is_a_device(path: Path, rng: Generator) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def is_a_link_to_itself(path: Path, rng: Generator) -> None:
    path.unlink()
    path.symlink_to(path.name)


def is_giant(path: Path, rng: Generator) -> None:
    """A sparse file of 8 GB."""
    with path.open("r+b") as file:
        if rng.random() < 0.5:
            file.truncate(0)
        file.truncate(GIANT)


_KINDS_OF_FILE = (is_missing, is_a_folder, is_a_pipe, is_a_device, is_a_link_to_itself)


PLACES = (*_KINDS_OF_FILE, is_giant, is_giant)
