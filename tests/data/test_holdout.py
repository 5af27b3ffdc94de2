"""Selections that must never change: runs of earlier versions held these images out."""

import hashlib

import numpy as np
import pytest

from transfer.data.dataset import Source, few_shot
from transfer.data.holdout import by_hash, stratified_holdout
from transfer.data.names import Names


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.fixture
def drawn():
    """Labels, names and groups of 3,000 images; some classes have one or two."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 7, 3000)
    labels[:3] = [9, 9, 8]
    names = [f"c{label}/é{number:05}.jpg" for number, label in enumerate(labels)]
    ends = np.cumsum(generator.integers(2, 6, 300))
    groups = np.split(generator.permutation(3000)[: ends[-1]], ends[:-1])
    return labels, names, [group.tolist() for group in groups], generator


def test_holdout_of_earlier_versions(drawn):
    labels, names, groups, _ = drawn
    assert digest(stratified_holdout(labels, names, 0.2)) == "e6baf8f29adb5322"
    assert digest(stratified_holdout(labels, Names.of(names), 0.2)) == "e6baf8f29adb5322"
    assert digest(stratified_holdout(labels, names, 0.2, groups)) == "ab40bc10edc05e6e"
    assert digest(stratified_holdout(labels, names, 0.5)) == "f31ee0f99ecaec2c"


def test_subsets_of_earlier_versions(drawn):
    labels = drawn[-1].integers(0, 11, 5000).astype(np.int64)
    source = Source(
        "quiz",
        [str(number) for number in range(11)],
        {"train": 5000},
        None,
        lambda part: labels,
        lambda part: [str(number) for number in range(5000)],
        None,
    )
    split = source.split("train[500:]")
    assert digest(few_shot(split, 7, 3).parts[0][1]) == "23a69fb17123ae1f"
    assert digest(few_shot(split, 20, 4).parts[0][1]) == "bcdd012fcb841418"
    rest = split.without(source.split("train[1000:3000]"))
    assert digest(rest.parts[0][1]) == "774a6c63d436ecae"


def test_order_is_that_of_the_hashes(drawn):
    names = drawn[1]
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    assert by_hash(names).tolist() == sorted(range(len(names)), key=hashes.__getitem__)
