"""Validate how a model is to be used (tap, input, preprocessing) before any weights are read.

Fine-tuning starts with this check, and the commands that ``inspect`` suggests have passed it.
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from transfer.graph import (
    SEED,
    Network,
    Shape,
    ancestors,
    canonical,
    concatenated,
    constant,
    data_inputs,
    dtype_of,
    infer,
    operation_of,
    with_nodes,
)
from transfer.images.preprocess import Mode, Preprocess, Size, show_size
from transfer.models.meta_graph import MetaGraph

_LARGEST_SIDE = 1024
_USUAL_SIDES = (224, 256, 299, 227, 192, 160, 128, 112, 96, 64, 48, 32, 28)
_ONE_BATCH = 12


@dataclass(frozen=True)
class ModelPlan:
    """How features are computed from images: ``preprocess``, then ``network`` up to ``tap``.

    With several taps, the network outputs them pooled and concatenated; ``tensors`` are these
    taps, also where ``tap`` is ``all``.
    """

    tap: str | list[str]
    network: Network
    preprocess: Preprocess
    tensors: list[str] = field(default_factory=list)


def plan(
    graph: MetaGraph,
    tap: str | Sequence[str] | None = None,
    *,
    input: str | None = None,
    feeds: Mapping[str, float | bool] | None = None,
    keep_dropout: bool = False,
    use_ema: bool = False,
    preprocess: str | None = None,
    image_size: Size | None = None,
) -> ModelPlan:
    """Resolve and validate how a model is used; runs nothing and needs only the checkpoint's index.

    Args:
        graph: the model.
        tap: tensor with the features, or several, or ``all``; defaults to the card's, else ``fc7``.
        input: tensor that takes the images, see ``MetaGraph.network``.
        feeds: values of placeholders, see ``MetaGraph.network``.
        keep_dropout: see ``MetaGraph.network``.
        use_ema: see ``MetaGraph.read``.
        preprocess: see ``MetaGraph.preprocess``.
        image_size: see ``MetaGraph.preprocess``.

    Raises:
        ValueError: if there is no such network, it does not accept images of this size, does not
            output a vector or feature maps per image, or the checkpoint lacks its variables.
        FileNotFoundError: if there is no checkpoint.
        ForbiddenOpError: if the tap depends on operations that are not pure computation.
    """
    tap = tap or graph.card.tap or "fc7"
    tensors: str | list[str] = "all"
    if tap != "all":
        tensors = graph.tensor(tap) if isinstance(tap, str) else [*map(graph.tensor, tap)]
    separate = graph.network(tensors, input, feeds, keep_dropout)
    _check_dtypes(separate)
    network = concatenated(separate, "avg_max" if tap == "all" else "avg")
    prepared = graph.preprocess(network.input, preprocess, image_size)
    check_images(network, prepared)
    graph.match(network.variables, use_ema)
    return ModelPlan(tensors, network, prepared, list(separate.taps.values()))


def cut_tensor(graph: MetaGraph, network: Network, name: str) -> str:
    """The full name of a tensor to cut a network at: one of its own, such as that of concatenated
    taps, else one of the graph, whose name may be short.

    Raises:
        ValueError: if there is no such tensor, or there are several.
    """
    own = {node.name for node in network.graph_def.node}
    return canonical(name if operation_of(name) in own else graph.tensor(name))


def _check_dtypes(network: Network) -> None:
    """Refuse taps that are not floating-point numbers, such as the mask of a dropout."""
    by_name = {node.name: node for node in network.graph_def.node}
    for tensor in network.outputs:
        name, _, index = tensor.partition(":")
        is_input = tensor == network.input
        dtype = (
            None if is_input or name not in by_name else dtype_of(by_name[name], int(index or 0))
        )
        if dtype is not None and not dtype.is_floating:
            raise ValueError(f"tap {tensor!r} is of {dtype.name}; features are floating-point")


def check_images(network: Network, preprocess: Preprocess) -> None:
    """Check by shape inference that a network outputs features for these images.

    Raises:
        ValueError: if it does not; suggests an image size that fits.
    """
    problem = _problem(network, preprocess)
    if problem is None:
        return
    if network.input_shape is not None and len(network.input_shape) == 2:
        raise ValueError(problem)
    if _states_size(network):
        raise ValueError(problem)
    fitting, flatten = fitting_size(network, preprocess), _flatten(network)
    if fitting is not None:
        problem += f"; images of {show_size(fitting)} pixels fit"
    elif flatten is not None:
        problem += (
            f"; no square size fits, for {flatten[0]!r} must have {flatten[1]} numbers an image: "
            "give an image size like 100x200"
        )
    raise ValueError(problem)


def _problem(network: Network, preprocess: Preprocess) -> str | None:
    """The reason why a network outputs no features for these images; ``None`` if it does."""
    if network.output == network.input:
        return None
    shown = f"{preprocess.height}x{preprocess.width}"
    one: tuple[int | None, ...] = preprocess.shape
    if network.input_shape is not None and len(network.input_shape) == 2:
        one = network.input_shape[1:]
    batch = network.batch_size or _ONE_BATCH
    try:
        shape = _output_shape(network, (batch, *one))
    except ValueError as error:
        if "elements, more than" in str(error):
            return None  # too large as a batch; single images may fit
        return f"images of {shown} pixels do not fit the graph: {_reason(error)}"
    if shape is None:
        return None
    if len(shape) not in (2, 4):
        return (
            f"tap {network.output!r} has shape {shape}; expected features [batch, width], or "
            "feature maps [batch, height, width, channels]"
        )
    if shape[0] not in (None, batch):
        return (
            f"tap {network.output!r} gives {shape[0]} rows for {batch} images of {shown} pixels; "
            "expected one for each image"
        )
    return None


def _output_shape(network: Network, input_shape: tuple[int | None, ...]) -> Shape:
    shaped = replace(network, input_shape=input_shape, training=None)
    return infer(shaped)[network.output]


def _reason(error: Exception) -> str:
    """The message of TensorFlow, without the definition of the node."""
    text = " ".join(str(error).removeprefix("the graph is damaged: ").split())
    return re.sub(r"'?{{node (?:n/)?(.*?)}}.*", r"'\1'", text)


def _states_size(network: Network) -> bool:
    shape = network.input_shape
    return shape is not None and len(shape) == 4 and None not in shape[1:3]


def fitting_size(network: Network, preprocess: Preprocess) -> Size | None:
    """A square image size that fits a network whose input size is not fixed; ``None`` if none fits.

    A common size if one fits, else a size that the first flattening requires.
    """

    def fits(side: int) -> bool:
        sized = Preprocess(cast(Mode, preprocess.mode), side, preprocess.channels)
        return _problem(network, sized) is None

    return next(filter(fits, (*_USUAL_SIDES, *_sides_of_flatten(network, preprocess))), None)


def _sides_of_flatten(network: Network, preprocess: Preprocess) -> list[int]:
    """Image sides for which the feature maps before the flattening have the number of values that
    it, or the matrix product after it, requires; sorted by divisibility by powers of 2."""
    flatten = _flatten(network)
    if flatten is None:
        return []
    maps, length = flatten
    before = replace(
        network,
        graph_def=with_nodes(
            network.graph_def,
            ancestors(
                network.graph_def.node,
                maps,
                [network.input, SEED, *(v.name for v in network.variables)],
            ),
        ),
        training=None,
        output=maps,
    )

    @functools.cache
    def numbers(side: int) -> int:
        try:
            shape = _output_shape(before, (1, side, side, preprocess.channels))
        except ValueError:
            return 0  # image smaller than a window
        if shape is None or None in shape[1:]:
            return 0
        return math.prod(size or 1 for size in shape[1:])

    sides = range(1, _LARGEST_SIDE + 1)  # the number of values grows with the image
    first, end = bisect_left(sides, length, key=numbers), bisect_right(sides, length, key=numbers)
    return sorted(sides[first:end], key=lambda side: (-(side & -side), side))


def _flatten(network: Network) -> tuple[str, int] | None:
    """The feature maps that are flattened, and the required length of the vector per image."""
    by_name = {node.name: node for node in network.graph_def.node}
    shapes = infer(replace(network, training=None)) if network.input_shape else {}
    widths = {v.name: v.shape[0] for v in network.variables if v.shape and len(v.shape) == 2}
    readers = {
        canonical(data_inputs(node)[0]): widths.get(operation_of(data_inputs(node)[1]))
        for node in network.graph_def.node
        if node.op == "MatMul"
    }
    for node in network.graph_def.node:
        if node.op != "Reshape":
            continue
        maps = canonical(node.input[0])
        if len(shapes.get(maps) or ()) != 4:
            continue
        target = constant(by_name.get(operation_of(node.input[1])))
        length = readers.get(f"{node.name}:0")
        if target is not None and target.size == 2 and target.ravel()[1] > 0:
            length = int(target.ravel()[1])
        if length:
            return maps, int(length)
    return None
