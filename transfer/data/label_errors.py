"""Label errors: finds images whose label is improbable given the features of the other images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.sparse
import scipy.special
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from transfer.core.npy_files import Rows
from transfer.training.folds import grouped_folds

FOLDS = 5
PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(-6, 5))
"""Candidate ridge penalties per example, of standardised features: 0.001 to 100."""
LEAST_PROBABILITY = 0.1
"""Probability of being wrong from which a label is listed."""
MOST_LISTED = 0.02
"""Maximum share of the labels that are listed, in datasets of more than 500 images; else 10."""
_PRIOR = (3, 150)  # Beta distribution of the share of wrong labels: about 1 %, as in tidy datasets
_SAMPLE = 20_000  # images on which penalty and calibration are chosen
_ROWS = 8192  # images whose features are in memory at a time


@dataclass(frozen=True)
class LabelErrors:
    """Labels to review, those most probably wrong first.

    ``positions``, int64 ``[n]``, are those of the images; ``probabilities``, ``[n]``, of the label
    being right; ``suggestions``, int64 ``[n]``, the most probable other class, and
    ``suggestion_probabilities`` its probability. ``num_expected`` is the estimated number of wrong
    labels among all images, also those that are not listed.
    """

    positions: np.ndarray
    probabilities: np.ndarray
    suggestions: np.ndarray
    suggestion_probabilities: np.ndarray
    num_expected: float


def find_label_errors(
    features: Rows, labels: np.ndarray, groups: np.ndarray | None = None
) -> LabelErrors:
    """Labels that are probably wrong, by out-of-fold predictions from features.

    Each image is classified by a ridge regression on the features of other images (5-fold
    cross-validation, as in Northcutt et al., "Confident Learning", arXiv 1911.00068). The noise
    model is that a share of the labels was replaced by random classes; this share and the
    temperature of the softmax are fitted together by maximum likelihood of the labels. Without the
    share, the temperature would explain wrong labels by uncertain predictions, and no label would
    be improbable enough.

    Args:
        features: float ``[num_examples, width]``, or an object that reads slices of them from disk:
            some thousand images are in memory at a time.
        labels: int ``[num_examples]``.
        groups: int ``[num_examples]``; images of a group, e.g. of one patient, are never used to
            judge one another.

    Returns:
        The labels that are wrong with a probability of at least 0.1, at most 2 % of all, or 10.

    Raises:
        ValueError: if there are fewer than two classes, or a class has fewer than two images.

    Example:
        >>> import numpy as np
        >>> from transfer.data.label_errors import find_label_errors
        >>> features = np.repeat(np.eye(2), 50, axis=0) + np.linspace(0, 0.1, 100)[:, None]
        >>> labels = np.repeat([0, 1], 50)
        >>> labels[7] = 1
        >>> find_label_errors(features, labels).positions
        array([7])
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    if len(labels) and counts[counts > 0].min() < 2:
        raise ValueError("labels can be checked where each class has at least 2 images")
    if (counts > 0).sum() < 2:
        raise ValueError(f"labels have {(counts > 0).sum()} class; expected at least 2")
    chosen = np.arange(len(labels))
    if len(labels) > _SAMPLE:
        chosen = np.sort(np.random.default_rng(0).choice(len(labels), _SAMPLE, replace=False))
    scaled, sample = _standardised(features, len(labels), chosen)
    calibration = _calibrate(
        sample, labels[chosen], len(counts), None if groups is None else groups[chosen]
    )
    right = np.ones(len(labels))
    suggestions = np.zeros(len(labels), np.int64)
    suggested = np.zeros(len(labels))
    folds = _folds(labels, groups)
    heads = _Sums.of(scaled, labels, len(counts), folds).heads(calibration.penalty)
    for rows, scores in _out_of_fold(scaled, labels, folds, heads):
        posterior = calibration.posterior(scores, labels[rows])
        each = np.arange(len(rows))
        right[rows] = posterior[each, labels[rows]]
        posterior[each, labels[rows]] = -1
        suggestions[rows] = posterior.argmax(-1)
        suggested[rows] = posterior.max(-1)
    order = np.argsort(right, kind="stable")
    num_doubtful = int((right <= 1 - LEAST_PROBABILITY).sum())
    listed = order[: min(num_doubtful, max(10, int(MOST_LISTED * len(labels))))]
    return LabelErrors(
        listed, right[listed], suggestions[listed], suggested[listed], float((1 - right).sum())
    )


@dataclass(frozen=True)
class _Calibration:
    """How scores become probabilities; ``noise`` is the share of random labels."""

    penalty: float
    inverse_temperature: float
    noise: float

    def posterior(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Probabilities of the true class, given image and label, ``[n, num_classes]``."""
        predicted = scipy.special.softmax(self.inverse_temperature * scores, axis=-1)
        joint = predicted * self.noise / scores.shape[-1]
        each = np.arange(len(labels))
        joint[each, labels] += (1 - self.noise) * predicted[each, labels]
        return joint / joint.sum(-1, keepdims=True)


def _calibrate(
    features: np.ndarray, labels: np.ndarray, num_classes: int, groups: np.ndarray | None
) -> _Calibration:
    """Choose the penalty with the highest likelihood of out-of-fold labels."""
    folds = _folds(labels, groups)
    sums = _Sums.of(features, labels, num_classes, folds)
    best = (np.inf, _Calibration(PENALTIES[0], 1.0, 0.0))
    for penalty in PENALTIES:
        parts = [*_out_of_fold(features, labels, folds, sums.heads(penalty))]
        if not parts:
            break
        scores = np.concatenate([scores for _, scores in parts]).astype(np.float64)
        own = labels[np.concatenate([rows for rows, _ in parts])]
        loss, calibration = _fit(scores, own, penalty)
        best = min(best, (loss, calibration), key=lambda pair: pair[0])
    return best[1]


def _fit(scores: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[float, _Calibration]:
    """The temperature and the share of random labels with the highest posterior probability."""
    each, num_classes = np.arange(len(labels)), scores.shape[-1]
    a, b = _PRIOR

    def loss(parameters: np.ndarray) -> float:
        predicted = scipy.special.softmax(np.exp(parameters[0]) * scores, axis=-1)[each, labels]
        noise = scipy.special.expit(parameters[1])
        likelihood = np.log((1 - noise) * predicted + noise / num_classes).sum()
        return float(-likelihood - (a - 1) * np.log(noise) - (b - 1) * np.log1p(-noise))

    result = scipy.optimize.minimize(
        loss, [2.0, -4.0], method="Nelder-Mead", bounds=[(-5, 6), (-12, 0)]
    )
    calibration = _Calibration(
        penalty, float(np.exp(result.x[0])), float(scipy.special.expit(result.x[1]))
    )
    return float(result.fun), calibration


class _Scaled:
    """Acts as rows scaled to mean 0 and variance 1, which are computed when they are read."""

    def __init__(self, features: Rows, scaler: StandardScaler):
        self._features, self._scaler = features, scaler

    def __getitem__(self, positions: Any) -> np.ndarray:
        return np.asarray(self._scaler.transform(np.asarray(self._features[positions], np.float32)))


def _standardised(
    features: Rows, num_examples: int, chosen: np.ndarray
) -> tuple[_Scaled, np.ndarray]:
    """The features, scaled, and the rows of them at sorted positions."""
    scaler, sample = StandardScaler(), []
    for rows, values in _parts(features, num_examples):
        values = values.astype(np.float32, copy=False)
        scaler.partial_fit(values)
        sample.append(values[np.isin(rows, chosen)])
    return _Scaled(features, scaler), scaler.transform(np.concatenate(sample))


def _folds(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Number of the fold of each image, int ``[num_examples]``, classes in equal parts."""
    num_folds = min(FOLDS, int(np.bincount(labels).max()))
    if groups is not None:
        num_folds = min(num_folds, len(np.unique(groups)))
        if num_folds < 2:
            raise ValueError("labels can be checked where there are at least 2 groups of images")
        return _numbers(grouped_folds(labels, groups, num_folds, seed=0), len(labels))
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds
        return _numbers(splitter.split(labels, labels), len(labels))


def _numbers(folds: Iterable[tuple[np.ndarray, np.ndarray]], num_examples: int) -> np.ndarray:
    numbers = np.empty(num_examples, np.int64)
    for number, (_, rest) in enumerate(folds):
        numbers[rest] = number
    return numbers


@dataclass(frozen=True)
class _Sums:
    """Sums over the images of each fold: products of features, float64 ``[folds, width, width]``,
    features by class ``[folds, width, num_classes]``, and images ``[folds, num_classes]``."""

    products: np.ndarray
    moments: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, features: Rows, labels: np.ndarray, num_classes: int, folds: np.ndarray) -> _Sums:
        num_folds, width = int(folds.max()) + 1, features[:1].shape[1]
        products = np.zeros((num_folds, width, width))
        moments = np.zeros((num_folds, width, num_classes))
        counts = np.zeros((num_folds, num_classes))
        np.add.at(counts, (folds, labels), 1)
        for rows, values in _parts(features, len(labels)):
            for number in range(num_folds):
                some = folds[rows] == number
                of_fold, own = values[some], labels[rows][some]
                one_hot = scipy.sparse.csr_matrix(
                    (np.ones(len(own), np.float32), (np.arange(len(own)), own)),
                    (len(own), num_classes),
                )
                products[number] += of_fold.T @ of_fold
                moments[number] += (one_hot.T @ of_fold).T
        return cls(products, moments, counts)

    def heads(self, penalty: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each fold the ridge regression of the one-hot labels of the other folds on features
        of mean 0 and variance 1: kernel, float32 ``[width, num_classes]``, intercept, and bool
        ``[num_classes]``, whether the other folds have images of a class.

        Closed form: the sums over the other folds are the total minus those of the fold.
        """
        products, moments = self.products.sum(0), self.moments.sum(0)
        heads = []
        for number in range(len(self.counts)):
            rest = self.counts.sum(0) - self.counts[number]
            mean = rest / rest.sum()  # the intercept, since the features have mean 0
            ridge = products - self.products[number] + penalty * rest.sum() * np.eye(len(products))
            others = moments - self.moments[number]
            centred = others - np.outer(others.sum(1), mean)
            kernel = scipy.linalg.solve(ridge, centred, assume_a="pos").astype(np.float32)
            heads.append((kernel, mean.astype(np.float32), rest > 0))
        return heads


def _out_of_fold(
    features: Rows,
    labels: np.ndarray,
    folds: np.ndarray,
    heads: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions and scores, ``[n, num_classes]``, of images by the heads of their folds. Images
    whose class is in no other fold are left out."""
    for rows, values in _parts(features, len(labels)):
        for number, (kernel, intercept, has_images) in enumerate(heads):
            some = (folds[rows] == number) & has_images[labels[rows]]
            if some.any():
                yield rows[some], values[some] @ kernel + intercept


def _parts(features: Rows, num_examples: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions and features of some thousand images at a time."""
    for start in range(0, num_examples, _ROWS):
        rows = np.arange(start, min(start + _ROWS, num_examples))
        yield rows, np.asarray(features[start : start + _ROWS])
