"""Training images from which the ranges of the activations are determined."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from transfer.data.dataset import Split
from transfer.images.preprocess import Preprocess

NUM_CALIBRATION = 32
"""Images that determine the ranges. More take time, but make no difference to the features
(docs/performance.md)."""
NUM_COMPARED = 16
"""Further images, on which int8 is compared with float32."""


@dataclass(frozen=True)
class CalibrationImages:
    """Images of a split, drawn when they are needed.

    Args:
        split: the training images.
        preprocess: applied to each image.
        seed: of the choice of images and their order.
    """

    split: Split
    preprocess: Preprocess
    seed: int

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The images to calibrate and those to compare on, float32 ``[num_images, height, width,
        channels]`` each. With few images, some are both.

        Raises:
            ValueError, OSError: if images cannot be decoded.
        """
        # Shuffled: a split may be sorted by class.
        batches = self._drawn.batches(self.preprocess, NUM_COMPARED, shuffle_seed=self.seed)
        images = np.concatenate([np.asarray(batch) for batch, _ in batches])
        return images[:NUM_CALIBRATION], images[-NUM_COMPARED:]

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the ids of the images and of their order, part of the key of what
        is computed."""
        digest = hashlib.sha256(self._drawn.ids.tobytes())
        digest.update(repr((self.seed, NUM_CALIBRATION, NUM_COMPARED)).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _drawn(self) -> Split:
        count = min(len(self.split), NUM_CALIBRATION + NUM_COMPARED)
        keep = np.zeros(len(self.split), bool)
        generator = np.random.default_rng(self.seed)
        keep[generator.choice(len(self.split), count, replace=False)] = True
        return self.split.where(keep)
