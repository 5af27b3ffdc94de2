"""A linear head that was solved for, and how well it predicts images that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.layers.head import Head

ABSENT = -30.0
"""Logit of a class without examples relative to the mean of the others, so that its probability is
about e^-30 times theirs."""


@dataclass(frozen=True)
class Solution:
    """A linear head, fitted to fixed features.

    ``kernel`` float32 ``[width, num_classes]`` and ``bias`` float32 ``[num_classes]`` include the
    standardisation of the features, and ``temperature``, by which the scores of ridge regression
    were multiplied. ``penalty`` is the strength of the L2 penalty; ``scores`` maps each candidate
    to its mean log loss (nats) in cross-validation, and is empty if the penalty was given or there
    were too few examples. ``converged`` is false if the maximum number of iterations was reached.

    ``out_of_sample`` are logits float32 ``[num_examples, num_classes]``, those of each example
    predicted from the others with the same penalty and temperature, and ``None`` where there are
    none. ``scored`` bool ``[num_examples]`` is false for the examples of a class that has no others
    to learn it from. ``transfer.evaluation.metrics`` computes accuracy, log loss and calibration
    error from them.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    scores: dict[float, float]
    temperature: float = 1.0
    num_iterations: int = 0
    converged: bool = True
    out_of_sample: np.ndarray | None = None
    scored: np.ndarray | None = None

    def logits(self, features: np.ndarray) -> np.ndarray:
        """The logits of features, float32 ``[num_examples, num_classes]``.

        Args:
            features: float32 ``[num_examples, width]``.

        Example:
            >>> from sklearn.datasets import load_iris
            >>> from transfer.training.ridge import fit_ridge
            >>> features, labels = load_iris(return_X_y=True)
            >>> logits = fit_ridge(features, labels, num_classes=3).logits(features)
            >>> round(float((logits.argmax(-1) == labels).mean()), 2)
            0.85
        """
        return np.asarray(features @ self.kernel + self.bias, np.float32)

    def left_out(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The logits of the examples that could be predicted from others, float32
        ``[num_scored, num_classes]``, and their labels; ``None`` if there are none.

        Args:
            labels: int ``[num_examples]``, of the examples that the head was fitted to.

        Example:
            >>> from sklearn.datasets import load_iris
            >>> from transfer.training.ridge import fit_ridge
            >>> features, labels = load_iris(return_X_y=True)
            >>> logits, left_out = fit_ridge(features, labels, num_classes=3).left_out(labels)
            >>> round(float((logits.argmax(-1) == left_out).mean()), 2)
            0.84
        """
        if self.out_of_sample is None or self.scored is None:
            return None
        return self.out_of_sample[self.scored], labels[self.scored]

    def to_head(self, **options: Any) -> Head:
        """A ``Head`` with these weights, which takes the features that they were fitted to.

        Args:
            **options: arguments of the layer, such as ``name``.

        Example:
            >>> import numpy as np
            >>> from transfer.training.ridge import fit_ridge
            >>> features = np.array([[0, 1], [0, 2], [5, 1], [6, 2]], np.float32)
            >>> head = fit_ridge(features, np.array([0, 0, 1, 1]), 2).to_head()
            >>> head(features).numpy().argmax(-1)
            array([0, 0, 1, 1])
        """
        head = Head(self.kernel.shape[1], **options)
        head.build((None, self.kernel.shape[0]))
        self.assign_to(head)
        return head

    def assign_to(self, head: Head) -> None:
        """Assign the weights to a built head without hidden layers."""
        head.classifier.kernel.assign(self.kernel)
        head.classifier.bias.assign(self.bias)


def for_all_classes(
    kernel: np.ndarray, bias: np.ndarray, present: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the classes with examples as float32 weights of all classes; the others are
    never predicted.

    Args:
        kernel: float ``[width, len(present)]``.
        bias: float ``[len(present)]``.
        present: numbers of the classes with examples, in increasing order.
        num_classes: number of logits.
    """
    kernels = np.zeros((kernel.shape[0], num_classes), np.float32)
    kernels[:, present] = kernel
    # Low for any features: ABSENT below the mean logit of the other classes.
    kernels[:, np.setdiff1d(np.arange(num_classes), present)] = kernel.mean(-1, keepdims=True)
    biases = np.full(num_classes, bias.mean() + ABSENT, np.float32)
    biases[present] = bias
    return kernels, biases
