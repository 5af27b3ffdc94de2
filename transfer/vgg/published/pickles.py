"""Weights in plain pickles: Lasagne's ``.pkl`` and Paddle's ``.pdparams``, without executing them.

Both are returned as the state dict of a PyTorch model, whose order of axes they have: kernels of
convolutions ``[outputs, inputs, height, width]``, and inputs of the first fully connected
layer in the order channel, height, width. Their matrices are ``[inputs, outputs]``. Kernels of
Lasagne are flipped or not, depending on ``flip_filters`` of its layers; those of its model zoo are
not.

Sources: Lasagne/Recipes, modelzoo/vgg16.py (layers of cuDNN, which do not flip their filters);
paddle/framework/io.py (a tensor is pickled as the pair of its name and array).
"""

from __future__ import annotations

from typing import IO, Any, NamedTuple

import numpy as np

from transfer.vgg.published.unpickle import NUMPY, LazyArray, Resolver, load, size_of

_MAX_NAMES = 20_000
_PADDLE_NORM = {"_mean": "running_mean", "_variance": "running_var"}


def _pair(values: Any = ()) -> tuple[Any, ...]:
    """Stand-in for ``tuple``, which would make eight bytes of each byte of a string."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"it makes a tuple of a {type(values).__name__}")
    return tuple(values)


_STAND_INS = NUMPY | {(module, "tuple"): _pair for module in ("builtins", "__builtin__")}


class Pickled(NamedTuple):
    """``kind``: Lasagne or Paddle. ``arrays``: by the names of a PyTorch model. ``backend``: empty
    if the kernels may be flipped; see ``kernel_flips``."""

    kind: str
    arrays: dict[str, np.ndarray]
    preprocess: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    backend: str | None = None


def read(file: IO[bytes]) -> Pickled:
    """Read a pickle of Lasagne or Paddle.

    Raises:
        UnsafePickleError: if it contains more than arrays, numbers and containers of them.
        ValueError: if it is damaged, or neither.
    """
    resolve = Resolver(size_of(file))
    root = load(file, _STAND_INS)
    if isinstance(root, dict) and isinstance(root.get("param values"), list):
        return _lasagne(root, resolve)
    arrays: dict[str, np.ndarray] = {}
    for state in _dictionaries(root):
        arrays = _paddle(state, resolve)
        if any(values.ndim == 4 for values in arrays.values()):
            break
    else:
        raise ValueError(
            "it is a pickle without the weights of a network; expected those of Lasagne "
            "(param values) or Paddle (.pdparams), or a file of PyTorch"
        )
    return Pickled("Paddle", arrays)


def _dictionaries(root: Any) -> list[dict[str, Any]]:
    """A dictionary and those in it: a training saves the state of its model beside others."""
    if not isinstance(root, dict):
        return []
    return [root, *(value for value in list(root.values())[:100] if isinstance(value, dict))]


def _lasagne(root: dict[str, Any], resolve: Resolver) -> Pickled:
    arrays: dict[str, np.ndarray] = {}
    counts = {4: 0, 2: 0}
    name = ""
    for value in root["param values"][:_MAX_NAMES]:
        values = resolve(value) if isinstance(value, LazyArray) else None
        if not isinstance(values, np.ndarray) or values.ndim not in (1, 2, 4):
            raise ValueError("its parameters are not those of convolutions and dense layers")
        if values.ndim == 1:
            if not name or f"{name}.bias" in arrays:
                raise ValueError("its parameters are not pairs of kernels and biases")
            arrays[f"{name}.bias"] = values
            continue
        number = counts[values.ndim]
        counts[values.ndim] += 1
        # Numbers that leave places for activations and dropout.
        name = f"features.{2 * number}" if values.ndim == 4 else f"classifier.{3 * number}"
        arrays[f"{name}.weight"] = values if values.ndim == 4 else values.T
    mean, words = root.get("mean value"), root.get("synset words")
    values = resolve(mean) if isinstance(mean, LazyArray) else None
    preprocess = None
    if isinstance(values, np.ndarray) and values.size == 3 and np.isfinite(values).all():
        preprocess = {"mean": [round(float(v), 6) for v in values.ravel()], "order": "BGR"}
    is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
    labels = tuple(words) if is_list and words else ()
    return Pickled("Lasagne", arrays, preprocess, labels, backend="")


def _paddle(root: dict[str, Any], resolve: Resolver) -> dict[str, np.ndarray]:
    arrays = {}
    for key, value in list(root.items())[:_MAX_NAMES]:
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]  # the name, and the array
        values = resolve(value) if isinstance(value, LazyArray) else None
        if isinstance(key, str) and isinstance(values, np.ndarray):
            owner, separator, part = key.rpartition(".")
            name = f"{owner}{separator}{_PADDLE_NORM.get(part, part)}"
            arrays[name] = values.T if values.ndim == 2 else values
    return arrays
