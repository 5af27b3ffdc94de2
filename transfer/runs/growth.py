"""A finished run and images to add to it: its images and the new ones together, and how its classes
fare afterwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfer.core.files import read_names
from transfer.data.dataset import MAX_COMPARED, Source, Split
from transfer.data.joined import Member, join, unused_prefix
from transfer.runs import run_data, run_folder

logger = logging.getLogger(__name__)

_MAX_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Growth:
    """What a run takes from the run that images are added to.

    Args:
        run: folder of that run.
        class_names: its classes; the first ones of the new run.
        sources: the places of all images; see ``run_data.sources``.
        num_held_out: number of images that it held out; the first ones of the new run.
        num_added: number of new images to train on and to hold out.
        num_known: number of images that were given, and are already in the run.
    """

    run: Path
    class_names: list[str]
    sources: list[dict[str, Any]]
    num_held_out: int
    num_added: tuple[int, int]
    num_known: int

    def compare(
        self,
        class_names: Sequence[str],
        labels: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
    ) -> dict[str, Any]:
        """How the old classes fare on the images that the run held out, and the new ones on those
        of the new images.

        Args:
            class_names: classes of the new run.
            labels: int64 ``[num_held_out]``, of all held-out images.
            before: logits of the run's classifier, float32 ``[num_held_out, num_old_classes]``.
            after: logits of the new classifier, float32 ``[num_held_out, num_classes]``.

        Returns:
            ``old_classes``: ``num_examples``, ``accuracy_before``, ``accuracy_after`` (0..1), and
            ``classes``, a list with ``name``, ``num_examples``, ``recall_before`` and
            ``recall_after``. ``new_classes``: ``num_examples``, ``accuracy``, and ``classes`` with
            ``recall``. Values without images are ``None``.
        """
        is_old = np.arange(len(labels)) < self.num_held_out
        is_right = {"before": before.argmax(-1) == labels, "after": after.argmax(-1) == labels}
        num_old = len(self.class_names)
        old, new = [], []
        for label, name in enumerate(class_names):
            chosen = (labels == label) & (is_old if label < num_old else True)
            entry: dict[str, Any] = {"name": name, "num_examples": int(chosen.sum())}
            if label < num_old:
                entry |= {
                    f"recall_{when}": _mean(right[chosen]) for when, right in is_right.items()
                }
                old.append(entry)
            else:
                new.append(entry | {"recall": _mean(is_right["after"][chosen])})
        is_new_class = labels >= num_old
        return {
            "old_classes": {
                "num_examples": self.num_held_out,
                "accuracy_before": _mean(is_right["before"][is_old]),
                "accuracy_after": _mean(is_right["after"][is_old]),
                "classes": old,
            },
            "new_classes": {
                "num_examples": int(is_new_class.sum()),
                "accuracy": _mean(is_right["after"][is_new_class]),
                "classes": new,
            },
        }


def grown_splits(
    run: Path,
    train: Split,
    held_out: Split,
    remember: Callable[[Source], contextlib.AbstractContextManager[None]],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Split, Split, Growth]:
    """The images of a run together with new ones, as training and held-out images.

    Classes and images of the run come first, in their order; new classes follow in the order of the
    new source. Images that the run held out stay held out. New images that are already in the run,
    the same file or one with the same content, are left out, with the label that they have there.

    Args:
        run: folder of a finished run.
        train: new training images.
        held_out: new images to evaluate on.
        remember: keeps the fingerprints of a source; see ``transfer.activations.fingerprints``.
        progress: wraps the images that are decoded, if they were not yet.

    Raises:
        FileNotFoundError, ValueError: if there is no run, its images are gone or have changed, or
            no image is new.
    """
    run = run.resolve()
    class_names = read_names(run / run_folder.LABELS)
    own = run_data.members(run)
    own_train, own_held_out = run_data.joined_splits(run, own)
    source = train.source
    _check_source(train, held_out, own_train)
    with remember(own_train.source), remember(train.source):
        _check_unchanged(run, own_train, own_held_out, progress)
        known = _Known([own_train, own_held_out], [train, held_out], progress)
        new_train, new_held_out = known.without(train), known.without(held_out)
    num_known = len(train) + len(held_out) - len(new_train) - len(new_held_out)
    if not len(new_train) and len(new_held_out):
        logger.info(f"the {len(new_held_out)} new images are too few to hold some out")
        new_train, new_held_out = new_held_out, new_train
    if not len(new_train):
        raise ValueError(
            f"no image of {source.name!r} can be added to the run in {str(run)!r}: of "
            f"{len(train) + len(held_out)} images, {num_known} are already in it"
        )
    if num_known:
        logger.info(f"{num_known} images of {source.name!r} are already in the run")
    prefix = unused_prefix(source.name, [*own_train.names, *own_held_out.names])
    used = np.unique(np.concatenate([new_train.labels, new_held_out.labels]))
    added = [source.class_names[label] for label in used]
    names = [*class_names, *(name for name in added if name not in class_names)]
    # The members of the run, not the run as one: groups are known by the place of the images.
    members = [*own, Member(prefix, new_train, new_held_out)]
    joined_train, joined_held_out = join(members, names, {**source.origin, "add": str(run)})
    growth = Growth(
        run=run,
        class_names=class_names,
        sources=[*run_data.sources(run), {"prefix": prefix, **source.origin}],
        num_held_out=len(own_held_out),
        num_added=(len(new_train), len(new_held_out)),
        num_known=num_known,
    )
    return joined_train, joined_held_out, growth


class _Known:
    """The images of a run, to tell which others are among them: by their ids, and, if there are few
    enough to decode all, by the SHA-256 of their files."""

    def __init__(
        self,
        splits: Sequence[Split],
        others: Sequence[Split],
        progress: Callable[[Iterable[Any]], Iterable[Any]],
    ):
        self._progress = progress
        count = sum(map(len, [*splits, *others]))
        self._reads_files = count <= MAX_COMPARED
        if not self._reads_files:
            logger.warning(
                f"{count:,} images are more than the {MAX_COMPARED:,} whose contents are compared: "
                "copies of the run's images under other paths count as new, and held-out ones may "
                "be trained on"
            )
        self._class_of = {mark: name for split in splits for mark, name in self._marked(split)}

    def _marked(self, split: Split) -> list[tuple[bytes, str]]:
        """Ids and hashes of images, each with the name of the class."""
        classes = [split.source.class_names[label] for label in split.labels]
        marks = [[*map(bytes, split.ids)]]
        if self._reads_files:
            marks.append([*map(bytes, split.fingerprints(self._progress)["sha256"])])
        return [pair for some in marks for pair in zip(some, classes, strict=True)]

    def without(self, split: Split) -> Split:
        """The images of a split that are not known."""
        marked, is_new = self._marked(split), np.ones(len(split), bool)
        other_class = []
        for number, (mark, name) in enumerate(marked):
            if mark in self._class_of:
                position = number % len(split)
                is_new[position] = False
                if self._class_of[mark] != name:
                    other_class.append((split.names[position], self._class_of[mark]))
        if other_class:
            image, name = other_class[0]
            logger.warning(
                f"{len({image for image, _ in other_class})} images are already in the run with "
                f"another label, which they keep, such as {image} with {name!r}"
            )
        return split.where(is_new)


def _check_source(train: Split, held_out: Split, own: Split) -> None:
    """Refuse new images that could not be opened again, and say what is not known about them."""
    source = train.source
    if not any(source.origin.get(name) for name in run_data.PLACES):
        raise ValueError(
            f"the images of {source.name!r} came from a Python program, and a run with added "
            "images must be able to open them again; take them from open_source"
        )
    if held_out.source.origin != source.origin:
        raise ValueError(
            f"training images of {source.name!r} and held-out images of {held_out.source.name!r} "
            "are of two sources; add them one after the other"
        )
    if own.groups is not None and train.groups is None:
        logger.warning(
            f"the images of the run are in groups and those of {source.name!r} are not: images of "
            "a held-out group may be trained on; group_by says what groups them"
        )


def _check_unchanged(
    run: Path,
    train: Split,
    held_out: Split,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    """Refuse to add to other images than those that the run was trained and evaluated on."""
    recorded = run_folder.read_json(run / run_folder.PROVENANCE)["dataset"]
    of_files = recorded["sha256_of"] == "files and labels"
    splits = {"training": train, "held_out": held_out}
    changed = []
    for role, split in splits.items():
        if of_files:
            split.fingerprints(progress)
        now = run_data.digest(split, of_files=of_files)
        if now != recorded[role]:
            counts = f"{recorded[role]['images']} then, {now['images']} now"
            changed.append(f"the {role.replace('_', '-')} images ({counts})")
    if changed:
        raise ValueError(
            f"{' and '.join(changed)} of the run in {str(run)!r}, or their labels, are not those "
            f"that {run_folder.PROVENANCE} has hashes of, so that accuracies before and after "
            "could not be compared; start a new run on all images"
        )


def _mean(is_right: np.ndarray) -> float | None:
    return float(is_right.mean()) if len(is_right) else None


def describe_growth(growth: Mapping[str, Any]) -> Iterator[str]:
    """What was added to a run, and the accuracy of old and new classes, in lines.

    Args:
        growth: ``metrics["growth"]`` of the result of ``grow``.
    """
    images, old, new = growth["images"], growth["old_classes"], growth["new_classes"]
    known = f", {images['already_there']} were already there" if images["already_there"] else ""
    yield f"added {images['added']} images to {images['kept']} training images{known}"
    if old["num_examples"]:
        yield (
            f"old classes: accuracy {old['accuracy_before']:.4f} before, "
            f"{old['accuracy_after']:.4f} after, on the {old['num_examples']} images that "
            f"{growth['run']} held out"
        )
    tested = [entry for entry in old["classes"] if entry["num_examples"]]
    by_change = sorted(tested, key=lambda e: -abs(e["recall_after"] - e["recall_before"]))
    for entry in by_change[:_MAX_CLASSES_SHOWN]:
        yield (
            f"  {entry['name']}: {entry['recall_before']:.4f} before, {entry['recall_after']:.4f} "
            f"after, on {entry['num_examples']}"
        )
    if len(tested) > _MAX_CLASSES_SHOWN:
        yield f"  the other {len(tested) - _MAX_CLASSES_SHOWN} changed less; see metrics.json"
    if new["num_examples"]:
        yield f"new classes: accuracy {new['accuracy']:.4f} on {new['num_examples']} images"
    for entry in [entry for entry in new["classes"] if entry["num_examples"]][:_MAX_CLASSES_SHOWN]:
        yield f"  {entry['name']}: {entry['recall']:.4f} on {entry['num_examples']}"
