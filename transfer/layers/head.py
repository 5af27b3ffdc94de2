"""A new classification head on top of features, for TF1, Keras and eager tensors.

``build_head`` is the short form. ``Head`` is the Keras layer it uses: create it directly to reuse
its weights after the call, above all with eager tensors. In a TF1 graph the head consists of
``tf.compat.v1`` variables and named tensors instead, as TF1 programs expect.

Data contract: features ``[batch, width]``, or ``[batch, height, width, channels]``, which are
averaged over height and width (at 1x1 the same as flattening); or a mapping of names to such
features, those of several taps, which are then concatenated. Logits are float32
``[batch, num_classes]``.
"""

from __future__ import annotations

import functools
import itertools
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import keras
import numpy as np
import tensorflow as tf

from transfer.core.distribution import seed_of_replica
from transfer.core.tensors import Tensor, TensorLike

Features: TypeAlias = TensorLike | Mapping[str, TensorLike]
"""Features of a tap, or of several by name."""
tf1 = tf.compat.v1


@keras.saving.register_keras_serializable("vgg_transfer")
class Head(keras.layers.Layer):
    """A softmax classifier as a Keras layer: features to logits.

    Features of several taps are averaged over height and width and concatenated, in the order of
    the dict with which the head is called first; later calls find them by name.

    Args:
        num_classes: width of the logits, at least 1.
        stop_gradient: do not propagate gradients to the features.
        hidden: widths of ReLU layers before the classifier (He-normal weights, biases 0).
        dropout: fraction of the features, and of each hidden layer's output, dropped in training.
        weights_stddev: standard deviation of the classifier's truncated normal initial weights.
        bias: initial value of its biases. 0.05 for both is customary for this recipe.
        seed: for reproducible initial weights and dropout.

    It computes in float32 regardless of the dtype policy, as Keras recommends for the last layer.

    Raises:
        TypeError: if a width is not an integer.
        ValueError: if a width, ``dropout`` or ``weights_stddev`` is out of range, or ``dtype`` is
            not float32.
        RuntimeError: in a TF1 graph.

    Example:
        >>> import numpy as np
        >>> from transfer import Head
        >>> head = Head(num_classes=3, hidden=[64], dropout=0.5, seed=1)
        >>> head(np.ones((2, 512), np.float32), training=True).shape
        TensorShape([2, 3])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        stop_gradient: bool = False,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        weights_stddev: float = 0.05,
        bias: float = 0.05,
        seed: int | None = None,
        **kwargs: Any,
    ):
        check_eager("Head")
        num_classes, hidden = _widths(num_classes, hidden)
        _check(num_classes, hidden, dropout, weights_stddev, bias)
        dtype = kwargs.pop("dtype", None) or "float32"
        if dtype != "float32" and getattr(dtype, "name", dtype) != "float32":
            raise ValueError(f"dtype={dtype!r}, but a head computes in float32")
        super().__init__(autocast=False, dtype="float32", **kwargs)
        self.num_classes = num_classes
        self.stop_gradient = stop_gradient
        self.hidden = hidden
        self.dropout = dropout
        self.weights_stddev = weights_stddev
        self.bias = bias
        self.seed = seed
        self.taps: tuple[str, ...] = ()
        seeds = _seeds(seed)
        self.hidden_layers = [
            keras.layers.Dense(
                width,
                "relu",
                kernel_initializer=keras.initializers.HeNormal(next(seeds)),
                name=f"hidden_{number}",
                dtype="float32",
            )
            for number, width in enumerate(self.hidden, 1)
        ]
        self.dropout_layers = [
            ReplicaDropout(dropout, seed=next(seeds), dtype="float32")
            for _ in range(len(self.hidden) + 1)
        ]
        self.classifier = keras.layers.Dense(
            num_classes,
            kernel_initializer=keras.initializers.TruncatedNormal(0.0, weights_stddev, next(seeds)),
            bias_initializer=keras.initializers.Constant(bias),
            name="classifier",
            dtype="float32",
        )

    if TYPE_CHECKING:

        def __call__(  # noqa: D102
            self, features: Features, training: bool = False
        ) -> Tensor: ...

    def build(self, input_shape: Any) -> None:
        """Create the weights for features of this shape, or of these shapes by name."""
        self.taps = tuple(input_shape) if isinstance(input_shape, Mapping) else ()
        width = _total_width(input_shape)
        for layer in (*self.hidden_layers, self.classifier):
            layer.build((None, width))
            width = layer.units
        super().build(input_shape)

    def call(self, features: Any, training: bool = False) -> tf.Tensor:
        """Logits, float32 ``[batch, num_classes]``.

        Raises:
            ValueError: if the features are of other taps than in the first call.
        """
        if isinstance(features, Mapping) and self.taps:
            if {*features} != {*self.taps}:
                raise ValueError(
                    f"the features are of {', '.join(features)}; this head was built for those of "
                    f"{', '.join(self.taps)}"
                )
            features = {name: features[name] for name in self.taps}
        net = as_vector(features)
        net = tf.stop_gradient(net) if self.stop_gradient else net
        for dropout, layer in zip(
            self.dropout_layers, [*self.hidden_layers, self.classifier], strict=True
        ):
            net = layer(dropout(net, training=training))
        return net

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """``(batch, num_classes)``."""
        if isinstance(input_shape, Mapping):
            input_shape = next(iter(input_shape.values()))
        return (input_shape[0], self.num_classes)

    def values(self) -> dict[str, Any]:
        """Maps the TF1 name of each variable, relative to the head's scope, to its value."""
        layers = {"": self.classifier} | {f"{layer.name}/": layer for layer in self.hidden_layers}
        return {
            prefix + name: variable.value
            for prefix, layer in layers.items()
            for name, variable in (("weights", layer.kernel), ("biases", layer.bias))
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        names = (
            "num_classes",
            "stop_gradient",
            "hidden",
            "dropout",
            "weights_stddev",
            "bias",
            "seed",
        )
        return super().get_config() | {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Head:
        """A head from what ``get_config`` returned."""
        # Older files contain the dtype policy that was active when they were written.
        return cls(**{name: value for name, value in config.items() if name != "dtype"})


class ReplicaDropout(keras.layers.Dropout):
    """Keras' ``Dropout`` with a different mask on each replica."""

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The inputs; in training a fraction ``rate`` is set to zero and the rest scaled up."""
        if not training or not self.rate:
            return inputs
        seed = seed_of_replica(self.seed_generator.next())
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed=seed)


@overload
def build_head(
    features: Features,
    num_classes: int,
    stop_gradient: bool = False,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    weights_stddev: float = 0.05,
    bias: float = 0.05,
    *,
    seed: int | None = None,
    name: str | None = None,
    return_probabilities: Literal[False] = False,
) -> Tensor: ...


@overload
def build_head(
    features: Features,
    num_classes: int,
    stop_gradient: bool = False,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    weights_stddev: float = 0.05,
    bias: float = 0.05,
    *,
    seed: int | None = None,
    name: str | None = None,
    return_probabilities: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def build_head(
    features: Any,
    num_classes: int,
    stop_gradient: bool = False,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    weights_stddev: float = 0.05,
    bias: float = 0.05,
    *,
    seed: int | None = None,
    name: str | None = None,
    return_probabilities: bool = False,
) -> Any:
    """Append a new softmax classifier to features.

    Args:
        features: a tensor of a TF1 graph, a Keras tensor or an eager tensor, float ``[batch,
            width]`` or ``[batch, height, width, channels]``; or a dict of such tensors, e.g. the
            output of a ``Backbone`` with several taps, which are concatenated in its order.
        num_classes: width of the logits, at least 1.
        stop_gradient: do not propagate gradients to the features.
        hidden: widths of ReLU layers before the classifier.
        dropout: fraction of the features, and of each hidden layer's output, dropped in training.
        weights_stddev: standard deviation of the classifier's initial weights.
        bias: initial value of its biases.
        seed: for reproducible initial weights and dropout.
        name: name of the Keras layer, or of the scope in a TF1 graph; defaults to "head". In a TF1
            graph the tensors are ``<name>/logits:0`` and ``<name>/probabilities:0``, the variables
            ``<name>/weights``, ``<name>/biases``, ``<name>/hidden_1/weights`` ..., and with dropout
            ``<name>/keep_prob:0`` is 1.0 unless it is fed. If the name is taken, ``_1`` is
            appended.
        return_probabilities: also return the softmax of the logits.

    Returns:
        Logits ``[batch, num_classes]``; or ``(logits, probabilities)``.

    Raises:
        TypeError: if a width is not an integer.
        ValueError: if the features are not 2-D or 4-D or have no static width, or an argument is
            out of range.

    Example:
        >>> import tensorflow as tf
        >>> from transfer import build_head
        >>> graph = tf.Graph()
        >>> with graph.as_default():
        ...     fc7 = tf.compat.v1.placeholder(tf.float32, [None, 4096], name="fc7")
        >>> build_head(graph.get_tensor_by_name("fc7:0"), num_classes=2, stop_gradient=True).name
        'head/logits:0'
    """
    options: dict[str, Any] = {
        "stop_gradient": stop_gradient,
        "hidden": hidden,
        "dropout": dropout,
        "weights_stddev": weights_stddev,
        "bias": bias,
        "seed": seed,
    }
    one: Any = next(iter(features.values()), None) if isinstance(features, Mapping) else features
    if _in_plain_graph(one):
        with one.graph.as_default():
            logits, probabilities = _build_in_graph(
                features, num_classes, name=name or "head", **options
            )
        return (logits, probabilities) if return_probabilities else logits
    logits = Head(num_classes, name=name, **options)(features)
    return (logits, keras.ops.softmax(logits)) if return_probabilities else logits


def before_head(model: keras.Sequential) -> Callable[[Any], Any]:
    """A model without its last layer, the head: maps inputs to the features that the head takes."""
    *layers, _ = model.layers
    return lambda inputs: functools.reduce(lambda values, layer: layer(values), layers, inputs)


def average_over_space(features: Any) -> Any:
    """``[batch, height, width, channels]`` to ``[batch, channels]``; 2-D features are unchanged.

    Raises:
        ValueError: for any other rank.
    """
    _feature_width(features.shape)
    return tf.reduce_mean(features, axis=[1, 2]) if len(features.shape) == 4 else features


def as_vector(features: Any) -> tf.Tensor:
    """Features as the input of a head: float32 ``[batch, width]``.

    Args:
        features: float ``[batch, width]`` or ``[batch, height, width, channels]``, which are
            averaged over height and width; or a mapping of names to such features, which are
            concatenated in its order.

    Raises:
        ValueError: for features of any other rank.
    """
    if not isinstance(features, Mapping):
        return average_over_space(tf.cast(features, tf.float32))
    _total_width({name: value.shape for name, value in features.items()})
    return tf.concat([as_vector(value) for value in features.values()], axis=-1)


def check_eager(layer: str) -> None:
    """Check that a Keras layer is not used while a TF1 graph is built, which could not run it.

    Raises:
        RuntimeError: in a TF1 graph; the message gives the alternatives.
    """
    if not tf1.executing_eagerly_outside_functions():
        raise RuntimeError(
            f"{layer} is a Keras layer: it works eagerly and in a tf.function, not inside "
            "tf.Graph().as_default(); leave the graph's context, or, in a TF1 program, import the "
            "meta graph with tf.compat.v1.train.import_meta_graph and give its tap to build_head"
        )


def _in_plain_graph(features: Any) -> bool:
    """Whether a tensor belongs to a TF1 graph, run by sessions, and not to a ``tf.function``."""
    return (
        tf.is_tensor(features)
        and not isinstance(features, keras.KerasTensor)
        and not hasattr(features, "numpy")
        and not getattr(features.graph, "building_function", False)
    )


def _build_in_graph(
    features: Any,
    num_classes: int,
    *,
    name: str,
    stop_gradient: bool,
    hidden: Sequence[int],
    dropout: float,
    weights_stddev: float,
    bias: float,
    seed: int | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    num_classes, hidden = _widths(num_classes, hidden)
    _check(num_classes, hidden, dropout, weights_stddev, bias)
    graph = next(iter(features.values())).graph if isinstance(features, Mapping) else features.graph
    seeds = _seeds(seed)
    of_dropout = _seeds(None if seed is None else seed + len(hidden) + 1)

    def dense(net: tf.Tensor, units: int, weights: Any, biases: Any) -> tf.Tensor:
        kernel = tf1.get_variable("weights", [net.shape[-1], units], net.dtype, weights)
        offset = tf1.get_variable("biases", [units], net.dtype, biases)
        return tf.nn.bias_add(tf.matmul(net, kernel), offset)

    with tf1.variable_scope(_free_scope(graph, name), reuse=False):
        net = as_vector(features)
        net = tf.stop_gradient(net) if stop_gradient else net
        rate = 1 - tf1.placeholder_with_default(1.0, [], name="keep_prob") if dropout else None
        for number, units in enumerate(hidden, 1):
            net = net if rate is None else tf.nn.dropout(net, rate, seed=next(of_dropout))
            with tf1.variable_scope(f"hidden_{number}"):
                he_normal = tf1.variance_scaling_initializer(2.0, "fan_in", seed=next(seeds))
                net = tf.nn.relu(dense(net, units, he_normal, tf1.zeros_initializer()))
        net = net if rate is None else tf.nn.dropout(net, rate, seed=next(of_dropout))
        normal = tf1.truncated_normal_initializer(0.0, weights_stddev, seed=next(seeds))
        net = dense(net, num_classes, normal, tf1.constant_initializer(bias))
        logits = tf.identity(net, name="logits")
        return logits, tf.nn.softmax(logits, name="probabilities")


def _free_scope(graph: tf.Graph, name: str) -> str:
    """``name``, or ``name_1`` ... if the current scope already has operations of that name."""
    outer = tf1.get_variable_scope().name
    prefix = f"{outer}/" if outer else ""
    names = [op.name for op in graph.get_operations()]
    free, numbers = name, itertools.count(1)
    while any(f"{taken}/".startswith(f"{prefix}{free}/") for taken in names):
        free = f"{name}_{next(numbers)}"
    return free


def _total_width(shapes: Any) -> int:
    """The width of features of a shape, or of all features whose shapes a mapping has."""
    if not isinstance(shapes, Mapping):
        return _feature_width(shapes)
    if not shapes:
        raise ValueError("features are an empty dict; expected those of one tap or more")
    widths = {}
    for name, shape in shapes.items():
        try:
            widths[name] = _feature_width(shape)
        except ValueError as error:
            raise ValueError(f"tap {name!r}: {error}") from None
    return sum(widths.values())


def _feature_width(shape: Sequence[int | None]) -> int:
    rank = None if getattr(shape, "rank", 0) is None else len(shape)
    if rank not in (2, 4) or shape[-1] is None:
        shown = tuple(shape) if rank is not None else "unknown"
        raise ValueError(
            f"features have shape {shown}; expected [batch, width] or [batch, height, width, "
            "channels] with a known last dimension"
        )
    return int(shape[-1])


def _widths(num_classes: Any, hidden: Any) -> tuple[int, tuple[int, ...]]:
    """Both as Python integers, which can be stored in a configuration."""
    if isinstance(hidden, str) or not isinstance(hidden, Iterable):
        raise TypeError(
            f"hidden is {hidden!r} of type {type(hidden).__name__}; expected a sequence of "
            "integers, e.g. (64,)"
        )
    widths = [_integer("a hidden width", width) for width in hidden]
    return _integer("num_classes", num_classes), tuple(widths)


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} is {value!r} of type {type(value).__name__}; expected an integer"
        ) from None


def _check(
    num_classes: int, hidden: Sequence[int], dropout: float, weights_stddev: float, bias: float
) -> None:
    numbers_given = {"dropout": dropout, "weights_stddev": weights_stddev, "bias": bias}
    for name, value in numbers_given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"{name} is {value!r} of type {type(value).__name__}; expected a number"
            )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden widths must be at least 1, got {tuple(hidden)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
    if weights_stddev < 0:
        raise ValueError(f"weights_stddev must not be negative, got {weights_stddev}")


def _seeds(seed: int | None) -> Any:
    """One seed per initializer or dropout layer: a common seed would repeat the same numbers."""
    return itertools.repeat(None) if seed is None else itertools.count(seed)
