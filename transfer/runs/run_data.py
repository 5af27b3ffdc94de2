"""The images of a run: its training and held-out splits, also of a finished run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer.core.files import read_names
from transfer.data.dataset import (
    MAX_COMPARED,
    Source,
    Split,
    few_shot,
    is_automatic,
    train_and_eval_splits,
    training_split,
)
from transfer.data.joined import Member, join
from transfer.data.sources import open_source
from transfer.runs import run_folder

PLACES = ("dataset", "data_dir", "image_folder", "csv")
"""Arguments of ``open_source`` of which each opens data without the others."""
_ORIGIN = (*PLACES, "group_by")
"""The arguments of ``open_source`` in ``config.yaml``."""


def open_data(folder: Path) -> Source:
    """Open the dataset, image folder or manifest of a run; for one that ``grow`` made, all of them
    as one source, whose splits are the training and the held-out images.

    Raises:
        FileNotFoundError, ValueError: if there is no run, its data no longer exist, or they came
            from a Python program.
    """
    if is_grown(folder):
        return joined_splits(folder)[0].source
    settings = run_folder.read_config(folder)
    check_origin(folder, settings)
    return open_own(folder, settings)


def is_grown(folder: Path) -> bool:
    """Whether a run was made by ``grow``, so that its images come from several places."""
    return (folder / run_folder.SOURCES).is_file()


def open_place(origin: Mapping[str, Any], min_classes: int = 2) -> Source:
    """``open_source`` for arguments that ``config.yaml`` or ``sources.json`` has."""
    return open_source(
        origin.get("dataset") or "",
        data_dir=origin.get("data_dir"),
        image_folder=origin.get("image_folder"),
        csv=origin.get("csv"),
        group_by=origin.get("group_by"),
        min_classes=min_classes,
    )


def open_own(
    folder: Path, origin: Mapping[str, Any], min_classes: int = 2, hint: str = ""
) -> Source:
    """``open_place`` for images of a run.

    Raises:
        FileNotFoundError: if they are no longer there; says what to do, and ``hint``.
    """
    try:
        return open_place(origin, min_classes)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the images of the run in {str(folder)!r} are no longer where they were: {error}; "
            f"move them back, or put a link to their new place there (ln -s NEW OLD){hint}"
        ) from error


def sources(folder: Path) -> list[dict[str, Any]]:
    """The places of the images of a run: arguments of ``open_source``, and the ``prefix`` of names
    as in ``transfer.data.joined.Member``."""
    if is_grown(folder):
        return [*run_folder.read_json(folder / run_folder.SOURCES)["sources"]]
    settings = run_folder.read_config(folder)
    return [{"prefix": ""} | {name: settings.get(name) for name in _ORIGIN}]


def joined_splits(folder: Path, parts: Sequence[Member] | None = None) -> tuple[Split, Split]:
    """The images that a run was trained on and those that it held out, labelled as in the run,
    whatever was added to their folders since.

    Args:
        folder: folder of the run.
        parts: from ``members``, if they are open already.

    Raises:
        FileNotFoundError, ValueError: if some no longer exist; names the first of them.
    """
    joined = members(folder) if parts is None else parts
    settings = run_folder.read_config(folder)
    origin = {
        name: settings.get(name) for name in (*_ORIGIN, *(["add"] if len(joined) > 1 else []))
    }
    return join(joined, read_names(folder / run_folder.LABELS), origin)


def members(folder: Path, gone: list[str] | None = None) -> list[Member]:
    """The images of a run by the places that they come from.

    Args:
        folder: folder of the run.
        gone: takes the names of images that no longer exist, which are then left out. ``None``
            refuses them.

    Raises:
        FileNotFoundError, ValueError: see ``joined_splits``.
    """
    origins = sources(folder)
    prefixes = [origin["prefix"] for origin in origins]
    trained = _by_prefix(folder / run_folder.TRAINING, prefixes)
    held = _by_prefix(folder / run_folder.HELD_OUT, prefixes)
    found = []
    for origin in origins:
        check_origin(folder, origin)
        prefix = origin["prefix"]
        source = open_own(folder, origin, min_classes=1)
        if trained is None:
            train = _drawn(folder, source)
        else:
            train = _named(source, trained[prefix], "was trained on", gone=gone)
        held_out = _named(source, (held or {}).get(prefix, []), "held out", gone=gone)
        found.append(Member(prefix, train, held_out))
    return found


def _by_prefix(path: Path, prefixes: Sequence[str]) -> dict[str, list[str]] | None:
    """The names in a file, as the sources of their prefixes have them; ``None`` without a file."""
    if not path.is_file():
        return None
    names: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name in read_names(path):
        first, _, rest = name.partition("/")
        if first and first in names:
            names[first].append(rest)
        else:
            names[""].append(name)
    return names


def _drawn(folder: Path, source: Source) -> Split:
    """The training images of a run that did not list them."""
    settings, split = run_folder.read_config(folder), trained_on(folder, source)
    shots = settings.get("shots_per_class")
    return split if shots is None else few_shot(split, shots, settings["seed"])


def digest(split: Split, *, of_files: bool) -> dict[str, Any]:
    """The number of images of a split, and a hash of their files, or else of their names, with
    their labels, for ``provenance.json``."""
    if of_files:
        marks = [*map(bytes, split.fingerprints()["sha256"])]
    else:
        marks = [os.fsencode(name) for name in split.names]
    sha256 = hashlib.sha256(b"\0".join(marks) + split.labels.tobytes())
    return {"images": len(split), "sha256": sha256.hexdigest()}


def digests(
    train: Split, held_out: Split, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, Any]:
    """``digest`` of the training and the held-out images, of their files if there are few enough;
    ``progress`` wraps the images that are decoded for it."""
    of_files = len(train) + len(held_out) <= MAX_COMPARED
    if of_files:
        for split in (train, held_out):
            split.fingerprints(progress)  # they are kept
    return {
        "sha256_of": f"{'files' if of_files else 'names'} and labels",
        "training": digest(train, of_files=of_files),
        "held_out": digest(held_out, of_files=of_files),
    }


def check_origin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to open the images of a run whose configuration does not say where they are.

    Raises:
        ValueError: if the run was given a source that ``open_source`` did not open.
    """
    if not any(settings.get(name) for name in PLACES):
        raise ValueError(
            f"the images of the run in {str(folder)!r} came from a Python program and cannot be "
            f"opened again: its {run_folder.CONFIG} names no dataset, image folder or manifest; "
            "evaluate or export its classifier in that program, or evaluate the run on other "
            "images: image_folder=DIR, csv=FILE or dataset=NAME"
        )


def held_out(folder: Path, source: Source, gone: list[str] | None = None) -> Split:
    """The held-out images of a run, by the names it recorded; images added later are ignored.

    Args:
        folder: folder of the run.
        source: its images.
        gone: see ``members``.

    Raises:
        ValueError: if some no longer exist, or their list cannot be read.
    """
    path = folder / run_folder.HELD_OUT
    names = read_names(path)
    if not names:
        raise ValueError(f"{str(path)!r} names no images; name a split or a dataset to evaluate on")
    return _named(source, names, "held out", "; name a split or a dataset to evaluate on", gone)


def _named(
    source: Source,
    names: Sequence[str],
    role: str,
    hint: str = "",
    gone: list[str] | None = None,
) -> Split:
    """The images of these names, in their order."""
    place = {name: number for number, name in enumerate(names)}
    # Without a split expression, which would check all labels: a test split may have none.
    places = [
        np.array([place.get(name, -1) for name in source.names(part)], np.int64)
        for part in source.split_names
    ]
    rows = [np.flatnonzero(numbers >= 0) for numbers in places]
    row = np.concatenate([np.zeros(0, np.int64), *rows])
    part_of = np.repeat(np.arange(len(rows)), [len(found) for found in rows])
    wanted = [numbers[found] for numbers, found in zip(places, rows, strict=True)]
    order = np.argsort(np.concatenate([np.zeros(0, np.int64), *wanted]), kind="stable")
    row, part_of = row[order], part_of[order]
    ends = np.flatnonzero(np.diff(part_of)) + 1
    parts = zip(np.split(part_of, ends), np.split(row, ends), strict=True)
    split = Split(source, tuple((source.split_names[part[0]], at) for part, at in parts if len(at)))
    missing = sorted(place.keys() - set(split.names))
    if missing and gone is None:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images that the run {role} are gone from "
            f"{source.name!r}, such as {', '.join(map(repr, missing[:3]))}{hint}"
        )
    if gone is not None:
        gone += missing
    return split


def trained_on(folder: Path, source: Source, gone: list[str] | None = None) -> Split:
    """The images that a run took its training images from, without unreadable ones; for ``gone``,
    see ``held_out``."""
    settings = run_folder.read_config(folder)
    # A run of ``fine_tune`` in Python has splits that it was given, not expressions; those of a run
    # that images were added to are of these images.
    expression = None if is_grown(folder) else settings.get("train_split")
    train = training_split(source, expression or "auto")
    rest = train.without(held_out(folder, source, gone))
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
    allow_no_eval: bool = False,
    resumed: Path | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Split, Split]:
    """``train_and_eval_splits``, except that a resumed run keeps its held-out images.

    Args:
        source: the dataset.
        train_split: a split expression, or ``auto``.
        eval_split: a split expression, or ``auto``.
        skip_unreadable: see ``train_and_eval_splits``.
        allow_no_eval: see ``train_and_eval_splits``.
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
        allow_no_eval=allow_no_eval,
        progress=progress,
    )


def is_of_run(folder: Path, source: Source) -> bool:
    """Whether a source has the images of the run, even if it was opened under another path."""
    settings = run_folder.read_config(folder)
    is_same = all(settings.get(name) == value for name, value in source.origin.items())
    if source.origin and is_same and is_grown(folder) == ("add" in source.origin):
        return True
    try:
        own = open_data(folder)
    except FileNotFoundError:
        return _were_moved_to(folder, source)
    except (OSError, ValueError):
        return False
    return own.sizes == source.sizes and all(
        np.array_equal(own.ids(part), source.ids(part)) for part in source.split_names
    )


def _were_moved_to(folder: Path, source: Source) -> bool:
    """Whether a source has the images of a run, by the names and hashes that the run recorded."""
    names = [folder / name for name in (run_folder.TRAINING, run_folder.HELD_OUT)]
    provenance = folder / run_folder.PROVENANCE
    is_recorded = all(path.is_file() for path in (*names, provenance))
    if is_grown(folder) or not is_recorded:
        return False
    if source.class_names != read_names(folder / run_folder.LABELS):
        return False
    recorded = run_folder.read_json(provenance).get("dataset", {})
    try:
        train, held = (_named(source, read_names(path), "had") for path in names)
        of_files = recorded["sha256_of"] == "files and labels"
        return all(
            digest(split, of_files=of_files) == recorded[role]
            for role, split in (("training", train), ("held_out", held))
        )
    except (KeyError, ValueError):  # other names, or a run of an earlier version
        return False


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
