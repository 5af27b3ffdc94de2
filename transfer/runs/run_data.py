"""The images of a run: its training and held-out splits, also of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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

_PLACES = ("dataset", "data_dir", "image_folder", "csv")
"""Arguments of ``open_source`` of which each opens data without the others."""


def open_data(folder: Path) -> Source:
    """Open the dataset, image folder or manifest of a run.

    Raises:
        FileNotFoundError, ValueError: if there is no run, its data no longer exist, or they came
            from a Python program.
    """
    settings = run_folder.read_config(folder)
    check_origin(folder, settings)
    return open_source(
        settings.get("dataset") or "",
        data_dir=settings.get("data_dir"),
        image_folder=settings.get("image_folder"),
        csv=settings.get("csv"),
        group_by=settings.get("group_by"),
    )


def check_origin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to open the images of a run whose configuration does not say where they are.

    Raises:
        ValueError: if the run was given a source that ``open_source`` did not open.
    """
    if not any(settings.get(name) for name in _PLACES):
        raise ValueError(
            f"the images of the run in {str(folder)!r} came from a Python program and cannot be "
            f"opened again: its {run_folder.CONFIG} names no dataset, image folder or manifest; "
            "evaluate or export its classifier in that program, or evaluate the run on other "
            "images: image_folder=DIR, csv=FILE or dataset=NAME"
        )


def held_out(folder: Path, source: Source) -> Split:
    """The held-out images of a run, by the names it recorded; images added later are ignored.

    Raises:
        ValueError: if some no longer exist, or their list cannot be read.
    """
    path = folder / run_folder.HELD_OUT
    names = set(read_names(path))
    if not names:
        raise ValueError(f"{str(path)!r} names no images; name a split or a dataset to evaluate on")
    # Without a split expression, which would check all labels: a test split may have none.
    positions = {
        part: np.flatnonzero([name in names for name in source.names(part)])
        for part in source.split_names
    }
    split = Split(source, tuple((part, at) for part, at in positions.items() if len(at)))
    missing = sorted(names - set(split.names))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images that the run held out are gone from "
            f"{source.name!r}, such as {missing[0]!r}; name a split or a dataset to evaluate on"
        )
    return split


def trained_on(folder: Path, source: Source) -> Split:
    """The images that a run took its training images from, without unreadable ones."""
    settings = run_folder.read_config(folder)
    # A run of ``fine_tune`` in Python has splits that it was given, not expressions.
    train = training_split(source, settings.get("train_split") or "auto")
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
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Split, Split]:
    """``train_and_eval_splits``, except that a resumed run keeps its held-out images.

    Args:
        source: the dataset.
        train_split: a split expression, or ``auto``.
        eval_split: a split expression, or ``auto``.
        skip_unreadable: see ``train_and_eval_splits``.
        resumed: folder of the run to resume, if any.
        progress: wraps the images that are decoded.

    Raises:
        ValueError: see ``train_and_eval_splits``.
    """
    max_compared = MAX_COMPARED
    if resumed is not None and is_automatic(source, eval_split):
        if (resumed / run_folder.HELD_OUT).is_file():
            names = {*held_out(resumed, source).names}
            train = training_split(source, train_split)
            if skip_unreadable:
                train = train.readable(skip_unreadable, progress)
            is_held_out = np.array([name in names for name in train.names], bool)
            return train.where(~is_held_out), train.where(is_held_out)
        if (resumed / run_folder.CHECKPOINTS).is_dir():
            max_compared = 0  # an earlier version of pretrain, which did not compare images
    return train_and_eval_splits(
        source,
        train_split,
        eval_split,
        skip_unreadable=skip_unreadable,
        max_compared=max_compared,
        progress=progress,
    )


def is_of_run(folder: Path, source: Source) -> bool:
    """Whether a source has the images of the run, even if it was opened under another path."""
    settings = run_folder.read_config(folder)
    if all(settings.get(name) == value for name, value in source.origin.items()):
        return True
    try:
        own = open_data(folder)
    except (OSError, ValueError):
        return False
    return own.sizes == source.sizes and all(
        np.array_equal(own.ids(part), source.ids(part)) for part in source.split_names
    )


def num_not_held_out(folder: Path, split: Split) -> int:
    """Number of images of a split of the run's own data that are not held-out images."""
    return len({*split.names} - {*read_names(folder / run_folder.HELD_OUT)})


def unreadable(*splits: Split) -> dict[str, Any]:
    """Entry ``unreadable`` of the metrics: the images that ``Split.readable`` left out."""
    names = {name: None for split in splits for name in split.source.unreadable}
    return {"count": len(names), "names": [*names]}


def some(split: Split, count: int) -> Split:
    """At most ``count`` images of a split, evenly spread over it."""
    keep = np.zeros(len(split), bool)
    keep[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)] = True
    return split.where(keep)
