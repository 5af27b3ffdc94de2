"""The most probable classes of each image, and the rank of its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transfer.evaluation.prediction import TOP_K, label_scores, probabilities, row_blocks


@dataclass(frozen=True)
class ImageScores:
    """The parts of the probabilities that metrics, tables and reports need.

    ``top`` are the most probable classes of each image in descending order, int64
    ``[num_examples, k]``, ties in the order of the classes; ``top_probabilities`` are their
    probabilities, float64. ``label_log_likelihoods`` and ``label_ranks`` are those of
    ``prediction.label_scores``.
    """

    top: np.ndarray
    top_probabilities: np.ndarray
    label_log_likelihoods: np.ndarray
    label_ranks: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """The most probable class of each image, int64 ``[num_examples]``."""
        return self.top[:, 0]

    @property
    def confidences(self) -> np.ndarray:
        """Its probability, float64 ``[num_examples]``."""
        return self.top_probabilities[:, 0]

    @property
    def label_probabilities(self) -> np.ndarray:
        """Probability of the label of each image, float64 ``[num_examples]``."""
        return np.exp(self.label_log_likelihoods)


def score_images(logits: np.ndarray, labels: np.ndarray) -> ImageScores:
    """Scores of all images, of which only some have their probabilities in memory at any time.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.

    Returns:
        The scores, with ``min(TOP_K, num_classes)`` most probable classes.
    """
    num_examples, num_classes = logits.shape
    k = min(TOP_K, num_classes)
    log_likelihoods, ranks = label_scores(logits, labels)
    scores = ImageScores(
        top=np.empty((num_examples, k), np.int64),
        top_probabilities=np.empty((num_examples, k)),
        label_log_likelihoods=log_likelihoods,
        label_ranks=ranks,
    )
    for rows in row_blocks(logits):
        p, rest = probabilities(logits[rows]), logits[rows].copy()
        number = np.arange(len(p))
        # A few passes are much faster than sorting hundreds of classes.
        for place in range(k):
            best = rest.argmax(-1)
            scores.top[rows, place] = best
            rest[number, best] = -np.inf
        scores.top_probabilities[rows] = np.take_along_axis(p, scores.top[rows], axis=-1)
    return scores
