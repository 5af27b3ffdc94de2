"""A layer as one function without variables, the form that converters take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from transfer.core.private_api import with_constants
from transfer.layers.graph_layer import GraphLayer


def frozen(layer: GraphLayer[Any], shape: Sequence[int]) -> Any:
    """The inference of a layer as a concrete function of any number of images, with its weights as
    constants.

    Args:
        layer: the frozen part of a network.
        shape: of one preprocessed image, ``[height, width, channels]``.
    """
    function = tf.function(lambda images: layer(images), autograph=False)
    spec = tf.TensorSpec([None, *shape], tf.float32, "images")
    return with_constants(function.get_concrete_function(spec))
