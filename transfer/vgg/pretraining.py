"""Train a VGG from scratch with batch norm, which is folded into the weights of the saved model.

Batch norm makes training from random weights converge. At inference it is linear, so ``folded``
merges it into the preceding weights, and the saved model is a plain VGG.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from transfer.activations.extraction import Activations, extract
from transfer.images.augment import random_views
from transfer.images.preprocess import Preprocess
from transfer.training.optimizers import cosine
from transfer.vgg.architectures import Architecture


def trainable_model(
    architecture: Architecture, num_classes: int, *, dropout: float = 0.0
) -> keras.Model:
    """A Keras model of the architecture with batch norm after each layer but the last.

    Args:
        architecture: the architecture, e.g. from ``ARCHITECTURES``.
        num_classes: width of fc8.
        dropout: dropout rate after fc6 and fc7 in training.

    Returns:
        A model from preprocessed images, float32 ``[batch, size, size, 3]``, to logits ``[batch,
        num_classes]``. Images may be smaller than the architecture's if the output of the last
        pooling has the same size.
    """
    net = inputs = keras.Input((None, None, 3), name="images")
    for number, block in enumerate(architecture.convolutions, 1):
        for name, width in block:
            net = keras.layers.Conv2D(
                width, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=name
            )(net)
            net = _normalized_relu(net, name)
        net = keras.layers.MaxPooling2D(padding="same", name=f"pool{number}")(net)
    # Not Flatten, whose output width is unknown if the image size is unknown.
    width = architecture.pooled_size**2 * architecture.blocks[-1][-1]
    net = keras.layers.Reshape((width,), name="flatten")(net)
    for name in ("fc6", "fc7"):
        net = keras.layers.Dense(
            architecture.fc, use_bias=False, kernel_initializer="he_normal", name=name
        )(net)
        net = _normalized_relu(net, name)
        net = keras.layers.Dropout(dropout, name=f"{name}_dropout")(net)
    return keras.Model(inputs, keras.layers.Dense(num_classes, name="fc8")(net))


def halves(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """Split a trainable model into two models that share its weights: the convolutions, from images
    to float32 ``[batch, width]``, and the fully connected layers, from these to logits."""
    flat = model.get_layer("flatten").output
    return keras.Model(model.input, flat), keras.Model(flat, model.output)


def with_new_fully_connected(model: keras.Model, architecture: Architecture) -> keras.Model:
    """A trainable model with the same convolutions, random fully connected layers and no
    dropout."""
    new = trainable_model(architecture, model.output.shape[-1])
    halves(new)[0].set_weights(halves(model)[0].get_weights())
    return new


def folded(model: keras.Model) -> dict[str, np.ndarray]:
    """The weights of the plain VGG that is equivalent to ``model`` at inference.

    ``gamma * (x @ w - mean) / sqrt(variance + epsilon) + beta`` is ``x @ (w * s) + (beta - mean *
    s)`` with ``s = gamma / sqrt(variance + epsilon)``.

    Returns:
        float32 values by variable name (``conv1_1/weights``), for ``architectures.build_graph``.
    """
    values = {}
    for layer in model.layers:
        if not isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            continue
        kernel = layer.kernel.numpy()
        if layer.use_bias:
            biases = layer.bias.numpy()
        else:
            norm = model.get_layer(f"{layer.name}_norm")
            scale = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
            kernel = kernel * scale
            biases = norm.beta.numpy() - norm.moving_mean.numpy() * scale
        values[f"{layer.name}/weights"] = kernel
        values[f"{layer.name}/biases"] = biases
    return values


def _normalized_relu(net: keras.KerasTensor, name: str) -> keras.KerasTensor:
    # 0.9 instead of Keras' 0.99: the moving statistics must converge within an epoch or two.
    net = FusedBatchNormalization(momentum=0.9, name=f"{name}_norm")(net)
    return keras.layers.ReLU(name=f"{name}_relu")(net)


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch norm, with TensorFlow's fused operation in training: steps of a small VGG on two
    cores are 1.4 times as fast. Last axis only; 2-D and 4-D inputs."""

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return super().call(inputs, training=False)
        images = inputs if inputs.shape.rank == 4 else inputs[:, None, None, :]
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            images, self.gamma, self.beta, epsilon=self.epsilon, is_training=True
        )
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        return tf.reshape(outputs, tf.shape(inputs))


class DecodedImages:
    """Images that are decoded once and cached in memory as uint8.

    Decoding small images takes longer than a training step of a small network.

    Args:
        images: ``(images, labels)``, float32 ``[batch, size, size, channels]`` in 0..255.
        num_images: number of images in all batches.
        labels: int64 ``[num_images]``.
    """

    def __init__(self, images: Iterable[Any], num_images: int, labels: np.ndarray):
        pixels = extract(lambda batch: np.rint(batch), images, num_images, "uint8")
        self._pixels = Activations([pixels], labels)
        self._prepare = tf.function(_prepared, autograph=False, reduce_retracing=True)

    def batches(
        self,
        preprocess: Preprocess,
        batch_size: int,
        seed: int,
        *,
        augment: bool,
        first_batch: int = 0,
    ) -> Iterator[tuple[tf.Tensor, np.ndarray]]:
        """Preprocessed batches in a random permutation of all images, as random views if
        ``augment`` is set; ``seed`` determines order and views."""
        pixels = self._pixels.batches(batch_size, seed, first_batch=first_batch)
        for number, (images, labels) in enumerate(pixels, first_batch):
            view = tf.constant([seed, number], tf.int64) if augment else None
            yield self._prepare(images, view, preprocess), labels


def _prepared(images: tf.Tensor, seed: tf.Tensor | None, preprocess: Preprocess) -> tf.Tensor:
    return preprocess(images if seed is None else random_views(images, seed))


def optimizer(
    learning_rate: float, weight_decay: float, steps_per_epoch: int, epochs: int
) -> keras.optimizers.Optimizer:
    """SGD with Nesterov momentum 0.9, half an epoch of linear warm-up, and cosine decay to zero.

    Weight decay applies to kernels only: on batch norm scales and biases it is harmful (arXiv
    1812.01187, section 3.1).
    """
    schedule = cosine(
        learning_rate, steps_per_epoch * epochs, warmup_steps=max(1, steps_per_epoch // 2)
    )
    sgd = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    sgd.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return sgd
