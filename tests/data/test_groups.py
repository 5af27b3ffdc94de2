from __future__ import annotations

import numpy as np
import pytest

from transfer.data.groups import connected, describe_shared, groups_by_pattern
from transfer.data.holdout import stratified_holdout
from transfer.training.folds import stratified_folds


def test_group_is_first_parentheses_or_whole_match(caplog: pytest.LogCaptureFixture) -> None:
    names = {"train": ["a/p1_0.jpg", "b/p2_0.jpg", "b/p1_1.jpg"], "test": ["a/p2_7.jpg"]}
    for pattern in (r"p(\d)_", r"p\d"):
        groups = groups_by_pattern(pattern, names)
        assert groups["train"].tolist() == [0, 1, 0]
        assert groups["test"].tolist() == [1], "the same number in all splits"
    assert not caplog.records


def test_names_that_do_not_match_are_groups_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    names = {"train": ["p1/a", "x", "p1/b", "y"], "test": ["x"]}
    groups = groups_by_pattern("p(.)/", names)
    assert groups["train"].tolist() == [0, 1, 0, 2] and groups["test"].tolist() == [3]
    assert "group_by=p(.)/ does not match 3 of 5 names, such as 'x'" in caplog.text


def test_whole_match_is_the_group_where_parentheses_take_no_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = {"train": ["p1/a", "case7/a", "case7/b", "p1/b", "case8/a"]}
    groups = groups_by_pattern(r"p(\d)|case\d", names)
    assert groups["train"].tolist() == [0, 1, 1, 0, 2]
    assert not caplog.records


@pytest.mark.parametrize(
    ("pattern", "message"), [("p(", "not a regular expression"), ("q", "matches no name")]
)
def test_pattern_that_cannot_group_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups_by_pattern(pattern, {"train": ["p1", "p2"]})


def test_groups_and_near_duplicates_are_connected() -> None:
    groups = np.array([5, 5, 9, 3, 9, 4, 7])
    assert connected(groups, []) == [[0, 1], [2, 4]]
    assert connected(groups, [[1, 2], [5, 6]]) == [[0, 1, 2, 4], [5, 6]]
    assert connected(np.arange(4), [[0, 3], [3, 1]]) == [[0, 1, 3]]


@pytest.mark.parametrize("seed", range(30))
def test_no_group_is_on_both_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, num_classes = int(rng.integers(20, 300)), int(rng.integers(2, 6))
    labels = rng.integers(0, num_classes, count)
    groups = rng.integers(0, int(rng.integers(2, count)), count)
    copies = [rng.choice(count, 2, replace=False).tolist() for _ in range(int(rng.integers(0, 5)))]
    names = [f"{rng.integers(10**9)}.jpg" for _ in range(count)]
    held_out = stratified_holdout(labels, names, 0.2, connected(groups, copies), nearest=True)
    assert not {*groups[held_out]} & {*groups[~held_out]}
    assert all(held_out[a] == held_out[b] for a, b in copies)
    assert {*labels[~held_out]} == {*labels}, "each class has images to train on"
    for train, fold in stratified_folds(labels, 5, groups=groups):
        assert not {*groups[train]} & {*groups[fold]}
        assert {*labels[train]} == {*labels}


def test_a_fifth_is_held_out_of_large_groups_with_all_classes() -> None:
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(10), 50), rng.integers(0, 4, 500)
    names = [f"{i}.jpg" for i in range(500)]
    held_out = stratified_holdout(labels, names, 0.2, connected(groups, []), nearest=True)
    assert 80 <= held_out.sum() <= 120


def test_folds_without_groups_are_those_of_scikit_learn() -> None:
    from sklearn.model_selection import StratifiedKFold

    labels = np.array([0, 1, 2] * 7)
    expected = StratifiedKFold(5, shuffle=True, random_state=3).split(labels, labels)
    for ours, theirs in zip(stratified_folds(labels, 5, seed=3), expected, strict=True):
        assert np.array_equal(ours[1], theirs[1])
    assert stratified_folds(np.array([0, 0, 1]), 5) == []


def test_class_of_one_group_has_no_folds() -> None:
    labels, groups = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2])
    assert stratified_folds(labels, 3, groups=groups) == []


def test_shared_groups_are_counted() -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    (line,) = describe_shared(np.array([1, 2, 3]), np.array([4, 3, 3]), names)
    assert "1 of the 2 groups" in line and "2 of 3 images, such as 'b.jpg'" in line
    assert describe_shared(np.array([1]), np.array([2]), names) == []
    assert describe_shared(None, None, names) == []
