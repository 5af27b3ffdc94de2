"""The whole classifier: preprocess, backbone, head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from transfer.backbone import Backbone
from transfer.metagraph import load_meta_graph
from transfer.preprocess import Preprocess


class Classifier(keras.Model):
    """Images to logits.

    Args:
        backbone: preprocessed images to features, e.g. a ``Backbone``.
        head: features to logits ``[batch, num_classes]``, e.g. a ``Head``.
        preprocess: what the backbone expects.
        labels: a class name per logit.
    """

    def __init__(
        self,
        backbone: keras.layers.Layer,
        head: keras.layers.Layer,
        preprocess: Preprocess,
        labels: Sequence[str],
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.backbone = backbone
        self.head = head
        self.preprocess = preprocess
        self.labels = list(labels)

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Logits, float32 ``[batch, num_classes]``, of images as they are: RGB or gray, 0..255, of
        any size, ``[batch, height, width, channels]``."""
        return self.head(self.backbone(self.preprocess(images)), training=training)

    def build_from_size(self) -> None:
        """Make the head's weights, for images of the size that the backbone takes."""
        size, channels = self.preprocess.size, self.preprocess.channels
        self(tf.zeros([1, size, size, channels]))

    def probabilities(self, images: tf.Tensor) -> tf.Tensor:
        """float32 ``[batch, num_classes]``; each row adds up to 1."""
        return tf.nn.softmax(self(images, training=False))

    def split(self, at: str | None) -> tuple[keras.layers.Layer | None, keras.Sequential]:
        """What is frozen and what is trained, when all up to a tensor is frozen.

        Args:
            at: tensor of the backbone; ``None`` freezes nothing.

        Returns:
            The frozen layer, from preprocessed images to the activations at the tensor (``None``
            where nothing is frozen), and a model from there to the logits. They share the
            classifier's weights.
        """
        if at is None:
            return None, keras.Sequential([self.backbone, self.head])
        prefix, suffix = self.backbone.split(at)
        return prefix, keras.Sequential([suffix, self.head])

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """A classifier that ``transfer.export.save_classifier`` wrote; a run's ``model``.

        Its head is the part of the graph from the tap to the logits.

        Raises:
            FileNotFoundError, ValueError: if there is none, or its card does not say what is
                needed.
        """
        graph = load_meta_graph(path)
        card = graph.card
        if not (card.tap and card.input and card.labels and "logits" in card.outputs):
            raise ValueError(
                f"{str(graph.prefix)!r} is not a fine-tuned model: its card must name input, tap, "
                "labels and outputs.logits"
            )
        labels = (graph.prefix.parent / card.labels).read_text(encoding="utf-8").splitlines()
        network = Backbone(graph, card.outputs["logits"], pooling=None, name="network")
        backbone, head = network.split(card.tap)
        return cls(backbone, head, graph.preprocess(card.input), labels)
