"""``to_keras``: a network as a Keras model of stock layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from transfer.core.private_api import rename_operation
from transfer.graph import Network, is_seeded
from transfer.images.preprocess import Preprocess, Size, as_size, convention
from transfer.layers.backbone import Backbone
from transfer.layers.classifier import Classifier
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.head import Head, check_eager
from transfer.layers.native import elementwise, linear, normalization, pooling, reshaping
from transfer.layers.native.checking import Part, compare
from transfer.layers.native.names import Names
from transfer.layers.native.rules import RULES
from transfer.layers.native.values import values_of
from transfer.layers.native.walk import Walk
from transfer.models.meta_graph import MetaGraph, load_meta_graph

_ = elementwise, linear, normalization, pooling, reshaping  # they register their rules


def to_keras(
    source: GraphLayer | Classifier | MetaGraph | str | Path,
    tap: str | Sequence[str] | None = None,
    *,
    image_size: Size | None = None,
    name: str | None = None,
) -> keras.Model:
    """Convert a network to a Keras model of stock layers, which any backend of Keras runs.

    The model has ``Conv2D``, ``Dense``, ``MaxPooling2D`` ... layers, named after the scopes of the
    graph (``conv1_1``, ``fc7``), and can be edited, trained and saved like any Keras model; its
    ``.keras`` file loads without this package, on TensorFlow, JAX and PyTorch. Arithmetic on
    weights and shapes is evaluated, biases and activations are part of the layers before them.

    In training it behaves like ``Backbone``: dropout of the graph is active, and batch norm uses
    its stored statistics. For that, ``BatchNormalization`` layers are not trainable; a layer that
    is set to trainable uses the statistics of the batch, as always in Keras.

    The model is compared with its source on random inputs before it is returned: outputs to 1e-5
    of the largest value, gradients with respect to the input and to each variable to 1e-4.

    Args:
        source: a ``Backbone``, a part of one (see ``split``), a model from ``load_meta_graph`` or
            its path, or a ``Classifier``.
        tap: tensor with the output; for a ``MetaGraph``, defaults to the card's tap, else ``fc7``,
            and may be a list of several, as in ``Backbone``.
        image_size: height and width of the input in pixels, one number or both, if the graph does
            not state them; defaults to those on the card.
        name: name of the model; defaults to that of the layer or file.

    Returns:
        A functional model with the inputs and outputs of its source: preprocessed images to
        features (a dict, tap name to features, if there are several); for a ``Classifier``, RGB (or
        gray) images of its size in 0..255, ``[batch, height, width, channels]``, to logits.

    Raises:
        TypeError: if ``source`` is of another type.
        ValueError: if an operation cannot be expressed in stock layers (names the node), the image
            size is unknown, or the model differs from its source.

    Example:
        >>> from transfer import Backbone, to_keras
        >>> model = to_keras(Backbone("pretrained/vgg_small"))
        >>> [layer.name for layer in model.layers][:4]
        ['images', 'conv1_1', 'pool1', 'conv2_1']
        >>> model.get_layer("fc7").units
        512
        >>> model.save("backbone.keras")  # KERAS_BACKEND=jax or torch loads it, too
    """
    check_eager("to_keras")
    if isinstance(source, str | Path):
        source = load_meta_graph(source)
    if isinstance(source, MetaGraph):
        name = name or source.prefix.name
        one_or_several: Any = tap
        source, tap = Backbone(source, one_or_several), None
    if isinstance(source, Classifier):
        if tap is not None:
            raise ValueError("tap is for a network; the output of a Classifier is its logits")
        return _convert(
            [source.preprocess, source.feature_extractor, source.head],
            source.preprocess.shape,
            name or source.name,
        )
    if not isinstance(source, GraphLayer):
        raise TypeError(
            f"source is of type {type(source).__name__}; expected a Backbone, a part of one, a "
            "model from load_meta_graph or its path, or a Classifier"
        )
    name = name or source.name
    if tap is not None and not isinstance(tap, str):
        raise TypeError(
            f"tap is {tap!r}; a layer is converted up to one tap, a model up to several"
        )
    layer = source if tap is None else source.split(tap)[0]
    graph = getattr(source, "graph", None)  # a layer from a configuration has none
    default = None if graph is None else graph.card.image_size
    return _convert([layer], _input_shape(layer.network, image_size, default), name)


def _input_shape(
    network: Network, image_size: Size | None, default: Size | None
) -> tuple[int, ...]:
    """The shape of one input."""
    shape = network.input_shape or (None, None, None, None)
    if len(shape) == 4:
        is_any = None in shape[1:3]
        size = image_size or (default if is_any else None)
        if size is None and is_any:
            raise ValueError(
                f"input {network.input!r} takes any image size, and native Keras layers need one: "
                "give image_size"
            )
        if size is not None:
            sides = as_size(size)
            height, width = (sides, sides) if isinstance(sides, int) else sides
            if shape[1] not in (None, height) or shape[2] not in (None, width):
                taken = "x".join(str(side or "any") for side in shape[1:3])
                raise ValueError(
                    f"input {network.input!r} takes images of {taken} pixels, not {height}x{width}"
                )
            shape = (None, height, width, shape[3] or 3)
    if None in shape[1:]:
        raise ValueError(
            f"input {network.input!r} has shape {shape}; native Keras layers need all its "
            "dimensions but the first"
        )
    return tuple(int(size or 0) for size in shape[1:])


def _convert(layers: Sequence[Any], shape: tuple[int, ...], name: str) -> keras.Model:
    """The native model of layers that are applied in order, checked."""
    builder = _Builder()
    first = layers[0]
    network = first.network if isinstance(first, GraphLayer) else None
    dtype = (network.input_dtype or tf.float32).name if network else "float32"
    input_name = network.input.partition(":")[0].rpartition("/")[2] if network else "pixels"
    images = keras.Input(shape, dtype=dtype, name=builder.names.unique(input_name))
    outputs = images
    for layer in layers:
        outputs = builder.append(layer, outputs)
    model = keras.Model(images, outputs, name=re.sub(r"[^\w.-]", "_", name))

    def apply(images: tf.Tensor) -> tf.Tensor:
        for layer in layers:
            images = layer.normalize(images) if isinstance(layer, Preprocess) else layer(images)
        return images

    compare(model, apply, builder.parts)
    return model


@dataclass
class _Builder:
    """Appends layers to a Keras tensor; ``parts`` are those with weights."""

    names: Names = field(default_factory=Names)
    parts: list[Part] = field(default_factory=list)

    def append(self, layer: Any, net: Any) -> Any:
        """The output of the native layers for a layer."""
        if isinstance(layer, Preprocess):
            return self._preprocess(layer, net)
        if isinstance(layer, GraphLayer):
            return self._network(layer, net)
        if isinstance(layer, Head):
            return self._head(layer, net)
        if type(layer).__module__.startswith("keras."):
            return self._copy(layer, net)
        raise TypeError(
            f"cannot express {layer.name!r}, a {type(layer).__name__}, in stock Keras layers"
        )

    def _preprocess(self, preprocess: Preprocess, net: Any) -> Any:
        meaning = convention(preprocess.mode)
        if meaning.bgr:
            net = keras.ops.flip(net, axis=-1)
            rename_operation(net, self.names.unique("rgb_to_bgr"))
        channels = preprocess.channels
        scale = list(meaning.scale) * (channels // len(meaning.scale))
        mean = list(meaning.mean) * (channels // len(meaning.mean))
        if {*scale} == {1.0} and {*mean} == {0.0}:
            return net
        return keras.layers.Rescaling(
            [1 / s for s in scale],
            [-m / s for m, s in zip(mean, scale, strict=True)],
            name=self.names.unique("preprocess"),
            dtype="float32",
        )(net)

    def _network(self, layer: GraphLayer, net: Any) -> Any:
        network = layer.network
        if layer.compute_dtype != layer.variable_dtype:
            raise ValueError(
                f"cannot convert a layer in {layer.dtype_policy.name}, with which the model could "
                "not be compared; convert it in float32, and give the model the policy"
            )
        if network.batch_size is not None:
            raise ValueError(
                f"cannot express {network.output!r} in stock Keras layers: the network takes "
                f"batches of {network.batch_size} only"
            )
        if is_seeded(network.graph_def):
            node = layer.random_nodes[0]
            raise ValueError(
                f"cannot express node {node!r} in stock Keras layers: it draws random numbers at "
                "inference too"
            )
        net = self._as_input(network, net)
        if {*network.outputs} != {network.input}:
            values = [variable.value for variable in layer.graph_variables]
            known = values_of(network, tuple(net.shape[1:]), values)
            walk = Walk(known, net, self.names, layer.compute_dtype)
            net = walk.run(RULES)
            links = walk.links

            def derived(variables: list[tf.Tensor]) -> list[tf.Tensor]:
                tensors = known.derived([link.tensor for link in links], variables)
                return [
                    tensor if link.layout is None else link.layout(tensor)
                    for link, tensor in zip(links, tensors, strict=True)
                ]

            weights = [link.weight for link in links]
            self.parts.append(Part(layer.graph_variables, weights, derived))
        if isinstance(net, dict):
            return {name: self._pooled(layer, tap) for name, tap in net.items()}
        return self._pooled(layer, net)

    def _pooled(self, layer: GraphLayer, net: Any) -> Any:
        if layer.pooling is None or len(net.shape) != 4:
            return net
        pools = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}
        parts = [
            pools[kind](
                name=self.names.unique(f"{kind}_over_space"),
                dtype=layer.compute_dtype,
                data_format="channels_last",
            )(net)
            for kind in layer.pooling.split("_")
        ]
        if len(parts) == 1:
            return parts[0]
        name = self.names.unique("avg_max_over_space")
        return keras.layers.Concatenate(name=name, dtype=layer.compute_dtype)(parts)

    def _as_input(self, network: Network, net: Any) -> Any:
        """What ``network_function.as_input`` does."""
        shape = network.input_shape
        if shape is not None and (len(shape), len(net.shape)) == (2, 4):
            net = keras.layers.Flatten(
                name=self.names.unique("flatten"), data_format="channels_last"
            )(net)
        dtype = network.input_dtype
        if dtype is None or dtype.name == net.dtype:
            return net
        if dtype.is_integer:
            net = keras.ops.clip(keras.ops.round(net), dtype.min, dtype.max)
        return keras.ops.cast(net, dtype.name)

    def _head(self, head: Head, net: Any) -> Any:
        if len(net.shape) == 4:
            net = keras.layers.GlobalAveragePooling2D(
                name=self.names.unique("average"), dtype="float32", data_format="channels_last"
            )(net)
        if head.stop_gradient:
            net = keras.ops.stop_gradient(net)
        for number, layer in enumerate([*head.hidden_layers, head.classifier], 1):
            if head.dropout:
                name = self.names.unique(f"head_dropout_{number}")
                net = keras.layers.Dropout(head.dropout, name=name, dtype="float32")(net)
            name = "head" if layer is head.classifier else f"head_{layer.name}"
            net = self._copy(layer, net, name)
        return net

    def _copy(self, layer: keras.layers.Layer, net: Any, name: str | None = None) -> Any:
        """A copy of a stock layer, with its weights."""
        config = layer.get_config() | {"name": self.names.unique(name or layer.name)}
        copy = type(layer).from_config(config)
        net = copy(net)
        copy.set_weights(layer.get_weights())
        self.parts.append(Part(layer.weights, copy.weights, lambda values: values))
        return net
