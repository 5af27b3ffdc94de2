"""scikit-learn's handwritten digits as a tfds dataset: 1,797 gray images, 8x8 pixels, 10 classes.

It is part of scikit-learn, so it needs no network. Importing this module registers it with tfds, so
that ``tfds.load("digits")`` works. The dataset is the test split of the UCI dataset "Optical
Recognition of Handwritten Digits" (doi 10.24432/C50P49, CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from transfer.data.tfds import tfds

TEST_SHARE = 0.2


class Digits(tfds.core.GeneratorBasedBuilder):
    """Digits with fixed, stratified splits ``train`` (1,438) and ``test`` (359)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits from scikit-learn, 8x8 pixels, scaled to 0..255.",
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits

        from transfer.data.holdout import stratified_holdout

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        names = [str(index) for index in range(len(images))]
        held_out = stratified_holdout(digits.target, names, TEST_SHARE)
        return {
            "train": self._generate_examples(images, digits.target, np.flatnonzero(~held_out)),
            "test": self._generate_examples(images, digits.target, np.flatnonzero(held_out)),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices:
            yield int(index), {"image": images[index], "label": int(labels[index])}
