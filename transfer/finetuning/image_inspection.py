"""Inspection of a run's images before training: classes, readability, leaks and near-duplicates."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.activations.fingerprints import remembered
from transfer.core import measurement
from transfer.data import data_checks
from transfer.data.copies import keep_together
from transfer.data.dataset import MAX_COMPARED, Split
from transfer.data.groups import describe_shared
from transfer.data.near_duplicates import near_duplicates
from transfer.data.unreadable import UnreadableImageError, find_unreadable
from transfer.finetuning.options import FineTuneOptions
from transfer.runs import run_data

logger = logging.getLogger(__name__)

_AT_SECOND_ATTEMPT = "was read at the second attempt only; run the command again"


@dataclass(frozen=True)
class Inspected:
    """``train`` are the training images, with near-duplicates in one group; ``fingerprint``
    identifies training and held-out images; ``num_leaks`` is the number of held-out images that are
    also trained on, as far as they were compared; ``seconds`` is the time that this took."""

    train: Split
    fingerprint: dict[str, Any]
    num_leaks: int
    seconds: float


@contextlib.contextmanager
def remembered_images(options: FineTuneOptions, train: Split, held_out: Split) -> Iterator[None]:
    """If the cache is on disk, also cache fingerprints of images there."""
    with contextlib.ExitStack() as stack:
        if options.cache == "disk":
            for source in {id(split.source): split.source for split in (train, held_out)}.values():
                stack.enter_context(remembered(source, options.cache_dir))
        yield


def inspect_images(
    train: Split, held_out: Split, options: FineTuneOptions, *, verbose: int
) -> Inspected:
    """Warn about classes without images, and about training images among the held-out ones: also
    near-duplicates, if there are few enough images to decode all.

    Raises:
        UnreadableImageError: if some of them cannot be decoded.
    """
    start = time.perf_counter()
    lines = data_checks.describe_balance(train.source.class_names, train.labels, held_out.labels)
    shared = describe_shared(train.groups, held_out.groups, held_out.names)
    count = len(train) + len(held_out)
    is_other = train is not held_out  # unless the caller validates on the training images
    if count > MAX_COMPARED:
        leaks = data_checks.Leaks(int(np.isin(held_out.ids, train.ids).sum()) if is_other else 0)
        lines.append(
            f"{count:,} images are more than the {MAX_COMPARED:,} that are compared before "
            "training, so near-duplicates may be both trained and evaluated on; vgg-transfer "
            "check-data compares any number"
        )
    else:
        with remembered_images(options, train, held_out):
            prints, of_held_out = _fingerprints([train, held_out], verbose)
        leaks = data_checks.find_leaks(prints, of_held_out) if is_other else data_checks.Leaks()
        if copies := near_duplicates(prints):
            logger.info(
                f"{sum(map(len, copies))} of the {len(train)} training images are near-duplicates "
                "of others; a cross-validation leaves them out together"
            )
            train = keep_together(train, copies)
    lines += [f"{line}; vgg-transfer check-data lists them" for line in leaks.describe()]
    for line in lines + shared:
        logger.warning(line)
    return Inspected(
        train,
        run_data.digests(train, held_out),
        leaks.num_identical + leaks.num_near,
        time.perf_counter() - start,
    )


def _fingerprints(splits: list[Split], verbose: int) -> list[np.ndarray]:
    show = (lambda it: measurement.progress(it, "images", "image")) if verbose else iter
    prints = [split.fingerprints(show) for split in splits]
    reasons: dict[str, str] = {}
    for split, of_split in zip(splits, prints, strict=True):
        unreadable = split.where(~of_split["readable"])
        if len(unreadable):
            found = find_unreadable(unreadable)
            reasons |= {name: found.get(name, _AT_SECOND_ATTEMPT) for name in unreadable.names}
    if reasons:
        raise UnreadableImageError(reasons)
    return prints
