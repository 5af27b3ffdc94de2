"""VGG networks as TF1-style graphs with the standard names, from one table of blocks.

The graph takes ``images:0`` float32 ``[batch, size, size, 3]``, preprocessed, and has a tensor for
every layer: ``conv1_1:0`` ... ``pool5:0``, ``fc6:0``, ``fc7:0``, ``fc8:0`` (the logits) and
``prob:0``. ``keep_prob:0`` is the keep probability of dropout after fc6 and fc7, 1.0 unless it is
fed. The tensors of all layers but fc8 are after the ReLU. Variables are named ``<layer>/weights``
and ``<layer>/biases``. A head with another number of fully connected layers continues or ends the
row of names: ``fc6`` ... ``fc9``, or ``fc6`` alone; the last one gives the logits.

Source of the architectures: table 1 of arXiv 1409.1556 (A = vgg11, B = vgg13, D = vgg16, E =
vgg19).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1

ACTIVATIONS: dict[str, Callable[..., tf.Tensor]] = {
    "linear": tf.identity,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "elu": tf.nn.elu,
    "selu": tf.nn.selu,
    "tanh": tf.nn.tanh,
    "sigmoid": tf.nn.sigmoid,
    "softplus": tf.nn.softplus,
    "silu": lambda x: x * tf.nn.sigmoid(x),
    "gelu": tf.nn.gelu,
}
"""Activations of fully connected layers other than the last."""


@dataclass(frozen=True)
class Architecture:
    """``blocks``: the widths of each block's 3x3 convolutions; a 2x2 max-pooling ends each block.
    ``pooling``: the layer before fc6: ``flatten``, or the global ``average`` or ``max``, for images
    of any size. ``hidden``: width and activation of each fully connected layer before the last, if
    they are not two ReLU layers of width ``fc``. ``padding``: of the poolings; with ``VALID`` they
    round odd sizes down, as Keras and PyTorch do, and with ``SAME`` up, as Caffe does."""

    blocks: tuple[tuple[int, ...], ...]
    fc: int = 4096
    image_size: int = 224
    pooling: str = "flatten"
    hidden: tuple[tuple[int, str], ...] | None = None
    padding: str = "SAME"

    def __post_init__(self) -> None:
        if self.image_size < 2 ** len(self.blocks):
            raise ValueError(
                f"image size {self.image_size} is too small for {len(self.blocks)} poolings; "
                f"expected at least {2 ** len(self.blocks)} pixels"
            )

        if self.pooling not in ("flatten", "average", "max"):
            raise ValueError(f"pooling is {self.pooling!r}; expected flatten, average or max")
        if self.padding not in ("SAME", "VALID"):
            raise ValueError(f"padding is {self.padding!r}; expected SAME or VALID")

    @property
    def pooled_size(self) -> int:
        """Height and width after the last pooling, in pixels."""
        size = self.image_size
        for _ in self.blocks:
            size = -(-size // 2) if self.padding == "SAME" else size // 2
        return size

    @property
    def connected(self) -> list[tuple[str, int | None, str]]:
        """Name, width and activation of each fully connected layer; the width of the last one is
        the number of classes, ``None`` here."""
        hidden = ((self.fc, "relu"),) * 2 if self.hidden is None else self.hidden
        layers = [(f"fc{number}", *layer) for number, layer in enumerate(hidden, 6)]
        return [*layers, (f"fc{6 + len(hidden)}", None, "linear")]

    @property
    def convolutions(self) -> list[list[tuple[str, int]]]:
        """Per block, the name and width of each convolution."""
        return [
            [(f"conv{block}_{index}", width) for index, width in enumerate(widths, 1)]
            for block, widths in enumerate(self.blocks, 1)
        ]


ARCHITECTURES = {
    "vgg_small": Architecture(((24,), (48,), (96,) * 2, (192,) * 2, (256,) * 2), 512, 64),
    "vgg11": Architecture(((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2)),
    "vgg13": Architecture(((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2)),
    "vgg16": Architecture(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)),
    "vgg19": Architecture(((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)),
}


def kernel_shapes(
    architecture: Architecture, num_classes: int | None, *, convolutional: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shape of the weights of each layer; the biases have the size of its last dimension.

    With ``convolutional``, fc6 to fc8 are convolutions (``[7, 7, 512, 4096]`` for VGG16), and fc7
    is ``[batch, h, w, 4096]``; otherwise they are matrices (``[25088, 4096]``), rows in the order
    height, width, channel. Both have the same values in the same order. With ``num_classes=None``
    there are no fc layers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for block in architecture.convolutions:
        for name, width in block:
            shapes[name] = (3, 3, channels, width)
            channels = width
    if num_classes is None:
        return shapes
    window = (architecture.pooled_size if architecture.pooling == "flatten" else 1,) * 2
    for name, units, _ in architecture.connected:
        outputs = num_classes if units is None else units
        shapes[name] = (
            (*window, channels, outputs) if convolutional else (window[0] ** 2 * channels, outputs)
        )
        window, channels = (1, 1), outputs
    return shapes


def num_parameters(architecture: Architecture, num_classes: int | None) -> int:
    """Number of weights and biases of all layers; without fc layers for ``num_classes=None``."""
    shapes = kernel_shapes(architecture, num_classes).values()
    return sum(int(np.prod(shape)) + shape[-1] for shape in shapes)


def random_weights(
    architecture: Architecture,
    num_classes: int | None,
    *,
    seed: int = 0,
    convolutional: bool = False,
) -> dict[str, np.ndarray]:
    """He-normal weights (arXiv 1502.01852) and small random biases, float32, by variable name."""
    generator = np.random.default_rng(seed)
    values = {}
    for name, shape in kernel_shapes(
        architecture, num_classes, convolutional=convolutional
    ).items():
        scale = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        values[f"{name}/weights"] = generator.standard_normal(shape, np.float32) * scale
        values[f"{name}/biases"] = generator.standard_normal(shape[-1], np.float32) * np.float32(
            0.01
        )
    return values


def build_graph(
    architecture: Architecture,
    num_classes: int | None,
    *,
    convolutional: bool = False,
    use_resource: bool = False,
) -> tf.Graph:
    """Build the network in a new graph; see the module docstring for its tensors.

    Args:
        architecture: from ``ARCHITECTURES``, or a custom one.
        num_classes: width of fc8; ``None`` ends the network with its last pooling.
        convolutional: fc layers as convolutions; they accept images of any size of which the
            poolings leave at least one pixel (32 pixels for five poolings). Feature maps smaller
            than the kernel of fc6 are zero-padded. After global average pooling they see one pixel.
        use_resource: resource variables, as in TensorFlow 2, instead of reference variables.
    """
    shapes = kernel_shapes(architecture, num_classes, convolutional=convolutional)
    is_global = architecture.pooling != "flatten"
    is_any = convolutional or is_global or num_classes is None
    size = None if is_any else architecture.image_size
    graph = tf.Graph()
    with graph.as_default():
        net = tf1.placeholder(tf.float32, [None, size, size, 3], name="images")
        if num_classes is not None:
            keep_prob = tf1.placeholder_with_default(1.0, [], name="keep_prob")

        def layer(name: str, inputs: tf.Tensor, activation: str = "relu") -> tf.Tensor:
            shape = shapes[name]
            with tf1.variable_scope(name):
                weights = tf1.get_variable("weights", shape, use_resource=use_resource)
                biases = tf1.get_variable(
                    "biases",
                    shape[-1:],
                    initializer=tf1.zeros_initializer,
                    use_resource=use_resource,
                )
                if len(shape) == 4:
                    padding = "SAME" if name.startswith("conv") else "VALID"
                    outputs = tf.nn.conv2d(inputs, weights, strides=1, padding=padding)
                else:
                    outputs = tf.matmul(inputs, weights)
                outputs = tf.nn.bias_add(outputs, biases)
                if activation != "linear":
                    outputs = ACTIVATIONS[activation](outputs)
            # The trailing slash makes the name exact; the variable scope has already used it.
            return tf.identity(outputs, name=f"{name}/")

        for number, block in enumerate(architecture.convolutions, 1):
            for name, _ in block:
                net = layer(name, net)
            net = tf.nn.max_pool2d(net, 2, 2, architecture.padding, name=f"pool{number}")
        if num_classes is None:
            return graph
        if is_global:
            reduce = tf.reduce_max if architecture.pooling == "max" else tf.reduce_mean
            net = reduce(net, [1, 2], keepdims=convolutional, name=f"{architecture.pooling}_pool")
        elif convolutional:
            net = _padded(net, architecture.pooled_size)
        else:
            net = tf.reshape(net, [-1, shapes["fc6"][0]], name="flatten")
        *hidden, (logits, _, _) = architecture.connected
        for name, _, activation in hidden:
            net = layer(name, net, activation)
            net = tf1.nn.dropout(net, rate=1 - keep_prob, name=f"{name}_dropout")
        tf.nn.softmax(layer(logits, net, "linear"), name="prob")
    return graph


def _padded(net: tf.Tensor, window: int) -> tf.Tensor:
    """Zero-pad feature maps that are smaller than the window."""
    missing = tf.maximum(window - tf.shape(net)[1:3], 0)
    before = missing // 2
    spatial = tf.stack([before, missing - before], axis=1)
    padded = tf.pad(net, tf.concat([[[0, 0]], spatial, [[0, 0]]], axis=0), name="fc6_padding")
    padded.set_shape([None, None, None, net.shape[-1]])
    return padded
