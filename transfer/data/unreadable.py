"""Images that cannot be decoded, with the reasons."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import tensorflow as tf

from transfer.images.decoding import read_image

_READERS = 4  # threads; decoding releases the GIL


class EncodedImages(Protocol):
    """Interface of ``transfer.data.dataset.Split``."""

    @property
    def source(self) -> Any: ...

    def encoded(self) -> tf.data.Dataset: ...


class UnreadableImageError(ValueError):
    """Some images cannot be decoded; ``reasons`` maps their names to the reasons."""

    def __init__(self, reasons: Mapping[str, str]):
        self.reasons = dict(reasons)
        shown = [f"{name!r} ({reason})" for name, reason in itertools.islice(reasons.items(), 5)]
        more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        images = "1 image" if len(reasons) == 1 else f"{len(reasons)} images"
        super().__init__(
            f"{images} cannot be decoded: {', '.join(shown)}{more}; repair or remove them"
        )


def find_unreadable(
    split: EncodedImages, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, str]:
    """Decode every image once, on several threads; maps the names of unreadable ones to reasons."""
    examples = iter(progress(split.encoded().prefetch(_READERS).as_numpy_iterator()))
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        while chunk := list(itertools.islice(examples, 8 * _READERS)):
            unreadable.update(filter(None, pool.map(check_readable, chunk)))
    return {name: split.source.refused.get(name, why) for name, why in unreadable.items()}


def check_readable(example: dict[str, Any]) -> tuple[str, str] | None:
    """Name and reason if an image cannot be decoded, else ``None``."""
    try:
        read_image(example["image"])
    except ValueError as error:
        return os.fsdecode(example["name"]), str(error)
    return None
