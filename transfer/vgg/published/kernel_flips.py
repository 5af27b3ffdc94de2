"""Whether the kernels of a file are flipped: Theano computes convolutions, and all others
cross-correlations, whose kernels are those of Theano flipped along height and width.

A flipped kernel has the shape of any other, and a network with the wrong ones gives features that
are wrong without an error. So it is never guessed: Keras 2 writes its backend into its files, the
first convolution of Oxford's VGG16 is recognised by its hash, and otherwise the caller has to say.

Sources: theano, tensor/nnet/abstract_conv.py (``filter_flip``); keras 2, engine/saving.py
(``original_backend``); lasagne, layers/conv.py and layers/dnn.py (``flip_filters``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

import numpy as np

from transfer.vgg.published import origins

Kernels: TypeAlias = Literal["auto", "flipped", "unflipped"]


def flipped(values: np.ndarray) -> np.ndarray:
    """A kernel of a convolution flipped along height and width; other arrays as they are.

    Args:
        values: with four axes ``[height, width, inputs, outputs]``, or ``[outputs, inputs, height,
            width]``.
    """
    if values.ndim != 4:
        return values
    is_first = max(values.shape[:2]) <= max(values.shape[2:])
    return values[::-1, ::-1] if is_first else values[:, :, ::-1, ::-1]


def may_be_theano(names: Iterable[str]) -> bool:
    """Whether arrays with these names may have been written by Keras 1 with Theano, whose names
    have no number of an output: ``conv1_1_W``. Those of TensorFlow are ``conv1_1_W:0``; in files
    before Keras 1, arrays only have numbers: ``param_0``."""
    return any(re.search(r"_W$|/param_\d+$", name) for name in names)


def is_flipped(kernel: np.ndarray, kernels: Kernels, *, default: bool | None) -> bool:
    """Whether the kernels of a file that does not name its backend are flipped.

    Args:
        kernel: the first convolution, ``[3, 3, 3, outputs]``.
        kernels: what the caller says.
        default: what files of this kind are, or ``None`` if there are both.

    Raises:
        ValueError: if it is not known.
    """
    if kernels != "auto":
        return kernels == "flipped"
    for is_theano, values in ((False, kernel), (True, flipped(kernel))):
        if kernel.ndim == 4 and origins.convention_of(np.asarray(values, np.float32)) is not None:
            return is_theano
    if default is None:
        raise ValueError(
            "it does not say whether its kernels are flipped, as those of Theano are, and without "
            "an error the wrong ones give wrong features. kernels=flipped: Keras 1 with Theano "
            "(published files with th_kernels in their name, and vgg16_weights.h5 and "
            "vgg19_weights.h5 of baraldilorenzo), Lasagne's Conv2DLayer; kernels=unflipped: Keras "
            "1 with TensorFlow (files with tf_kernels in their name), Lasagne's Conv2DDNNLayer, "
            "layers with flip_filters=False (vgg19_normalized.pkl)"
        )
    return default
