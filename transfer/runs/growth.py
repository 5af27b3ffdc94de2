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
from transfer.data.groups import connected
from transfer.data.joined import Member, join, unused_prefix
from transfer.data.near_duplicates import near_duplicates
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
    New images that look like copies of others in the run are on the same side as these; see
    ``_beside_copies``. Images of the run that are gone are left out, unless these are most of them.

    Args:
        run: folder of a finished run.
        train: new training images.
        held_out: new images to evaluate on.
        remember: keeps the fingerprints of a source; see ``transfer.activations.fingerprints``.
        progress: wraps the images that are decoded, if they were not yet.

    Raises:
        FileNotFoundError, ValueError: if there is no run, its images or most of them are gone or
            have changed, or no image is new.
    """
    run = run.resolve()
    class_names = read_names(run / run_folder.LABELS)
    gone: list[str] = []
    own = run_data.members(run, gone)
    own_train, own_held_out = run_data.joined_splits(run, own)
    source = train.source
    _check_source(train, held_out, own_train)
    with remember(own_train.source), remember(train.source):
        if gone:
            _check_gone(run, gone, own_train, own_held_out)
        else:
            _check_unchanged(run, own_train, own_held_out, progress)
        known = _Known([own_train, own_held_out], [train, held_out], progress)
        new_train, new_held_out = known.without(train), known.without(held_out)
        num_known = len(train) + len(held_out) - len(new_train) - len(new_held_out)
        if num_known:
            logger.info(f"{num_known} images of {source.name!r} are already in the run")
        if not len(new_train) and len(new_held_out):
            logger.info(f"the {len(new_held_out)} new images are too few to hold some out")
            new_train, new_held_out = new_held_out, new_train
        num_new = len(new_train) + len(new_held_out)
        if known.reads_files and num_new:
            new_train, new_held_out = _beside_copies(
                (own_train, own_held_out), (new_train, new_held_out), progress
            )
    if not len(new_train):
        copies = f", and {num_new} look like copies of images that it held out" if num_new else ""
        raise ValueError(
            f"no image of {source.name!r} can be added to the run in {str(run)!r}: of "
            f"{len(train) + len(held_out)} images, {num_known} are already in it{copies}"
        )
    _log_not_held_out(new_train, new_held_out)
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


def _beside_copies(
    own: tuple[Split, Split],
    new: tuple[Split, Split],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[Split, Split]:
    """The new images to train on and to hold out, where those that look like copies of images of
    the run, with the images of their group, are trained on or held out like these: else an image
    would be both trained and evaluated on. Those that look like copies of both are left out.

    Args:
        own: training and held-out images of the run.
        new: new images to train on and to hold out, none of which is in the run.
        progress: wraps the images that are decoded, if they were not yet.
    """
    prints = np.concatenate([split.fingerprints(progress) for split in (*own, *new)])
    num_trained, num_own = len(own[0]), len(own[0]) + len(own[1])
    groups = near_duplicates(prints)
    if new[0].groups is not None and new[1].groups is not None:
        singles = -1 - np.arange(num_own)
        groups = connected(np.concatenate([singles, new[0].groups, new[1].groups]), groups)
    like_trained, like_held_out = np.zeros((2, len(prints)), bool)
    for group in groups:
        members = np.array(group)
        like_trained[members] = (members < num_trained).any()
        like_held_out[members] = ((members >= num_trained) & (members < num_own)).any()
    like_trained, like_held_out = like_trained[num_own:], like_held_out[num_own:]
    if not (like_trained | like_held_out).any():
        return new
    name, is_left_out = new[0].source.name, like_trained & like_held_out
    if count := int((like_trained & ~is_left_out).sum()):
        logger.info(
            f"{count} images of {name!r} look like copies of training images of the run, and are "
            "trained on"
        )
    if count := int((like_held_out & ~is_left_out).sum()):
        logger.warning(
            f"{count} images of {name!r} look like copies of images that the run held out: they "
            "are held out, and not trained on"
        )
    if count := int(is_left_out.sum()):
        logger.warning(
            f"{count} images of {name!r} look like copies both of training images and of images "
            "that the run held out: they are left out"
        )
    is_held_out = np.arange(len(like_trained)) >= len(new[0])
    is_held_out = (is_held_out | like_held_out) & ~like_trained
    both = Split(new[0].source, (*new[0].parts, *new[1].parts))
    return both.where(~is_held_out & ~is_left_out), both.where(is_held_out)


def _log_not_held_out(train: Split, held_out: Split) -> None:
    """Say which classes have new images, none of which is held out."""
    labels = np.setdiff1d(train.labels, held_out.labels)
    if len(labels):
        names = [train.source.class_names[label] for label in labels[:5]]
        logger.info(
            f"{np.isin(train.labels, labels).sum()} new images of "
            f"{', '.join(map(repr, names))}{', ...' if len(labels) > 5 else ''} are trained on, "
            "and none is held out"
        )


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
        self.reads_files = count <= MAX_COMPARED
        if not self.reads_files:
            logger.warning(
                f"{count:,} images are more than the {MAX_COMPARED:,} whose contents are compared: "
                "copies of the run's images under other paths, the same files or re-encoded ones, "
                "count as new, and held-out ones may be trained on"
            )
        self._class_of = {mark: name for split in splits for mark, name in self._marked(split)}

    def _marked(self, split: Split) -> list[tuple[bytes, str]]:
        """Ids and hashes of images, each with the name of the class."""
        classes = [split.source.class_names[label] for label in split.labels]
        marks = [[*map(bytes, split.ids)]]
        if self.reads_files:
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


def _check_gone(run: Path, gone: Sequence[str], train: Split, held_out: Split) -> None:
    """Warn about images of a run that are gone; refuse to go on if these are most of them."""
    total = len(gone) + len(train) + len(held_out)
    found = (
        f"{len(gone)} of the {total} images of the run in {str(run)!r} are gone, such as "
        f"{', '.join(map(repr, gone[:3]))}"
    )
    if 2 * len(gone) > total:
        raise ValueError(f"{found}; move them back, or start a new run on all images")
    logger.warning(
        f"{found}; they are left out, accuracies before and after are those on the {len(held_out)} "
        "held-out images that are left, and whether the others have changed cannot be checked"
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
