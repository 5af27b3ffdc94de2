"""A meta graph as an ordinary Keras layer, with real weights, cut at any tensor."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.core.distribution import seed_of_replica
from transfer.graph import (
    Network,
    Variable,
    canonical,
    cut,
    dtype_of,
    find_scales,
    infer,
    is_seeded,
    split_tensor_name,
    taps,
)
from transfer.graph.network_function import as_function
from transfer.graph.policy import RANDOM_OPS
from transfer.layers.gradients import with_cpu_gradients
from transfer.layers.head import average_over_space, check_eager
from transfer.models.meta_graph import MetaGraph, load_meta_graph

Pooling = Literal["avg", "max", None]
POOLINGS: tuple[Pooling, ...] = ("avg", "max", None)
MAX_GRAPH_BYTES = 2**28
"""Of a graph in a saved Keras model; those of large networks have a few million."""


@keras.saving.register_keras_serializable("vgg_transfer")
class SharedVariables:
    """The variables that several layers have in common, those of a network and of its parts.

    It says in the configuration of each that they are the same, so that the layers of a loaded
    model share them again.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, keras.Variable] = {}

    def serialized(self) -> dict[str, Any]:
        """As ``keras.saving.serialize_keras_object`` does it, but marked as shared each time: Keras
        marks the second time only, and a copy of the first."""
        config = keras.saving.serialize_keras_object(self)
        return config | {"shared_object_id": id(self)}

    def get_config(self) -> dict[str, Any]:
        """Nothing to save: the layers save their variables themselves."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedVariables:
        """An empty one, which loaded layers fill."""
        return cls(**config)


@keras.saving.register_keras_serializable("vgg_transfer")
class GraphLayer(keras.layers.Layer):
    """A network's arithmetic as a layer: differentiable with respect to input and weights.

    It computes in the type that the graph says, whatever the dtype policy.

    Args:
        network: what to compute.
        values: name of a variable to its value, to an initializer, or to a Keras variable that is
            then shared.
        pooling: ``"avg"`` and ``"max"`` take the mean and the maximum of a 4-D result over height
            and width; ``None`` leaves it as it is.
        shared: where the layers that share the variables know each other from.

    Raises:
        ValueError: if ``pooling`` is unknown, or ``dtype`` another than the graph's.
        RuntimeError: in a TF1 graph.
    """

    def __init__(
        self,
        network: Network,
        values: Mapping[str, Any],
        *,
        pooling: Pooling = None,
        shared: SharedVariables | None = None,
        **kwargs: Any,
    ):
        check_eager(type(self).__name__)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not known; choose from: 'avg', 'max', None")
        super().__init__(autocast=False, dtype=_dtype(network, kwargs.pop("dtype", None)), **kwargs)
        self.network = network
        self.pooling = pooling
        self.shared = SharedVariables() if shared is None else shared
        self._initial: tf.Tensor | None = None
        # Keras saves variables in the order in which they come in here, whoever made them.
        self.graph_variables: list[keras.Variable] = []
        for variable in network.variables:
            self.graph_variables.append(self._variable(variable, values[variable.name]))
        self._inference = as_function(network)
        # In training only: a SavedModel cannot hold what computes a gradient in a way of its own.
        for_training = with_cpu_gradients(network.training or network.graph_def)
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
        made = self.add_weight(
            shape=variable.shape if callable(value) else value.shape,
            dtype=variable.dtype.name,
            initializer=value if callable(value) else lambda shape, dtype: value,
            trainable=variable.trainable,
            autocast=False,
            name=variable.name.replace("/", "."),  # Keras allows no slash
        )
        self.shared.by_name[variable.name] = made
        return made

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The network's output; with ``training``, dropout of the graph is on.

        Raises:
            ValueError: if the inputs have another shape than the graph takes (tf.errors.
                InvalidArgumentError where that is not known before it runs), or the output does
                not have a row for each of them.
        """
        if not tf.executing_eagerly():
            check_eager(type(self).__name__)
        if self._initial is not None:
            self._warn_if_new()
        run = self._training if training else self._inference
        seed = None
        if self._draws[bool(training)]:
            seed = tf.cast(seed_of_replica(self._seeds.next()), tf.int32)
        outputs = run(inputs, [variable.value for variable in self.graph_variables], seed)
        if self.pooling == "max" and outputs.shape.rank == 4:
            return tf.reduce_max(outputs, axis=[1, 2])
        return outputs if self.pooling is None else average_over_space(outputs)

    def _warn_if_new(self) -> None:
        """Once, where a layer that was made from a configuration is used with the weights that it
        began with."""
        with keras.SymbolicScope() as scope:
            if scope.original_scope is not None:
                return  # shapes only
        with tf.init_scope():
            is_new = bool(tf.reduce_all(tf.equal(self._initial, self._first_kernel())))
        self._initial = None
        if is_new:
            warnings.warn(
                f"layer {self.name!r} was made from a configuration, which holds no weights: they "
                "are random, not pretrained. keras.models.clone_model and keras.wrappers copy no "
                "weights; call clone.set_weights(model.get_weights()), or give the wrapper a "
                "function that makes the model, or warm_start=True",
                stacklevel=2,
            )

    def _first_kernel(self) -> tf.Tensor | None:
        kernels = [v for v in self.graph_variables if len(v.shape) > 1]
        return tf.convert_to_tensor(kernels[0]) if kernels else None

    def split(self, at: str) -> tuple[GraphLayer, GraphLayer]:
        """Cut in two: ``suffix(prefix(x))`` is ``self(x)``. The weights are shared, not copied.

        Args:
            at: tensor or operation that separates the input from the tap, or a short name of it
                (``pool4`` for ``vgg_16/pool4/MaxPool:0``). The prefix gives it as it is, the
                suffix takes it.

        Raises:
            ValueError: if it is not in between, a branch goes round it, or there are several.
        """
        variables = dict(zip(self.variable_names, self.graph_variables, strict=True))
        first, second = cut(self.network, self.tensor(at))
        if second.input != self.network.input:
            nodes = {node.name: node for node in self.network.graph_def.node}
            operation, index = split_tensor_name(second.input)
            second = replace(second, input_dtype=dtype_of(nodes[operation], index))
            with contextlib.suppress(ValueError):  # no shapes without a batch size
                second = replace(second, input_shape=infer(self.network).get(second.input))
        options: dict[str, Any] = {"shared": self.shared}
        return (
            GraphLayer(first, variables, name=f"{self.name}_prefix", **options),
            GraphLayer(
                second, variables, pooling=self.pooling, name=f"{self.name}_suffix", **options
            ),
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
        normalisations 1, all else of one dimension 0."""
        generator = np.random.default_rng(seed)
        scales = _scales(self.network)
        for name, variable in zip(self.variable_names, self.graph_variables, strict=True):
            shape = tuple(variable.shape)
            if not tf.as_dtype(variable.dtype).is_floating:
                continue  # nothing learnt
            if len(shape) > 1:
                value = generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
            else:
                value = np.full(shape, float(name in scales))
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """All of the network, so that a Keras model with this layer can be saved and loaded.

        The graphs are compressed: Keras prints the configuration of a layer that it does not know.
        """
        network = self.network
        graphs = [graph_def.SerializeToString() for graph_def in network.graphs]
        return super().get_config() | {
            "graph_sizes": [len(graph) for graph in graphs],
            "compressed_graphs": base64.b64encode(zlib.compress(b"".join(graphs), 9)).decode(),
            "batch_size": network.batch_size,
            "input_shape": network.input_shape,
            "input": network.input,
            "input_dtype": network.input_dtype.name if network.input_dtype else None,
            "output": network.output,
            "variables": [
                [known.name, variable.dtype, list(variable.shape), known.trainable]
                for known, variable in zip(network.variables, self.graph_variables, strict=True)
            ],
            "pooling": self.pooling,
            "shared": self.shared.serialized(),
            "to_load_it": "import transfer before keras.models.load_model",
        }

    @property
    def random_nodes(self) -> list[str]:
        """Nodes that draw random numbers, in inference or in training."""
        nodes = [node for graph_def in self.network.graphs for node in graph_def.node]
        return list(dict.fromkeys(node.name for node in nodes if node.op in RANDOM_OPS))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraphLayer:
        """A layer with new weights as Keras' layers have them: He normal, see ``randomize``. Learnt
        values come with ``load_model`` or ``set_weights``."""
        config = dict(config)
        config.pop("to_load_it", None)
        config.pop("dtype", None)  # the graph says it
        input_dtype = config.pop("input_dtype")
        graphs = _graphs(config)
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
        shared = config.pop("shared", None)
        shared = (
            SharedVariables() if shared is None else keras.saving.deserialize_keras_object(shared)
        )
        if not isinstance(shared, SharedVariables):
            raise ValueError("the model is damaged: its layers share something else than variables")
        # A subclass builds itself from files; here all is at hand, and Keras needs the same class.
        layer = cls.__new__(cls)
        values = _initializers(network) | shared.by_name
        GraphLayer.__init__(layer, network, values, shared=shared, **config)
        layer._initial = layer._first_kernel()
        return layer


@keras.saving.register_keras_serializable("vgg_transfer")
class Backbone(GraphLayer):
    """A pretrained network, from its input to a tap, as a Keras layer.

    Calling it gives features, float ``[batch, width]``: a tap of four dimensions is averaged over
    height and width, which is flattening where they are 1x1. It expects preprocessed images; see
    ``transfer.images.preprocess``.

    Args:
        graph: from ``load_meta_graph``, or the path of a model for it. Only the weights that the
            tap needs are read.
        tap: tensor or operation with the features; by default the card's, or else ``fc7``.
        input: tensor or operation that takes the images; found by itself where there is but one.
        feeds: values of other placeholders, e.g. ``{"Placeholder_2:0": 0.8}``. A ``keep_prob`` and
            an ``is_training`` are found by what they feed and need no value.
        keep_dropout: leave dropout on in inference where the graph has it always on.
        use_ema: take the moving averages of the weights, where the checkpoint has them.
        pooling: ``"max"`` takes the maximum over height and width; ``None`` gives the tap as it is.

    Raises:
        TypeError: if ``graph`` is neither a ``MetaGraph`` nor a path.
        ValueError: if a tensor is unknown (near names are suggested) or the weights do not fit.
        RuntimeError: in a TF1 graph.
        FileNotFoundError: if a file of the checkpoint is missing.
        ForbiddenOpError: if the tap needs more than arithmetic.

    Example:
        >>> import keras
        >>> from transfer import Backbone, load_meta_graph
        >>> backbone = Backbone(load_meta_graph("pretrained/vgg_small"), tap="fc7")
        >>> model = keras.Sequential([keras.Input((64, 64, 3)), backbone, keras.layers.Dense(2)])
        >>> model.output_shape
        (None, 2)
        >>> prefix, suffix = backbone.split(at="pool4")  # suffix(prefix(x)) is backbone(x)
    """

    def __init__(
        self,
        graph: MetaGraph | str | Path,
        tap: str | None = None,
        *,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
        use_ema: bool = False,
        pooling: Pooling = "avg",
        **kwargs: Any,
    ):
        check_eager("Backbone")
        if isinstance(graph, str | Path):
            graph = load_meta_graph(graph)
        if not isinstance(graph, MetaGraph):
            raise TypeError(
                f"graph is of type {type(graph).__name__}; expected what load_meta_graph gives, or "
                "the path of a model"
            )
        self.graph = graph
        network = graph.network(tap or graph.card.tap or "fc7", input, feeds, keep_dropout)
        values = graph.read(network.variables, use_ema)
        super().__init__(network, values, pooling=pooling, **kwargs)


def _dtype(network: Network, asked_for: Any) -> str:
    """The type that a network computes in: that of its weights, or else of its output."""
    nodes = {node.name: node for node in network.graph_def.node}
    operation, index = split_tensor_name(network.output)
    kinds = [v.dtype for v in network.variables if v.dtype.is_floating]
    kinds += [dtype_of(nodes[operation], index)] if operation in nodes else [network.input_dtype]
    dtype = next((kind.name for kind in kinds if kind is not None and kind.is_floating), "float32")
    if asked_for not in (None, dtype):
        asked_for = getattr(asked_for, "name", asked_for)
        if asked_for != dtype:
            raise ValueError(f"dtype={asked_for!r}, but the graph computes in {dtype}")
    return dtype


def _scales(network: Network) -> set[str]:
    return find_scales(network.graph_def.node, [v.name for v in network.variables])


def _initializers(network: Network) -> dict[str, keras.initializers.Initializer]:
    scales = _scales(network)
    return {
        v.name: keras.initializers.HeNormal()
        if len(v.shape or ()) > 1 and v.dtype.is_floating
        else keras.initializers.Constant(float(v.name in scales))
        for v in network.variables
    }


def _graphs(config: dict[str, Any]) -> list[GraphDef]:
    """The graphs of a configuration, which are taken out of it."""
    if "graph_defs" in config:  # not compressed, as in older files
        return [GraphDef.FromString(base64.b64decode(g)) for g in config.pop("graph_defs")]
    stream, data = zlib.decompressobj(), b""
    sizes = config.pop("graph_sizes")
    with contextlib.suppress(zlib.error):
        data = stream.decompress(base64.b64decode(config.pop("compressed_graphs")), MAX_GRAPH_BYTES)
    if not stream.eof or len(data) != sum(sizes):
        raise ValueError(
            f"the model is damaged: its graph is not whole, or has over {MAX_GRAPH_BYTES:,} bytes"
        )
    ends = [*itertools.accumulate(sizes)]
    return [
        GraphDef.FromString(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)
    ]
