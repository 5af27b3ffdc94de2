"""Stratified folds for cross-validation, with the images of a group in one fold."""

from __future__ import annotations

import warnings

import numpy as np

_LARGEST_TABLE = 10**8  # groups times classes, of which StratifiedGroupKFold makes a table


def stratified_folds(
    labels: np.ndarray, most: int, *, seed: int = 0, groups: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds that have images of all classes to train on.

    Args:
        labels: int ``[num_examples]``.
        most: maximum number of folds. There are fewer if a class has fewer images, or groups.
        seed: seed of the folds.
        groups: group number of each example, int ``[num_examples]``. Very many groups are not
            stratified.

    Returns:
        Positions to train on and positions of the fold, int, for each fold; empty if fewer than two
        folds are possible.
    """
    present = np.unique(labels)
    if groups is None:
        count = min(most, int(np.bincount(labels)[present].min()))
        if count < 2:
            return []
        # Imported where it is used: most runs do without, and it takes a tenth of a second.
        from sklearn.model_selection import StratifiedKFold

        folds = StratifiedKFold(count, shuffle=True, random_state=seed)
        return list(folds.split(labels, labels))
    of_class = np.unique(np.stack([labels, groups]), axis=1)[0]  # a label for each of its groups
    most = min(most, int(np.bincount(of_class)[present].min()))
    for count in range(most, 1, -1):
        folds = grouped_folds(labels, groups, count, seed)
        # With classes in few groups, all groups of a class may be in one fold.
        if all(len(np.unique(labels[train])) == len(present) for train, _ in folds):
            return folds
    return []


def grouped_folds(
    labels: np.ndarray, groups: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions to train on and positions of the fold, for each of ``count`` folds, in which groups
    are kept together and, unless they are very many, classes in equal parts."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    if len(np.unique(groups)) * (int(labels.max()) + 1) > _LARGEST_TABLE:
        return list(GroupKFold(count).split(labels, labels, groups))
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # That a class has fewer images than folds: they have been counted.
        warnings.simplefilter("ignore", UserWarning)
        return list(folds.split(labels, labels, groups))
