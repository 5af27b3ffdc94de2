"""Feature extraction for other tools: scikit-learn, t-SNE, nearest neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH, Activations, Compiled, stream
from transfer.activations.store import TRAINING, ActivationStore, CachePolicy, ExtractionRequest
from transfer.data.dataset import Split
from transfer.graph import is_seeded
from transfer.images.preprocess import Preprocess
from transfer.layers.backbone import Backbone
from transfer.layers.graph_layer import GraphLayer, Pooling
from transfer.layers.head import average_over_space


@dataclass(frozen=True)
class Features:
    """Features of the images of a split, in its order.

    ``values`` are float32 ``[num_examples, width]``, ``labels`` int64 ``[num_examples]``, ``names``
    the names of the images, and ``class_names`` the name of each class. ``taps`` maps the name of
    each tap to the number of its columns in ``values``, in their order; ``of`` selects them.

    Example:
        >>> import numpy as np
        >>> from transfer import Features
        >>> values, labels = np.zeros((2, 512), np.float32), np.array([0, 1])
        >>> len(Features(values, labels, ["a/1.jpg", "b/1.jpg"], ["a", "b"]))
        2
    """

    values: np.ndarray
    labels: np.ndarray
    names: list[str]
    class_names: list[str]
    taps: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, tap: str) -> np.ndarray:
        """The features of one tap: float32 ``[num_examples, its width]``.

        Raises:
            KeyError: if there is no such tap.
        """
        if tap not in self.taps:
            raise KeyError(f"no features of tap {tap!r}; there are {', '.join(self.taps)}")
        names = list(self.taps)
        start = sum(self.taps[name] for name in names[: names.index(tap)])
        return self.values[:, start : start + self.taps[tap]]


def extract_features(
    backbone: Backbone[Any],
    split: Split,
    preprocess: Preprocess | None = None,
    *,
    cache: Literal["disk", "memory"] = "disk",
    cache_dir: str | Path | None = None,
    cache_limit: float = 20.0,
) -> Features:
    """Run a backbone once over the images of a split.

    The features are stored in the activation cache, where later calls and ``fine_tune`` runs that
    freeze everything up to the same tap find them. Those of several taps are pooled over height
    and width, by the average unless the backbone has another ``pooling``, and concatenated.

    Args:
        backbone: a ``Backbone``, which maps preprocessed images to features.
        split: a split of a source, see ``open_source``.
        preprocess: preprocessing that the backbone's weights expect. Default: that of the model's
            card.
        cache: ``disk`` keeps the features for later calls, ``memory`` does not.
        cache_dir: folder of the cache. Default: the user's cache folder.
        cache_limit: largest size of that folder in GB.

    Returns:
        The features, with labels and names.

    Raises:
        ValueError: if no preprocessing is given and the card has none, or images cannot be decoded.

    Example:
        >>> from sklearn.svm import LinearSVC
        >>> from transfer import Backbone, extract_features, load_meta_graph, open_source
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> backbone = Backbone(load_meta_graph("pretrained/vgg_small"))
        >>> features = extract_features(backbone, train)
        >>> features.values.shape[1]
        512
        >>> svm = LinearSVC().fit(features.values, features.labels)
    """
    features = backbone.concatenated()
    if preprocess is None:
        preprocess = backbone.graph.preprocess(backbone.network.input)
    policy = CachePolicy(cache, None if cache_dir is None else Path(cache_dir), cache_limit)
    split = replace(split)  # with ids read anew, since files may have changed
    values = layer_features(
        features, split, preprocess, backbone.graph.name, policy, backbone.pooling
    )
    taps = {features.network.output.removesuffix(":0"): values.shape[1]}
    if backbone.network.taps:
        taps = _widths(backbone, preprocess)
    return Features(values, split.labels, [*split.names], split.source.class_names, taps)


def layer_features(
    features: GraphLayer[Any],
    split: Split,
    preprocess: Preprocess,
    model: str,
    policy: CachePolicy,
    pooling: Pooling = "avg",
) -> np.ndarray:
    """The features of the images of a split, float32 ``[len(split), width]``.

    Args:
        features: maps preprocessed images to them, or to feature maps.
        split: the images.
        preprocess: applied to each.
        model: name of the model.
        policy: where activations are cached.
        pooling: of feature maps over height and width, see ``Backbone``.
    """
    tap = features.network.output
    # The same layer as in a run with this cut, without global average pooling, to share its cache.
    layer, _ = features.split(tap)
    if is_seeded(layer.network.graph_def):
        policy = replace(policy, mode="memory")  # a random sample is not to be found by others
    store = ActivationStore(
        layer, preprocess, cut=tap.removesuffix(":0"), model=model, policy=policy
    )
    rows = store.rows([ExtractionRequest(TRAINING, split, None)])
    # Pooled in batches: the activations themselves may not fit in memory.
    batches: Iterable[tuple[np.ndarray, Any]]
    if rows is None:
        batches, first = stream(Compiled(layer), split.batches(preprocess, EXTRACTION_BATCH)), []
    else:
        batches = Activations(rows, split.labels).batches(EXTRACTION_BATCH)
        first = [np.asarray(rows[0][:0], np.float32)]
    return np.concatenate(
        [_pooled(x, pooling) for x in itertools.chain(first, (values for values, _ in batches))]
    )


def _pooled(maps: np.ndarray, pooling: Pooling) -> np.ndarray:
    """Features ``[n, width]`` of activations ``[n, width]`` or ``[n, height, width, channels]``."""
    if pooling == "max" and maps.ndim == 4:
        return np.asarray(maps.max((1, 2)))
    averages = np.asarray(average_over_space(maps))
    if pooling == "avg_max" and maps.ndim == 4:
        return np.concatenate([averages, maps.max((1, 2))], axis=-1)
    return averages


def _widths(backbone: Backbone[Any], preprocess: Preprocess) -> dict[str, int]:
    """The number of features of each tap."""
    images = keras.KerasTensor((EXTRACTION_BATCH, *preprocess.shape), "float32")
    return {name: spec.shape[-1] for name, spec in backbone.compute_output_spec(images).items()}
