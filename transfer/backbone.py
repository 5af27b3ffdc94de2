"""A meta graph as an ordinary Keras layer, with real weights, cut at any tensor."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer import taps
from transfer.distribution import seed_of_replica
from transfer.gradients import with_fast_gradients
from transfer.head import average_over_space
from transfer.metagraph import MetaGraph
from transfer.policy import RANDOM_OPS
from transfer.surgery import SEED, Network, Variable, canonical, cut, is_seeded

Pooling = Literal["avg", None]


@keras.saving.register_keras_serializable("vgg_transfer")
class GraphLayer(keras.layers.Layer):
    """A network's arithmetic as a layer: differentiable with respect to input and weights.

    Args:
        network: what to compute.
        values: name of a variable to its value, or to a Keras variable that is then shared.
        pooling: ``"avg"`` averages a 4-D result over height and width; ``None`` leaves it as it is.
    """

    def __init__(
        self,
        network: Network,
        values: Mapping[str, Any],
        *,
        pooling: Pooling = None,
        **kwargs: Any,
    ):
        # The graph says which types it computes in; a mixed-precision policy must not change them.
        super().__init__(autocast=False, **kwargs)
        self.network = network
        self.pooling = pooling
        self.graph_variables = [
            self._variable(variable, values[variable.name]) for variable in network.variables
        ]
        self._inference = as_function(network)
        # In training only: a SavedModel cannot hold what computes a gradient in a way of its own.
        for_training = with_fast_gradients(network.training or network.graph_def)
        self._training = as_function(replace(network, graph_def=for_training))
        # A seed is drawn only where one is needed: an evaluation must not change what the next step
        # of a training run draws.
        self._draws = {False: is_seeded(network.graph_def), True: is_seeded(for_training)}
        if any(self._draws.values()):
            self._seeds = keras.random.SeedGenerator()
        self.built = True

    def _variable(self, variable: Variable, value: Any) -> keras.Variable:
        if isinstance(value, keras.Variable):
            return value
        return self.add_weight(
            shape=value.shape,
            dtype=variable.dtype.name,
            initializer=lambda shape, dtype: value,
            trainable=variable.trainable,
            autocast=False,
            name=variable.name.replace("/", "."),  # Keras allows no slash
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The network's output; with ``training``, dropout of the graph is on."""
        run = self._training if training else self._inference
        seed = None
        if self._draws[bool(training)]:
            seed = tf.cast(seed_of_replica(self._seeds.next()), tf.int32)
        outputs = run(inputs, [variable.value for variable in self.graph_variables], seed)
        return average_over_space(outputs) if self.pooling == "avg" else outputs

    def split(self, at: str) -> tuple[GraphLayer, GraphLayer]:
        """Cut in two: ``suffix(prefix(x))`` is ``self(x)``. The weights are shared, not copied.

        Args:
            at: tensor or operation that separates the input from the tap, or a short name of it
                (``pool4`` for ``vgg_16/pool4/MaxPool:0``). The prefix gives it as it is, the
                suffix takes it.

        Raises:
            ValueError: if it is not in between, a branch goes round it, or there are several.
        """
        shared = dict(zip(self.variable_names, self.graph_variables, strict=True))
        first, second = cut(self.network, self.tensor(at))
        return (
            GraphLayer(first, shared, name=f"{self.name}_prefix"),
            GraphLayer(second, shared, pooling=self.pooling, name=f"{self.name}_suffix"),
        )

    def tensor(self, name: str) -> str:
        """The full name of a tensor of the network, by a name that may be short.

        Raises:
            ValueError: if there are several; lists them.
        """
        network = self.network
        if canonical(name) == network.input:
            return network.input
        found = taps.find(network.graph_def.node, name, [network.input])
        if len(found) > 1:
            raise ValueError(f"{name!r} may be {', '.join(found[:8])}; name the one that you mean")
        return found[0] if found else canonical(name)

    @property
    def variable_names(self) -> list[str]:
        """Names in the graph (``conv1_1/weights``), in the order of ``graph_variables``."""
        return [variable.name for variable in self.network.variables]

    def values(self) -> dict[str, Any]:
        """Name in the graph to the present value of the variable."""
        return {
            name: variable.value
            for name, variable in zip(self.variable_names, self.graph_variables, strict=True)
        }

    def digest(self) -> str:
        """Hexadecimal SHA-256 of what decides the results of inference: graph, pooling, weights."""
        network = self.network
        facts = [network.input, network.output, network.input_dtype, network.batch_size]
        digest = hashlib.sha256(repr([*facts, self.pooling]).encode())
        digest.update(network.graph_def.SerializeToString(deterministic=True))
        for name, value in self.values().items():
            value = np.ascontiguousarray(tf.convert_to_tensor(value))
            digest.update(repr([name, value.dtype.str, value.shape]).encode())
            digest.update(value.view(np.uint8).data if value.size else b"")
        return digest.hexdigest()

    def randomize(self, seed: int) -> None:
        """Forget what was learnt: He-normal weights (arXiv 1502.01852); scales and variances of
        batch norm 1, all else of one dimension 0."""
        generator = np.random.default_rng(seed)
        for name, variable in zip(self.variable_names, self.graph_variables, strict=True):
            shape = tuple(variable.shape)
            if len(shape) > 1:
                value = generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
            else:
                value = np.full(shape, float(name.endswith(("gamma", "variance"))))
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """All of the network, so that a Keras model with this layer can be saved and loaded."""
        network = self.network
        return super().get_config() | {
            "graph_defs": [
                base64.b64encode(graph_def.SerializeToString()).decode("ascii")
                for graph_def in network.graphs
            ],
            "batch_size": network.batch_size,
            "input_shape": network.input_shape,
            "input": network.input,
            "input_dtype": network.input_dtype.name if network.input_dtype else None,
            "output": network.output,
            "variables": [
                [name, variable.dtype, list(variable.shape), variable.trainable]
                for name, variable in zip(self.variable_names, self.graph_variables, strict=True)
            ],
            "pooling": self.pooling,
        }

    @property
    def random_nodes(self) -> list[str]:
        """Nodes that draw random numbers, in inference or in training."""
        nodes = [node for graph_def in self.network.graphs for node in graph_def.node]
        return list(dict.fromkeys(node.name for node in nodes if node.op in RANDOM_OPS))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraphLayer:
        config = dict(config)
        input_dtype = config.pop("input_dtype")
        graphs = [GraphDef.FromString(base64.b64decode(g)) for g in config.pop("graph_defs")]
        network = Network(
            graph_def=graphs[0],
            training=graphs[1] if graphs[1:] else None,
            batch_size=config.pop("batch_size"),
            input_shape=(shape := config.pop("input_shape")) and tuple(shape),
            input=config.pop("input"),
            input_dtype=tf.as_dtype(input_dtype) if input_dtype else None,
            output=config.pop("output"),
            variables=tuple(
                Variable(name, tf.as_dtype(dtype), tuple(shape), trainable)
                for name, dtype, shape, trainable in config.pop("variables")
            ),
        )
        values = {v.name: tf.zeros(v.shape, v.dtype) for v in network.variables}
        # A subclass builds itself from files; here all is at hand, and Keras needs the same class.
        layer = cls.__new__(cls)
        GraphLayer.__init__(layer, network, values, **config)
        return layer


@keras.saving.register_keras_serializable("vgg_transfer")
class Backbone(GraphLayer):
    """A pretrained network, from its input to a tap, as a Keras layer.

    Calling it gives features, float ``[batch, width]``: a tap of four dimensions is averaged over
    height and width, which is flattening where they are 1x1. It expects preprocessed images; see
    ``transfer.preprocess``.

    Args:
        graph: from ``load_meta_graph``. Only the weights that the tap needs are read.
        tap: tensor or operation with the features.
        input: tensor or operation that takes the images; found by itself where there is but one.
        feeds: values of other placeholders, e.g. ``{"Placeholder_2:0": 0.8}``. A ``keep_prob`` and
            an ``is_training`` are found by what they feed and need no value.
        keep_dropout: leave dropout on in inference where the graph has it always on.
        use_ema: take the moving averages of the weights, where the checkpoint has them.
        pooling: ``None`` gives the tap as it is.

    Raises:
        ValueError: if a tensor is unknown (near names are suggested) or the weights do not fit.
        FileNotFoundError: if a file of the checkpoint is missing.
        ForbiddenOpError: if the tap needs more than arithmetic.

    Example:
        graph = load_meta_graph("pretrained/vgg_small")
        model = keras.Sequential([keras.Input((64, 64, 3)), Backbone(graph), keras.layers.Dense(2)])
    """

    def __init__(
        self,
        graph: MetaGraph,
        tap: str = "fc7",
        *,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
        use_ema: bool = False,
        pooling: Pooling = "avg",
        **kwargs: Any,
    ):
        self.graph = graph
        network = graph.network(tap, input, feeds, keep_dropout)
        values = graph.read(network.variables, use_ema)
        super().__init__(network, values, pooling=pooling, **kwargs)


def as_function(network: Network) -> Any:
    """``(inputs, list of weights, seed) -> output`` as a ``tf.function`` of its own.

    A function of its own, because a gradient tape does not see operations that are imported into
    the function in which it was opened. The seed, int32 ``[2]``, may be ``None`` where no random
    numbers are drawn.
    """
    names = [canonical(variable.name) for variable in network.variables]

    def apply(inputs: tf.Tensor, weights: list[tf.Tensor], seed: tf.Tensor | None) -> tf.Tensor:
        tensors = {network.input: inputs, **dict(zip(names, weights, strict=True))}
        if network.output in tensors:
            return tf.identity(tensors[network.output])
        tensors[SEED] = tf.zeros([2], tf.int32) if seed is None else seed
        # Each graph has its own part of the weights. The identity brings a tensor of an outer
        # function into this one, which the import does not.
        used = {canonical(edge) for node in network.graph_def.node for edge in node.input}
        return tf.graph_util.import_graph_def(
            network.graph_def,
            input_map={name: tf.identity(t) for name, t in tensors.items() if name in used},
            return_elements=[network.output],
            name="network",
        )[0]

    def run(inputs: tf.Tensor, weights: list[tf.Tensor], seed: tf.Tensor | None) -> tf.Tensor:
        inputs = as_input(network, inputs)
        if network.batch_size is None:
            return apply(inputs, weights, seed)

        def one(batch: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
            own = None if seed is None else tf.random.fold_in(seed, number)
            return apply(batch, weights, own)

        return _in_batches(one, inputs, network.batch_size)

    return tf.function(run, autograph=False, reduce_retracing=True)


def as_input(network: Network, images: tf.Tensor) -> tf.Tensor:
    """Images in the type that a network takes, and as vectors where it takes vectors."""
    if network.input_shape is not None and (len(network.input_shape), images.ndim) == (2, 4):
        images = tf.reshape(images, [-1, math.prod(images.shape[1:])])
    if network.input_dtype not in (None, images.dtype):
        if network.input_dtype.is_integer:
            images = tf.round(tf.cast(images, tf.float32))
        images = tf.saturate_cast(images, network.input_dtype)
    return images


def _in_batches(function: Any, inputs: tf.Tensor, size: int) -> tf.Tensor:
    """Apply a function that takes just ``size`` examples to any number of them; the last are filled
    up with the first ones, and what comes of those is dropped."""
    count = tf.shape(inputs)[0]
    num_batches = -(-count // size)
    missing = tf.range(num_batches * size - count) % tf.maximum(count, 1)
    filled = tf.concat([inputs, tf.gather(inputs, missing)], 0)
    batches = tf.reshape(filled, tf.concat([[num_batches, size], tf.shape(inputs)[1:]], 0))
    batches = tf.ensure_shape(batches, [None, size, *inputs.shape[1:]])
    one_batch = tf.TensorSpec([size, *inputs.shape[1:]], inputs.dtype)
    number = tf.TensorSpec([], tf.int32)
    (output,) = tf.function(function).get_concrete_function(one_batch, number).outputs
    outputs = tf.map_fn(
        lambda batch: function(*batch),
        (batches, tf.range(num_batches)),
        fn_output_signature=tf.TensorSpec(output.shape, output.dtype),
    )
    return tf.reshape(outputs, tf.concat([[-1], tf.shape(outputs)[2:]], 0))[:count]
