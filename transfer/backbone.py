"""A meta graph as an ordinary Keras layer, with real weights, cut at any tensor."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.head import average_over_space
from transfer.metagraph import MetaGraph
from transfer.policy import RANDOM_OPS
from transfer.surgery import Network, Variable, canonical, cut

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
        self._function = as_function(network)
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

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        outputs = self._function(inputs, [variable.value for variable in self.graph_variables])
        return average_over_space(outputs) if self.pooling == "avg" else outputs

    def split(self, at: str) -> tuple[GraphLayer, GraphLayer]:
        """Cut in two: ``suffix(prefix(x))`` is ``self(x)``. The weights are shared, not copied.

        Args:
            at: tensor or operation that separates the input from the tap. The prefix gives it as it
                is, the suffix takes it.

        Raises:
            ValueError: if it is not in between, or a branch goes round it.
        """
        shared = dict(zip(self.variable_names, self.graph_variables, strict=True))
        first, second = cut(self.network, at)
        return (
            GraphLayer(first, shared, name=f"{self.name}_prefix"),
            GraphLayer(second, shared, pooling=self.pooling, name=f"{self.name}_suffix"),
        )

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
            "graph_def": base64.b64encode(network.graph_def.SerializeToString()).decode("ascii"),
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
        """Nodes that draw random numbers; with a ``keep_prob`` of 1.0 they change nothing."""
        return [node.name for node in self.network.graph_def.node if node.op in RANDOM_OPS]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraphLayer:
        config = dict(config)
        input_dtype = config.pop("input_dtype")
        network = Network(
            graph_def=GraphDef.FromString(base64.b64decode(config.pop("graph_def"))),
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
        feeds: values of other placeholders, e.g. ``{"Placeholder_2:0": 1.0}`` for a ``keep_prob``.
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
        pooling: Pooling = "avg",
        **kwargs: Any,
    ):
        network = graph.network(tap, input, feeds)
        super().__init__(network, graph.read(network.variables), pooling=pooling, **kwargs)


def as_function(network: Network) -> Any:
    """``(inputs, list of weights) -> output`` as a ``tf.function`` of its own.

    A function of its own, because a gradient tape does not see operations that are imported into
    the function in which it was opened.
    """

    def run(inputs: tf.Tensor, weights: list[tf.Tensor]) -> tf.Tensor:
        if network.input_dtype is not None:
            if network.input_dtype.is_integer:
                inputs = tf.round(tf.cast(inputs, tf.float32))
            inputs = tf.saturate_cast(inputs, network.input_dtype)
        names = [canonical(variable.name) for variable in network.variables]
        tensors = {network.input: inputs, **dict(zip(names, weights, strict=True))}
        if network.output in tensors:
            return tf.identity(tensors[network.output])
        return tf.graph_util.import_graph_def(
            network.graph_def,
            input_map=tensors,
            return_elements=[network.output],
            name="network",
        )[0]

    return tf.function(run, autograph=False, reduce_retracing=True)
