"""Training images from which the ranges of the activations are determined."""

from __future__ import annotations

import functools
import hashlib
import logging
from dataclasses import dataclass

import numpy as np

from transfer.data.dataset import Split
from transfer.images.preprocess import Preprocess

logger = logging.getLogger(__name__)

NUM_CALIBRATION = 16
"""Images that determine the ranges. More take time, but make no difference to the features
(docs/performance.md)."""
NUM_COMPARED = 16
"""Further images, on which int8 is compared with float32. Of fewer images, the same part."""


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
        channels]`` each. Fewer than four are both, which is logged as a warning.

        Raises:
            ValueError, OSError: if images cannot be decoded.
        """
        # Shuffled: a split may be sorted by class.
        batches = self._drawn.batches(self.preprocess, NUM_COMPARED, shuffle_seed=self.seed)
        images = np.concatenate([np.asarray(batch) for batch, _ in batches])
        if self._num_compared < 2:  # without a spread over images, see ``feature_error``
            logger.warning(
                f"int8 is compared with float32 on the {len(images)} images that it is calibrated "
                "on: there are too few for others, and the difference is larger on other images"
            )
            return images, images
        num_calibration = len(images) - self._num_compared
        return images[:num_calibration], images[num_calibration:]

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the ids of the images and of their order, part of the key of what
        is computed."""
        digest = hashlib.sha256(self._drawn.ids.tobytes())
        num_calibration = len(self._drawn) - self._num_compared
        digest.update(repr((self.seed, num_calibration, self._num_compared)).encode())
        return digest.hexdigest()

    @property
    def _num_compared(self) -> int:
        return len(self._drawn) * NUM_COMPARED // (NUM_CALIBRATION + NUM_COMPARED)

    @functools.cached_property
    def _drawn(self) -> Split:
        count = min(len(self.split), NUM_CALIBRATION + NUM_COMPARED)
        keep = np.zeros(len(self.split), bool)
        generator = np.random.default_rng(self.seed)
        keep[generator.choice(len(self.split), count, replace=False)] = True
        return self.split.where(keep)
