"""The images of a finished run: those it held out, and those it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes import run_folder
from transfer.data import Source, Split
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
    everything = source.split("+".join(source.split_names))
    split = everything.where(np.array([name in names for name in everything.names]))
    missing = sorted(names - set(split.names))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images that the run held out are gone from "
            f"{source.name!r}, such as {missing[0]!r}; name a split or a dataset to evaluate on"
        )
    return split


def some(split: Split, count: int) -> Split:
    """So many images of a split, evenly spread over it; all, where there are no more."""
    keep = np.zeros(len(split), bool)
    keep[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)] = True
    return split.where(keep)
