"""The images of a finished run: those it held out, and those it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from transfer.data import Source, Split, train_and_eval_splits
from transfer.runs import run_folder
from transfer.sources import open_source


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
        ValueError: if some are gone.
    """
    text = (folder / run_folder.HELD_OUT).read_text(encoding="utf-8")
    names = set(text.removesuffix("\n").split("\n"))
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
    train, _ = train_and_eval_splits(
        source, settings.get("train_split", "auto"), settings.get("eval_split", "auto")
    )
    return train.without(held_out(folder, source))


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
    text = (folder / run_folder.HELD_OUT).read_text(encoding="utf-8")
    return len({*split.names} - {*text.splitlines()})


def some(split: Split, count: int) -> Split:
    """So many images of a split, evenly spread over it; all, where there are no more."""
    keep = np.zeros(len(split), bool)
    keep[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)] = True
    return split.where(keep)
