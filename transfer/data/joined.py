"""Splits of several sources as one source: the images of a run, and those that are added to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.data.dataset import Source, Split
from transfer.data.names import Names

TRAIN, HELD_OUT = "train", "test"
"""Names of the splits of a joined source, which ``Source.train_and_eval_splits`` takes."""


@dataclass(frozen=True)
class Member:
    """The images of one source among those that are joined.

    ``prefix`` and a slash are put before their names, so that these differ from the names of other
    members; nothing if it is empty.
    """

    prefix: str
    train: Split
    held_out: Split

    @property
    def source(self) -> Source:
        return self.train.source

    def named(self, split: Split) -> Sequence[str]:
        """The names of examples in the joined source."""
        if not self.prefix:
            return split.names
        return Names.of(f"{self.prefix}/{name}" for name in split.names)


def join(
    members: Sequence[Member], class_names: Sequence[str], origin: Mapping[str, Any] | None = None
) -> tuple[Split, Split]:
    """Training and held-out images of several sources as the splits ``train`` and ``test`` of one.

    The examples are in the order of the members. Their ids and fingerprints are those of the
    sources that they come from, and so are the activations that were cached for them.

    Args:
        members: the images of each source; a member may be of a joined source.
        class_names: names in the order of the labels, with the classes of all examples.
        origin: ``Source.origin`` of the result.

    Example:
        >>> from transfer import open_source
        >>> from transfer.data.joined import Member, join
        >>> source = open_source("digits")
        >>> first = Member("", source.split("train[:100]"), source.split("test[:20]"))
        >>> second = Member("more", source.split("train[100:150]"), source.split("test[20:30]"))
        >>> train, held_out = join([first, second], source.class_names)
        >>> len(train), len(held_out), train.names[0], held_out.names[20]
        (150, 30, 'train/0', 'more/test/20')
    """
    parts = {
        TRAIN: [(member, member.train) for member in members],
        HELD_OUT: [(member, member.held_out) for member in members],
    }

    @functools.cache
    def labels(name: str) -> np.ndarray:
        return _concatenated([_labels(split, class_names) for _, split in parts[name]], np.int64)

    @functools.cache
    def names(name: str) -> Names:
        return Names.of(text for member, split in parts[name] for text in member.named(split))

    def ids(name: str) -> np.ndarray:
        return _concatenated([split.ids for _, split in parts[name]], "S16")

    def examples(name: str, positions: np.ndarray) -> tf.data.Dataset:
        splits = [split for _, split in parts[name]]
        ends = np.cumsum([len(split) for split in splits])
        part_of = np.searchsorted(ends, positions, side="right")
        used = np.unique(part_of) if len(positions) else np.zeros(1, int)
        datasets = [
            splits[p].examples(positions[part_of == p] - (ends[p] - len(splits[p]))).map(_with_own)
            for p in used
        ]
        choices = np.searchsorted(used, part_of)  # each part is read in its own order
        images = tf.data.Dataset.choose_from_datasets(
            datasets, tf.data.Dataset.from_tensor_slices(choices), stop_on_empty_dataset=False
        )
        named = tf.constant([*names(name)[positions].encoded()], tf.string)
        own = tf.data.Dataset.from_tensor_slices((labels(name)[positions], named))
        return tf.data.Dataset.zip(images, own).map(
            lambda example, own: example | {"label": own[0], "name": own[1]}
        )

    return _splits(
        Source(
            "+".join(member.source.name for member in members),
            [*class_names],
            {name: sum(len(split) for _, split in splits) for name, splits in parts.items()},
            examples,
            labels,
            names,
            ids,
            origin=origin or {},
            refused=_renamed(members, lambda source: source.refused),
            groups=_groups(parts),
            unreadable=_renamed(members, lambda source: source.unreadable),
            members={
                name: [part for _, split in splits for part in split.of_members()]
                for name, splits in parts.items()
            },
        )
    )


def unused_prefix(wanted: str, names: Sequence[str]) -> str:
    """A prefix for the names of a member with which none of the names begins: the one that is
    wanted, or with a number."""
    taken = {name.partition("/")[0] for name in names}
    number = 1
    prefix = wanted.replace("/", "-")
    while prefix in taken:
        number += 1
        prefix = f"{wanted.replace('/', '-')}-{number}"
    return prefix


def _with_own(example: dict[str, Any]) -> dict[str, Any]:
    """An example with its name in its own source, also if this one joins others."""
    return example | {"own_name": example.get("own_name", example["name"])}


def _splits(source: Source) -> tuple[Split, Split]:
    train, held_out = (
        Split(source, ((name, np.arange(source.sizes[name])),)) for name in (TRAIN, HELD_OUT)
    )
    return train, held_out


def _labels(split: Split, class_names: Sequence[str]) -> np.ndarray:
    """The labels of a split as positions in ``class_names``, int64."""
    position = {name: number for number, name in enumerate(class_names)}
    return np.array([position.get(name, -1) for name in split.source.class_names])[split.labels]


def _groups(
    parts: Mapping[str, Sequence[tuple[Member, Split]]],
) -> Callable[[str], np.ndarray] | None:
    """Group numbers that differ between members, unless they are of the same images: these number
    their groups alike. The images of a member without groups are a group each."""
    if all(split.groups is None for splits in parts.values() for _, split in splits):
        return None
    everywhere = [pair for splits in parts.values() for pair in splits]
    sizes: dict[str, int] = {}
    for member, split in everywhere:
        if (of := split.source.groups) is not None:
            highest = max(int(of(name).max(initial=-1)) for name in split.source.sizes)
            sizes[_key(member)] = max(sizes.get(_key(member), 0), highest + 1)
    firsts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    free = sum(sizes.values())
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    for name, splits in parts.items():
        for member, split in splits:
            if split.groups is None:
                numbers[name].append(np.arange(free, free + len(split)))
                free += len(split)
            else:
                numbers[name].append(firsts[_key(member)] + split.groups)
    return {name: _concatenated(arrays, np.int64) for name, arrays in numbers.items()}.__getitem__


def _key(member: Member) -> str:
    """Equal for members with images of the same place."""
    return repr(sorted(member.source.origin.items())) if member.source.origin else repr(id(member))


def _renamed(
    members: Sequence[Member], of: Callable[[Source], Mapping[str, str]]
) -> dict[str, str]:
    """Maps names in the joined source to the reasons that the sources of the members give."""
    return {
        f"{member.prefix}/{name}" if member.prefix else name: why
        for member in members
        for name, why in of(member.source).items()
    }


def _concatenated(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])
