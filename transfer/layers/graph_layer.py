"""A network as a Keras layer with trainable weights, cut at any tensor."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Literal, cast

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.core.distribution import seed_of_replica
from transfer.core.tensors import Tensor, TensorLike
from transfer.graph import (
    SEED,
    Network,
    Variable,
    activations,
    ancestors,
    canonical,
    concatenated,
    cut,
    dtype_of,
    find_scales,
    infer,
    is_seeded,
    operation_of,
    split_tensor_name,
    taps,
)
from transfer.graph.cuts import stages
from transfer.graph.graph_def import check
from transfer.graph.mixed_precision import in_mixed_precision, num_products
from transfer.graph.network_function import as_function
from transfer.graph.policy import RANDOM_OPS
from transfer.layers.gradients import with_cpu_gradients
from transfer.layers.head import average_over_space, check_eager

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Output = TypeVar("Output", default=Tensor)
else:
    from typing import TypeVar

    Output = TypeVar("Output")

Pooling = Literal["avg", "max", "avg_max", None]
POOLINGS: tuple[Pooling, ...] = ("avg", "max", "avg_max", None)
MIXED_PRECISIONS = ("mixed_bfloat16", "mixed_float16")
"""Keras dtype policies in which a network in float32 can compute; see ``GraphLayer``."""
MAX_GRAPH_BYTES = 2**28
"""Maximum size of the graphs in a saved Keras model; large networks have a few million bytes."""


@keras.saving.register_keras_serializable("vgg_transfer")
class SharedVariables:
    """Variables shared by several layers: a network and the parts it is split into.

    It is serialized in the configuration of each layer, so that the layers of a loaded model share
    their variables again.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, keras.Variable] = {}

    def serialized(self) -> dict[str, Any]:
        """Serialize with ``keras.saving.serialize_keras_object`` and always mark as shared.

        Keras itself adds the mark only from the second time on, and to a copy of the first.
        """
        config = keras.saving.serialize_keras_object(self)
        return config | {"shared_object_id": id(self)}

    def get_config(self) -> dict[str, Any]:
        """Empty: the layers save their variables themselves."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedVariables:
        """An empty instance, which the loaded layers fill."""
        return cls(**config)


@keras.saving.register_keras_serializable("vgg_transfer")
class GraphLayer(keras.layers.Layer, Generic[Output]):
    """A network as a Keras layer, differentiable with respect to its input and weights.

    It computes in the dtype of the graph, regardless of the global dtype policy. A graph in float32
    can compute its convolutions and matrix products in a lower precision: with
    ``dtype="mixed_bfloat16"``, or ``"mixed_float16"``, which needs loss scaling in training. Its
    weights and outputs stay in float32.

    The output of a network with several taps is a dict, tap name to features.

    Args:
        network: the network to compute.
        values: maps the name of each variable to its value, to an initializer, or to a Keras
            variable, which is then shared.
        pooling: ``"avg"`` and ``"max"`` reduce a 4-D output over height and width, ``"avg_max"``
            concatenates both; ``None`` returns it unchanged.
        shared: registry of the variables, common to all layers that share them.

    Raises:
        ValueError: if ``pooling`` is unknown, or ``dtype`` is neither the graph's nor a mixed
            precision.
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
            raise ValueError(
                f"pooling={pooling!r} is not known; choose from: 'avg', 'max', 'avg_max', None"
            )
        super().__init__(autocast=False, dtype=_dtype(network, kwargs.pop("dtype", None)), **kwargs)
        self.network = network
        self.pooling = pooling
        self.shared = SharedVariables() if shared is None else shared
        self._initial: tf.Tensor | None = None
        # Keras saves variables in the order of this list, whichever layer created them.
        self.graph_variables: list[keras.Variable] = []
        for variable in network.variables:
            self.graph_variables.append(self._variable(variable, values[variable.name]))
        computed = network
        if self.mixed_precision is not None:
            computed = in_mixed_precision(network, tf.as_dtype(self.compute_dtype))
        self._inference = as_function(computed)
        # In training only: a SavedModel cannot hold custom gradients.
        for_training = with_cpu_gradients(computed.training or computed.graph_def)
        self._training = as_function(replace(computed, graph_def=for_training))
        # A seed is drawn only where one is needed: an evaluation must not change the random numbers
        # of the following training steps.
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

    if TYPE_CHECKING:

        def __call__(self, inputs: TensorLike, training: bool = False) -> Output: ...  # noqa: D102

    def call(self, inputs: tf.Tensor, training: bool = False) -> Any:
        """The network's output; ``training=True`` enables the dropout of the graph.

        Raises:
            ValueError: if the shape of the inputs does not fit the graph
                (tf.errors.InvalidArgumentError where it is only known at run time), or the output
                does not have one row per input.
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
        if isinstance(outputs, dict):
            return {name: self._pooled(output) for name, output in outputs.items()}
        return self._pooled(outputs)

    def _pooled(self, output: tf.Tensor) -> tf.Tensor:
        if self.pooling == "max" and output.shape.rank == 4:
            return tf.reduce_max(output, axis=[1, 2])
        if self.pooling == "avg_max" and output.shape.rank == 4:
            parts = [average_over_space(output), tf.reduce_max(output, axis=[1, 2])]
            return tf.concat(parts, axis=-1)
        return output if self.pooling is None else average_over_space(output)

    def _warn_if_new(self) -> None:
        """Warn once if a layer made from a configuration is called with its initial weights."""
        with keras.SymbolicScope() as scope:
            if scope.original_scope is not None:
                return  # shape inference only
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

    @property
    def mixed_precision(self) -> str | None:
        """``"mixed_bfloat16"`` or ``"mixed_float16"``; ``None`` if it computes as the graph
        says."""
        name = self.dtype_policy.name
        return name if name in MIXED_PRECISIONS else None

    def in_mixed_precision(self, dtype: str) -> GraphLayer[Output]:
        """The same layer in another precision. Weights are shared, not copied.

        Args:
            dtype: ``"mixed_bfloat16"`` or ``"mixed_float16"``.

        Raises:
            ValueError: if the graph does not compute in float32, or has neither convolutions nor
                matrix products.

        Example:
            >>> import numpy as np
            >>> from transfer import Backbone
            >>> backbone = Backbone("pretrained/vgg_small")
            >>> images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
            >>> lower = backbone.in_mixed_precision("mixed_bfloat16")(images)
            >>> lower.dtype, float(abs(lower - backbone(images)).numpy().mean()) < 0.02
            (tf.float32, True)
        """
        if not num_products(self.network):
            raise ValueError(
                f"dtype={dtype!r} computes convolutions and matrix products in lower precision, "
                "and the network has none in float32"
            )
        return self._with_network(self.network, pooling=self.pooling, dtype=dtype)

    def split(self, at: str) -> tuple[GraphLayer[Tensor], GraphLayer[Output]]:
        """Split in two: ``suffix(prefix(x))`` equals ``self(x)``. Weights are shared, not copied.

        Args:
            at: tensor or operation that separates the input from the tap, or a short name of it
                (``pool4`` for ``vgg_16/pool4/MaxPool:0``). The prefix outputs it without pooling,
                the suffix takes it as input. With several taps, a tensor before the earliest; the
                suffix outputs the dict.

        Raises:
            ValueError: if it is not between input and tap, a branch bypasses it, or the name is
                ambiguous.
        """
        first, second = cut(self.network, self.tensor(at))
        if second.input != self.network.input:
            nodes = {node.name: node for node in self.network.graph_def.node}
            operation, index = split_tensor_name(second.input)
            second = replace(second, input_dtype=dtype_of(nodes[operation], index))
            with contextlib.suppress(ValueError):  # shapes cannot be inferred without a batch size
                second = replace(second, input_shape=infer(self.network).get(second.input))
        prefix = self._with_network(first, name=f"{self.name}_prefix")
        suffix = self._with_network(second, pooling=self.pooling, name=f"{self.name}_suffix")
        return prefix, suffix

    def concatenated(self) -> GraphLayer[Tensor]:
        """The taps as one feature vector: pooled over height and width and concatenated, in their
        order. Weights are shared, not copied.

        Pooling is that of this layer, else the average. The layer outputs float ``[batch, width]``,
        the tensor ``features:0`` of its graph, at which it can be split. Without several taps, it
        is this layer.

        Raises:
            ValueError: if a tap is neither ``[batch, width]`` nor ``[batch, height, width,
                channels]``.
        """
        if not self.network.taps:
            return cast("GraphLayer[Tensor]", self)
        return self._with_network(concatenated(self.network, self.pooling or "avg"))

    def activations(self, after: str | None = None) -> GraphLayer[Tensor]:
        """All activations as one feature vector: of the output of each nonlinearity the average and
        the maximum over height and width, in inference mode. Weights are shared, not copied. A
        layer without nonlinearities is ``concatenated``.

        Args:
            after: tensor that separates the input from the tap; activations before it are left out.
        """
        found = activations(self.network)
        if after is not None:
            later = cut(self.network, self.tensor(after))[1].graph_def.node
            names = {node.name for node in later}
            found = [tensor for tensor in found if operation_of(tensor) in names]
        if not found:
            return self.concatenated()
        taps_found = {tensor: tensor for tensor in found}
        # The graph for training may name them differently.
        network = replace(self.network, output=found[-1], taps=taps_found, training=None)
        return self._with_network(concatenated(network, "avg_max"))

    def in_inference_mode(self) -> GraphLayer[Output]:
        """The same layer, with the same weights, which ignores ``training=True``: dropout of the
        graph stays off, and gradients pass through."""
        network = replace(self.network, training=None)
        return self._with_network(network, pooling=self.pooling)

    def _with_network(self, network: Network, **options: Any) -> GraphLayer[Any]:
        """A layer that computes another network with the weights of this one, in its precision."""
        variables = dict(zip(self.variable_names, self.graph_variables, strict=True))
        like_this = {"shared": self.shared, "dtype": self.mixed_precision, "name": self.name}
        return GraphLayer(network, variables, **like_this | options)

    def tensor(self, name: str) -> str:
        """The full name of a tensor of the network, from a full or short name.

        Raises:
            ValueError: if the name is ambiguous; lists the candidates.
        """
        network = self.network
        if canonical(name) == network.input:
            return network.input
        matches = taps.find(network.graph_def.node, name, [network.input])
        if len(matches) > 1:
            raise ValueError(
                f"{name!r} may be {', '.join(matches[:8])}; name the one that you mean"
            )
        return matches[0] if matches else canonical(name)

    def freeze(self, until: str) -> None:
        """Freeze the weights up to a tensor; those after it are trained.

        Weights are shared with the layers that ``split`` and ``concatenated`` return, and so is
        whether they are frozen. Dropout before the tensor is not affected; ``split`` and call only
        the suffix with ``training=True`` to leave it out.

        Args:
            until: tensor that separates the input from the tap, or a short name; ``"none"`` freezes
                nothing, ``"tap"`` everything.

        Raises:
            ValueError: see ``split``.
        """
        after = set(self.variable_names) if until == "none" else set()
        if until not in ("none", "tap"):
            _, suffix = cut(self.network, self.tensor(until))
            after = {variable.name for variable in suffix.variables}
        for known, variable in zip(self.network.variables, self.graph_variables, strict=True):
            variable.trainable = known.trainable and known.name in after

    def blocks(self) -> dict[str, list[keras.Variable]]:
        """The weights by block, from the input to the tap: the name of the cut at the end of each
        block, such as ``pool4`` or ``fc6``, to its variables."""
        by_name = dict(zip(self.variable_names, self.graph_variables, strict=True))
        return {
            name: [by_name[variable] for variable in variables]
            for name, variables in stages(concatenated(self.network)).items()
        }

    @property
    def variable_names(self) -> list[str]:
        """Names in the graph (``conv1_1/weights``), in the order of ``graph_variables``."""
        return [variable.name for variable in self.network.variables]

    def values(self) -> dict[str, Any]:
        """Maps the name of each variable in the graph to its current value."""
        return {
            name: variable.value
            for name, variable in zip(self.variable_names, self.graph_variables, strict=True)
        }

    def digest(self) -> str:
        """Hexadecimal SHA-256 of everything that determines inference: graph, pooling, precision,
        weights."""
        network = self.network
        facts = [network.input, network.output, network.input_dtype, network.batch_size]
        facts += [[*network.taps.items()]] if network.taps else []
        facts += [self.mixed_precision] if self.mixed_precision else []
        digest = hashlib.sha256(repr([*facts, self.pooling]).encode())
        digest.update(network.graph_def.SerializeToString(deterministic=True))
        for name, value in self.values().items():
            value = np.ascontiguousarray(tf.convert_to_tensor(value))
            digest.update(repr([name, value.dtype.str, value.shape]).encode())
            digest.update(value.view(np.uint8).data if value.size else b"")
        return digest.hexdigest()

    def randomize(self, seed: int) -> None:
        """Reinitialize all weights.

        Kernels become He-normal (arXiv 1502.01852; depthwise ones as if they were dense), scales
        and variances of normalization layers 1, all other 1-D variables 0.
        """
        generator = np.random.default_rng(seed)
        scales = _scales(self.network)
        for name, variable in zip(self.variable_names, self.graph_variables, strict=True):
            shape = tuple(variable.shape)
            if not tf.as_dtype(variable.dtype).is_floating:
                continue  # not a learned value
            if len(shape) > 1:
                value = generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
            else:
                value = np.full(shape, float(name in scales))
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """The complete network, so that a Keras model with this layer can be saved and loaded.

        The graphs are compressed because Keras prints the configuration of an unknown layer.
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
            "taps": [[name, tensor] for name, tensor in network.taps.items()],
            "variables": [
                [known.name, variable.dtype, list(variable.shape), known.trainable]
                for known, variable in zip(network.variables, self.graph_variables, strict=True)
            ],
            # Keras restores ``trainable`` of the layer, not that of its variables.
            "frozen": [
                known.name
                for known, variable in zip(network.variables, self.graph_variables, strict=True)
                if self.trainable and known.trainable and not variable.trainable
            ],
            "pooling": self.pooling,
            "shared": self.shared.serialized(),
            "to_load_it": "import transfer before keras.models.load_model",
        }

    @property
    def random_nodes(self) -> list[str]:
        """Nodes that generate random numbers, at inference or in training."""
        nodes = [node for graph_def in self.network.graphs for node in graph_def.node]
        return list(dict.fromkeys(node.name for node in nodes if node.op in RANDOM_OPS))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraphLayer[Any]:
        """A layer with freshly initialized weights, see ``randomize``.

        ``load_model`` and ``set_weights`` restore the trained weights.
        """
        config = dict(config)
        config.pop("to_load_it", None)
        policy = keras.dtype_policies.get(config.pop("dtype", None)).name
        # Others are determined by the graph. Files with graph_defs have the global policy of their
        # program, which the layer ignored.
        if policy in MIXED_PRECISIONS and "graph_defs" not in config:
            config["dtype"] = policy
        input_dtype = config.pop("input_dtype")
        frozen = {*config.pop("frozen", [])}
        graphs = _graphs(config)
        network = Network(
            graph_def=graphs[0],
            training=graphs[1] if graphs[1:] else None,
            batch_size=config.pop("batch_size"),
            input_shape=(shape := config.pop("input_shape")) and tuple(shape),
            input=config.pop("input"),
            input_dtype=tf.as_dtype(input_dtype) if input_dtype else None,
            output=config.pop("output"),
            taps=dict(config.pop("taps", [])),
            variables=tuple(
                Variable(name, tf.as_dtype(dtype), tuple(shape), trainable)
                for name, dtype, shape, trainable in config.pop("variables")
            ),
        )
        leaves = [network.input, SEED, *(variable.name for variable in network.variables)]
        for graph_def in network.graphs:  # of a file that may be a stranger's
            check(graph_def.node)
            ancestors(graph_def.node, network.outputs, leaves)
        shared = config.pop("shared", None)
        shared = (
            SharedVariables() if shared is None else keras.saving.deserialize_keras_object(shared)
        )
        if not isinstance(shared, SharedVariables):
            raise ValueError(
                "the model is damaged: its layers share an object that is not SharedVariables"
            )
        # Subclasses read files in __init__. The configuration is complete, and Keras needs an
        # instance of the same class, so only GraphLayer.__init__ runs.
        layer = cls.__new__(cls)
        values = _initializers(network) | shared.by_name
        GraphLayer.__init__(layer, network, values, shared=shared, **config)
        layer._initial = layer._first_kernel()
        for name, variable in zip(layer.variable_names, layer.graph_variables, strict=True):
            if name in frozen:
                variable.trainable = False
        return layer


def _dtype(network: Network, requested: Any) -> str:
    """The dtype policy of a network: the dtype of its weights, else of its output; or a mixed
    precision, if requested."""
    nodes = {node.name: node for node in network.graph_def.node}
    operation, index = split_tensor_name(network.output)
    kinds = [v.dtype for v in network.variables if v.dtype.is_floating]
    kinds += [dtype_of(nodes[operation], index)] if operation in nodes else [network.input_dtype]
    dtype = next((kind.name for kind in kinds if kind is not None and kind.is_floating), "float32")
    if requested not in (None, dtype):
        requested = getattr(requested, "name", requested)
        if requested in MIXED_PRECISIONS and dtype == "float32":
            return str(requested)
        if requested != dtype:
            raise ValueError(f"dtype={requested!r}, but the graph computes in {dtype}")
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
    """Remove the graphs from a configuration and parse them."""
    if "graph_defs" in config:  # uncompressed, in older files
        return [GraphDef.FromString(base64.b64decode(g)) for g in config.pop("graph_defs")]
    stream, data = zlib.decompressobj(), b""
    sizes = config.pop("graph_sizes")
    with contextlib.suppress(zlib.error):
        data = stream.decompress(base64.b64decode(config.pop("compressed_graphs")), MAX_GRAPH_BYTES)
    if not stream.eof or len(data) != sum(sizes):
        raise ValueError(
            f"the model is damaged: its graph is incomplete, or has over {MAX_GRAPH_BYTES:,} bytes"
        )
    ends = [*itertools.accumulate(sizes)]
    return [
        GraphDef.FromString(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)
    ]
