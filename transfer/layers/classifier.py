"""The complete classifier: preprocessing, backbone and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from transfer.core.files import read_names
from transfer.core.tensors import Tensor, TensorLike
from transfer.images.pixel_range import check_range
from transfer.images.preprocess import Preprocess
from transfer.layers.backbone import Backbone
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.keras_network import network_of
from transfer.models.card import Card
from transfer.models.meta_graph import load_meta_graph

MODEL = "model"
"""Checkpoint prefix of the classifier in a run folder: ``model.meta``, ``model.index``, ..."""


@keras.saving.register_keras_serializable("vgg_transfer")
class Classifier(keras.Model):
    """An image classifier: images to logits.

    Args:
        backbone: maps preprocessed images to features, e.g. a ``Backbone``, also of several taps.
        head: maps features to logits ``[batch, num_classes]``, e.g. a ``Head``.
        preprocess: the preprocessing that the backbone expects.
        labels: one class name per logit, at least two.

    Raises:
        ValueError: if there are fewer than two labels.

    ``cut`` is the tensor up to which the backbone was frozen during training, ``"none"`` if nothing
    was frozen, ``None`` if unknown. ``fine_tune`` sets it, and ``evaluate`` computes the network in
    the same two parts. ``card`` is the card of the model read by ``load``, otherwise empty.

    Example:
        >>> import numpy as np
        >>> from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph
        >>> graph = load_meta_graph("pretrained/vgg_small")
        >>> preprocess = Preprocess(graph.card.preprocess, graph.card.image_size)
        >>> classifier = Classifier(Backbone(graph), Head(2), preprocess, ["cat", "dog"])
        >>> photos = np.zeros((3, 120, 90, 3), np.uint8)  # of any size, 0..255
        >>> classifier.probabilities(photos).shape
        TensorShape([3, 2])
    """

    def __init__(
        self,
        backbone: keras.layers.Layer,
        head: keras.layers.Layer,
        preprocess: Preprocess,
        labels: Sequence[str],
        **kwargs: Any,
    ):
        if len(labels) < 2:
            raise ValueError(
                f"labels={list(labels)}: a classifier needs at least 2 classes, as its outputs are "
                "the probabilities of a softmax"
            )
        # Under a mixed-precision policy Keras would round the pixels to float16.
        super().__init__(autocast=False, dtype="float32", **kwargs)
        self.backbone = backbone
        self.head = head
        self.preprocess = preprocess
        self.labels = list(labels)
        self.cut: str | None = None
        self.card = Card()

    if TYPE_CHECKING:

        def __call__(  # noqa: D102
            self, images: TensorLike, training: bool = False
        ) -> Tensor: ...

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Logits, float32 ``[batch, num_classes]``.

        Args:
            images: ``[batch, height, width, channels]``, RGB or gray, 0..255, any size, not
                preprocessed.
            training: whether to apply dropout: that of the head, and that of the network.

        Raises:
            ValueError: if ``images`` is not 4-D.
        """
        images = tf.convert_to_tensor(images)
        if images.shape.rank not in (None, 4):
            one = ": for one image, classifier(images[None])" if images.shape.rank == 3 else ""
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected [batch, height, width, "
                f"channels]{one}"
            )
        return self.head(self.backbone(self.preprocess(images)), training=training)

    def build_from_size(self) -> int:
        """Build the head's weights for the image size of the backbone.

        Returns:
            The number of logits.
        """
        # Without the preprocessing, whose resizing takes the longest to trace.
        features = self.backbone(keras.Input(self.preprocess.shape))
        self.built = True
        return int(self.head(features).shape[-1])

    def get_config(self) -> dict[str, Any]:
        """All parts, for ``save`` and ``keras.models.load_model``."""
        parts = {"backbone": self.backbone, "head": self.head}
        config = {k: keras.saving.serialize_keras_object(v) for k, v in parts.items()}
        return config | {
            "preprocess": self.preprocess.settings(),
            "labels": self.labels,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Classifier:
        """A classifier from what ``get_config`` returned."""
        config = dict(config)
        parts = {
            name: keras.saving.deserialize_keras_object(config.pop(name))
            for name in ("backbone", "head")
        }
        preprocess = Preprocess(**config.pop("preprocess"))
        classifier = cls(**parts, preprocess=preprocess, **config)
        classifier.build_from_size()
        return classifier

    def probabilities(self, images: TensorLike) -> Tensor:
        """Softmax of the logits: float32 ``[batch, num_classes]``; each row sums to 1.

        Args:
            images: see ``call``. If eager pixels are at most 1, a warning says so.

        Raises:
            ValueError: if pixels are booleans, or eager ones not finite or far above 255.
        """
        pixels = tf.convert_to_tensor(images)
        # In a function, only their dtype is known.
        is_known = tf.executing_eagerly()
        check_range([pixels.numpy() if is_known else np.empty(0, pixels.dtype.as_numpy_dtype)])
        return tf.nn.softmax(self(images, training=False))

    def probabilities_of_resized(self, pixels: tf.Tensor) -> tf.Tensor:
        """``probabilities`` of the output of ``preprocess.resize``: float32 ``[batch, height,
        width, channels]`` in 0..255."""
        features = self.backbone(self.preprocess.normalize(pixels))
        return tf.nn.softmax(self.head(features, training=False))

    @property
    def feature_extractor(self) -> keras.layers.Layer:
        """The backbone as a layer with one output, the features ``[batch, width]`` of all its taps;
        the backbone itself if it has one.

        Raises:
            ValueError: if the head was built for the same taps in another order.
        """
        backbone = self.backbone
        if not isinstance(backbone, GraphLayer) or not backbone.network.taps:
            return backbone
        taps, expected = tuple(backbone.network.taps), getattr(self.head, "taps", ())
        if expected not in ((), taps):
            raise ValueError(
                f"the head was built for the taps {', '.join(expected)}, in this order; the "
                f"backbone has {', '.join(taps)}"
            )
        return backbone.concatenated()

    def split(
        self, at: str | None, freeze_from: str | None = None, *, dtype: str | None = None
    ) -> tuple[keras.layers.Layer | None, keras.Sequential]:
        """Split into a frozen and a trained part.

        Args:
            at: tensor of the backbone up to which it is frozen; ``None`` or ``"none"`` freezes
                nothing.
            freeze_from: tensor after it, from which on the backbone is frozen, too.
            dtype: ``"mixed_bfloat16"`` or ``"mixed_float16"``: precision of both parts of the
                backbone; the head stays in float32. ``None`` does not change it.

        Returns:
            The frozen layer, from preprocessed images to the activations at the tensor (``None``
            if nothing is frozen), and a model from there to the logits. Both share the
            classifier's weights. The layers of the model are the trained part of the backbone,
            the part from ``freeze_from`` on, if given, and the head.
        """
        prefix: keras.layers.Layer | None = None
        suffix = self.feature_extractor
        if dtype is not None:
            suffix = suffix.in_mixed_precision(dtype)
        if at not in (None, "none"):
            prefix, suffix = suffix.split(at)
        parts = [suffix]
        if freeze_from is not None:
            trained, frozen = suffix.split(freeze_from)
            parts = [trained, frozen.in_inference_mode()]
        return prefix, keras.Sequential([*parts, self.head])

    @classmethod
    def from_model(
        cls, model: keras.Model, preprocess: Preprocess, labels: Sequence[str]
    ) -> Classifier:
        """A classifier from any Keras model, e.g. one from ``to_keras`` that was edited or trained
        elsewhere, on any backend: to evaluate it, export it, and write it as a meta graph.

        The classifier computes inference only (dropout of the model is not part of it), and shares
        the weights of the model. Its head is the last matrix product, its backbone everything
        before.

        Args:
            model: maps preprocessed images to logits, or to the probabilities of a softmax.
            preprocess: makes the model's input from images; ``Preprocess("none", size)`` if the
                model itself normalizes pixels.
            labels: one class name per output.

        Raises:
            ValueError: if the model has several inputs or outputs, does not take images of this
                size, ends in a sigmoid, or does not have an output for each of at least two labels.
            ForbiddenOpError: if it does anything other than arithmetic.

        Example:
            >>> import keras
            >>> from transfer import Backbone, Classifier, Preprocess, to_keras
            >>> backbone = to_keras(Backbone("pretrained/vgg_small"))
            >>> model = keras.Sequential([backbone, keras.layers.Dense(2)])
            >>> classifier = Classifier.from_model(model, Preprocess("torch", 64), ["cat", "dog"])
            >>> classifier.head.graph_variables[0].shape
            (512, 2)
        """
        network, features = network_of(model)
        taken = tuple(model.inputs[0].shape[1:])
        if taken != preprocess.shape and taken != (math.prod(preprocess.shape),):
            raise ValueError(
                f"model {model.name!r} takes inputs of shape {taken}; preprocess gives "
                f"{preprocess.shape}"
            )
        classifier = cls(*network.split(features), preprocess=preprocess, labels=labels)
        num_logits = classifier.build_from_size()
        if num_logits != len(classifier.labels):
            raise ValueError(
                f"model {model.name!r} has {num_logits} outputs but there are "
                f"{len(classifier.labels)} labels"
            )
        return classifier

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Load a classifier that ``exports.meta_graph.save_classifier`` wrote.

        Its head is the part of the graph from the tap to the logits.

        Args:
            path: run folder, or checkpoint prefix of a fine-tuned model.

        Raises:
            FileNotFoundError, ValueError: if it does not exist, or its card lacks a required field.
        """
        path = Path(path).expanduser()
        if (path / f"{MODEL}.meta").is_file():
            path /= MODEL
        graph = load_meta_graph(path)
        card = graph.card
        if not (card.tap and card.input and card.labels and "logits" in card.outputs):
            raise ValueError(
                f"{str(graph.prefix)!r} is not a fine-tuned model: its card must name input, tap, "
                "labels and outputs.logits"
            )
        if Path(card.labels).name != card.labels:
            raise ValueError(
                f"the card of {str(graph.prefix)!r} has its labels in {card.labels!r}; "
                "expected a file beside the card"
            )
        labels = read_names(graph.prefix.parent / card.labels)
        network = Backbone(graph, card.outputs["logits"], pooling=None, name="network")
        backbone, head = network.split(card.tap)
        classifier = cls(backbone, head, graph.preprocess(card.input), labels)
        classifier.card = card
        num_classes = classifier.build_from_size()
        if num_classes != len(labels):
            raise ValueError(
                f"{str(graph.prefix)!r} has {num_classes} logits but {len(labels)} labels in "
                f"{card.labels}"
            )
        return classifier
