"""A meta graph as a Keras layer, from its images to one tap or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import keras

from transfer.core.tensors import Tensor
from transfer.layers.graph_layer import GraphLayer, Output, Pooling
from transfer.layers.head import check_eager
from transfer.models.meta_graph import MetaGraph, load_meta_graph


@keras.saving.register_keras_serializable("vgg_transfer")
class Backbone(GraphLayer[Output]):
    """A pretrained network, from its input to a tap, as a Keras layer.

    It outputs features, float ``[batch, width]``: a 4-D tap is averaged over height and width
    (global average pooling; at 1x1 the same as flattening). It expects preprocessed images; see
    ``transfer.images.preprocess``.

    Given several taps, it computes all of them in one forward pass and outputs a dict, tap name to
    features, by default as in the graph: a 4-D tap is ``[batch, height, width, channels]``. A tap
    need not separate input from output: it may be inside a branch.

    Args:
        graph: from ``load_meta_graph``, or the path of a model to load with it. Only the weights
            that the tap depends on are read.
        tap: tensor or operation that outputs the features; defaults to the card's, else ``fc7``. A
            list or tuple of several makes the output a dict with these names. ``"all"`` is every
            activation after a nonlinearity, up to the default tap: a dict of features ``[batch,
            width]``, averages and maxima, which ``build_head`` concatenates.
        input: tensor or operation that takes the images; detected if the graph has only one.
        feeds: values of other placeholders, e.g. ``{"Placeholder_2:0": 0.8}``. ``keep_prob`` and
            ``is_training`` placeholders are recognized by what they feed and need no value.
        keep_dropout: keep dropout active at inference where the graph always applies it.
        use_ema: load the exponential moving averages of the weights where the checkpoint has them.
        pooling: ``"avg"`` or ``"max"`` reduces a 4-D tap over height and width, ``"avg_max"``
            concatenates both, ``None`` does not reduce it. ``"auto"`` is ``"avg"`` for one tap,
            ``None`` for several, ``"avg_max"`` for ``"all"``.

    Raises:
        TypeError: if ``graph`` is neither a ``MetaGraph`` nor a path, or ``tap`` is neither a name
            nor a list or tuple of names.
        ValueError: if a tensor is unknown (similar names are suggested) or the weights do not fit.
        RuntimeError: in a TF1 graph.
        FileNotFoundError: if a file of the checkpoint is missing.
        ForbiddenOpError: if the tap depends on operations that are not pure computation.

    Example:
        >>> import keras
        >>> from transfer import Backbone, load_meta_graph
        >>> backbone = Backbone(load_meta_graph("pretrained/vgg_small"), tap="fc7")
        >>> model = keras.Sequential([keras.Input((64, 64, 3)), backbone, keras.layers.Dense(2)])
        >>> model.output_shape
        (None, 2)
        >>> prefix, suffix = backbone.split(at="pool4")  # suffix(prefix(x)) is backbone(x)
        >>> pyramid = Backbone("pretrained/vgg_small", tap=["pool3", "pool4"])
        >>> {name: maps.shape[1:3] for name, maps in pyramid(keras.Input((64, 64, 3))).items()}
        {'pool3': (8, 8), 'pool4': (4, 4)}
    """

    @overload
    def __init__(
        self: Backbone[dict[str, Tensor]],
        graph: MetaGraph | str | Path,
        tap: Literal["all"],
        *,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
        use_ema: bool = False,
        pooling: Pooling | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None: ...

    @overload
    def __init__(
        self: Backbone[Tensor],
        graph: MetaGraph | str | Path,
        tap: str | None = None,
        *,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
        use_ema: bool = False,
        pooling: Pooling | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None: ...

    @overload
    def __init__(
        self: Backbone[dict[str, Tensor]],
        graph: MetaGraph | str | Path,
        tap: list[str] | tuple[str, ...],
        *,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
        use_ema: bool = False,
        pooling: Pooling | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None: ...

    def __init__(
        self,
        graph: MetaGraph | str | Path,
        tap: str | list[str] | tuple[str, ...] | None = None,
        *,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
        use_ema: bool = False,
        pooling: Pooling | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        check_eager("Backbone")
        if isinstance(graph, str | Path):
            graph = load_meta_graph(graph)
        if not isinstance(graph, MetaGraph):
            raise TypeError(
                f"graph is of type {type(graph).__name__}; expected what load_meta_graph gives, or "
                "the path of a model"
            )
        self.graph = graph
        network = graph.network(tap, input, feeds, keep_dropout)
        if pooling == "auto":
            pooling = "avg_max" if tap == "all" else None if network.taps else "avg"
        values = graph.read(network.variables, use_ema)
        super().__init__(network, values, pooling=pooling, **kwargs)
