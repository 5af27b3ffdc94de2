"""The images of a run: those to train and to evaluate on, and those of a finished run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from transfer.core import measurement
from transfer.core.files import read_names
from transfer.data.dataset import (
    MAX_COMPARED,
    Source,
    Split,
    is_automatic,
    train_and_eval_splits,
    training_split,
)
from transfer.data.sources import open_source
from transfer.runs import run_folder


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


def splits(
    source: Source,
    train_split: str,
    eval_split: str,
    *,
    skip_unreadable: int = 0,
    resumed: Path | None = None,
) -> tuple[Split, Split]:
    """``train_and_eval_splits`` with progress bars. A run that is resumed goes on with the images
    that it held out.

    Args:
        source: where the images are.
        train_split: a split expression, or ``auto``.
        eval_split: likewise.
        skip_unreadable: see ``train_and_eval_splits``.
        resumed: folder of the run that goes on, if any.

    Raises:
        ValueError: see ``train_and_eval_splits``.
    """
    max_compared = MAX_COMPARED
    if resumed is not None and is_automatic(source, eval_split):
        if (resumed / run_folder.HELD_OUT).is_file():
            names = {*held_out(resumed, source).names}
            train = training_split(source, train_split)
            if skip_unreadable:
                train = train.readable(skip_unreadable, _progress)
            is_held_out = np.array([name in names for name in train.names], bool)
            return train.where(~is_held_out), train.where(is_held_out)
        if (resumed / run_folder.CHECKPOINTS).is_dir():
            max_compared = 0  # by an earlier version of pretrain, which compared none
    return train_and_eval_splits(
        source,
        train_split,
        eval_split,
        skip_unreadable=skip_unreadable,
        max_compared=max_compared,
        progress=_progress,
    )


def is_of_run(folder: Path, source: Source) -> bool:
    """Whether these are the run's own images, whatever they were called when they were opened."""
    settings = run_folder.read_config(folder)
    if all(settings.get(name) == value for name, value in source.origin.items()):
        return True
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


def unreadable(*splits: Split) -> dict[str, Any]:
    """What metrics say of the images that ``Split.readable`` left out of the sources of splits."""
    names = {name: None for split in splits for name in split.source.unreadable}
    return {"count": len(names), "names": [*names]}


def some(split: Split, count: int) -> Split:
    """So many images of a split, evenly spread over it; all, where there are no more."""
    keep = np.zeros(len(split), bool)
    keep[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)] = True
    return split.where(keep)


def _progress(images: Iterable[Any]) -> Iterable[Any]:
    return measurement.progress(images, "images", "image")
