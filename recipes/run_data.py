"""The images of a run: those to train and to evaluate on, and those of a finished run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes import measure, run_folder
from transfer.data import (
    MAX_COMPARED,
    Source,
    Split,
    UnreadableImageError,
    find_unreadable,
    is_automatic,
    train_and_eval_splits,
    training_split,
)
from transfer.files import read_names
from transfer.sources import open_source


def open_and_warn(dataset: str | None, *, data_dir: str | None, image_folder: str | None) -> Source:
    """``open_source``, with a warning of the files of a folder that are passed over."""
    source = open_source(dataset or "", data_dir=data_dir, image_folder=image_folder)
    for line in source.passed_over.describe():
        print(f"warning: {line}", file=sys.stderr)
    return source


def open_data(folder: Path) -> Source:
    """The dataset or folder of images of a run.

    Raises:
        FileNotFoundError, ValueError: if there is no run, or its data are gone.
    """
    settings = run_folder.read_config(folder)
    return open_source(
        settings.get("dataset") or "",
        data_dir=settings.get("data_dir"),
        image_folder=settings.get("image_folder"),
    )


def held_out(folder: Path, source: Source) -> Split:
    """The images whose names the run wrote down, whatever has come or gone since.

    Raises:
        ValueError: if some are gone, or their list cannot be read.
    """
    path = folder / run_folder.HELD_OUT
    names = set(read_names(path))
    if not names:
        raise ValueError(f"{str(path)!r} names no images; name a split or a dataset to evaluate on")
    # Not by a split expression, which checks all labels: those of a test split may be unknown.
    positions = {
        part: np.flatnonzero([name in names for name in source.names(part)])
        for part in source.split_names
    }
    split = Split(source, tuple((part, found) for part, found in positions.items() if len(found)))
    missing = sorted(names - set(split.names))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images that the run held out are gone from "
            f"{source.name!r}, such as {missing[0]!r}; name a split or a dataset to evaluate on"
        )
    return split


def trained_on(folder: Path, source: Source) -> Split:
    """The images that the run took its training images from."""
    settings = run_folder.read_config(folder)
    train = training_split(source, settings["train_split"])
    rest = train.without(held_out(folder, source))
    path = folder / run_folder.METRICS
    metrics = run_folder.read_json(path) if path.is_file() else {}
    left_out = set(metrics.get("unreadable", {}).get("names", ()))
    return rest.where(np.array([name not in left_out for name in rest.names], bool))


def splits(source: Source, config: Any) -> tuple[Split, Split]:
    """The images to train and to evaluate on, by the flags of a verb. A run that is resumed goes on
    with the images that it held out.

    Raises:
        ValueError: see ``train_and_eval_splits``.
    """
    max_compared = MAX_COMPARED
    if getattr(config, "resume", False) and is_automatic(source, config.eval_split):
        if (config.out / run_folder.HELD_OUT).is_file():
            names = {*held_out(config.out, source).names}
            train = training_split(source, config.train_split)
            is_held_out = np.array([name in names for name in train.names], bool)
            return train.where(~is_held_out), train.where(is_held_out)
        if (config.out / run_folder.CHECKPOINTS).is_dir():
            max_compared = (
                0  # by an earlier version of pretrain, which wrote down and compared none
            )
    return train_and_eval_splits(
        source,
        config.train_split,
        config.eval_split,
        max_compared=max_compared,
        progress=lambda images: measure.progress(images, "images"),
    )


def is_of_run(folder: Path, source: Source) -> bool:
    """Whether these are the run's own images, whatever they were called when they were opened."""
    try:
        own = open_data(folder)
    except (OSError, ValueError):
        return False
    return own.sizes == source.sizes and all(
        own.ids(part) == source.ids(part) for part in source.split_names
    )


def num_not_held_out(folder: Path, split: Split) -> int:
    """How many images of a split of the run's own data it may have been trained on."""
    return len({*split.names} - {*read_names(folder / run_folder.HELD_OUT)})


def without_unreadable(splits: Sequence[Split], limit: int) -> tuple[list[Split], dict[str, str]]:
    """Splits without the images that cannot be decoded, and these with the reasons; all images are
    decoded once.

    Raises:
        UnreadableImageError: if there are more than ``limit``.
    """
    unreadable: dict[str, str] = {}
    for split in splits:
        unreadable |= find_unreadable(split, lambda it: measure.progress(it, "check", "image"))
    if len(unreadable) > limit:
        raise UnreadableImageError(unreadable)
    kept = [split.where(np.array([n not in unreadable for n in split.names])) for split in splits]
    if not all(map(len, kept)):
        raise ValueError("no image is left of a split without those that cannot be decoded")
    return kept, unreadable


@contextlib.contextmanager
def skip_suggested() -> Iterator[None]:
    """Errors about images that cannot be decoded name the flag that leaves these out."""
    try:
        yield
    except UnreadableImageError as error:
        raise ValueError(f"{error}, or leave them out with --skip-unreadable N") from error


def report_unreadable(unreadable: Mapping[str, str]) -> dict[str, Any]:
    """List the images that were left out, on standard error; returns what ``metrics.json`` says of
    them."""
    for name, reason in unreadable.items():
        print(f"warning: {name} was left out: {reason}", file=sys.stderr)
    return {"count": len(unreadable), "names": list(unreadable)}


def some(split: Split, count: int) -> Split:
    """So many images of a split, evenly spread over it; all, where there are no more."""
    keep = np.zeros(len(split), bool)
    keep[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)] = True
    return split.where(keep)
