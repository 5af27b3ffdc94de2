"""Cache of the features of a few images, from which a run derives its defaults.

To compute them takes longer than a short run trains: TensorFlow traces the decoding of images and
the network. Like fingerprints, they are kept in a subfolder of the activation cache.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from transfer.activations.cache import Cache, default_directory
from transfer.activations.entry import Entry
from transfer.activations.extraction import kernels, versions
from transfer.data.dataset import Split
from transfer.images.preprocess import Preprocess
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.head import average_over_space

FOLDER = "samples"
"""Subfolder of the activation cache."""
NUM_IMAGES = 4
_LIMIT_BYTES = 10**8


def sample_features(
    backbone: GraphLayer[Any],
    split: Split,
    preprocess: Preprocess,
    *,
    on_disk: bool = False,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Features of the first images of a split, as a head takes them.

    Args:
        backbone: maps preprocessed images to features.
        split: the images.
        preprocess: applied to each of them.
        on_disk: keep the features in the cache on disk, and take them from there. If it cannot be
            read or written, it is not used.
        cache_dir: directory of the activation cache; ``None`` is the default one.

    Returns:
        float32 ``[images, width]``, of up to ``NUM_IMAGES`` images.
    """
    first = split.where(np.arange(len(split)) < NUM_IMAGES)

    def computed() -> np.ndarray:
        images, _ = next(iter(first.batches(preprocess, NUM_IMAGES)))
        return np.asarray(average_over_space(tf.cast(backbone(images), tf.float32)))

    if not on_disk or type(preprocess) is not Preprocess:  # whose settings are in the key
        return computed()
    try:
        cache = Cache((cache_dir or default_directory()) / FOLDER, _LIMIT_BYTES)
        entry = _entry(cache, backbone, first, preprocess)
        if not entry.missing(first.ids).any():
            rows, intact = entry.read(first.ids).read(np.arange(len(first)))
            if intact.all():
                return rows
    except (OSError, KeyError):
        return computed()
    features = computed()
    with contextlib.suppress(OSError), entry.lock():
        cache.make_room(features.nbytes, keep=[entry])
        entry.append(first.ids, features)
    return features


def _entry(cache: Cache, backbone: GraphLayer[Any], split: Split, preprocess: Preprocess) -> Entry:
    images = keras.KerasTensor((NUM_IMAGES, *preprocess.shape), "float32")
    width = average_over_space(backbone.compute_output_spec(images)).shape[-1]
    key = {
        "kind": "samples",
        "sha256": backbone.digest(),
        "preprocess": preprocess.mode,
        "image_size": preprocess.plain_size,
        "channels": preprocess.channels,
        "dataset": split.source.name,
        # Features depend on the batch they are computed in, at float precision.
        "examples": hashlib.sha256(split.ids.tobytes()).hexdigest(),
        **versions(),
        **kernels(),
    }
    return cache.entry(key, [width], "float32")
