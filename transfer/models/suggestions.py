"""Suggest the first fine-tuning command for a model, or explain why there is none."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import (
    Network,
    ancestors,
    dtype_of,
    find_modes,
    graph_preprocessing,
    inputs,
    placeholders,
    static_shape,
)
from transfer.images.preprocess import Size, canonical, show_size
from transfer.models import checkpoint
from transfer.models.meta_graph import MetaGraph, SharedBatchError
from transfer.models.plan import check_images, fitting_size, plan

_MAX_INPUTS = 6
_ANY_SIDE = 224


@dataclass(frozen=True)
class Suggestion:
    """``command`` passed ``plan.plan``; if it is ``None``, ``problem`` gives the reason and an
    alternative. ``network`` is the network that the command uses."""

    command: str | None = None
    problem: str | None = None
    network: Network | None = None


def suggest(graph: MetaGraph, taps: Sequence[str]) -> Suggestion:
    """Suggest the first command to try.

    Args:
        graph: the model.
        taps: its feature tensors, best first.
    """
    if not taps:
        return Suggestion(problem="no layer of a network was found in it; name a tensor with --tap")
    try:
        return _for_tap(graph, taps[0])
    except (ValueError, OSError) as error:
        problem = str(error)
    for tap in taps[1:]:
        try:
            other = _for_input(graph, tap, None)
        except (ValueError, OSError):
            continue
        is_input = other.network is not None and other.network.output == other.network.input
        if other.command is not None and not is_input:
            short = tap.removesuffix(":0")
            return Suggestion(problem=f"{problem}. Tap {short!r} works: {other.command}")
    return Suggestion(problem=problem)


def _for_tap(graph: MetaGraph, tap: str) -> Suggestion:
    """The command for a tap, with the graph's own input or with a tensor after it as the input.

    Raises:
        ValueError, OSError: if there is none; with the reason.
    """
    problem: ValueError | OSError
    try:
        return _for_input(graph, tap, None)
    except checkpoint.MismatchError:
        raise
    except SharedBatchError as error:
        problem, others = error, list(error.inputs)
    except (ValueError, OSError) as error:
        problem, others = error, inputs.candidates(list(graph.nodes.values()), tap)
    for input in others[:_MAX_INPUTS]:
        try:
            return _for_input(graph, tap, input)
        except checkpoint.MismatchError:
            raise
        except (ValueError, OSError):
            continue
    raise problem


def _for_input(graph: MetaGraph, tap: str, input: str | None) -> Suggestion:
    feeds = {name: _value(graph, name) for name in unknown_feeds(graph, tap, input)}
    try:
        network = graph.network(tap, input, feeds)
    except SharedBatchError:
        raise
    except ValueError as error:
        shapes = {name: static_shape(graph.node(name)) for name in feeds}
        wide = {name: shape for name, shape in shapes.items() if shape}
        if not wide:
            raise
        shown = ", ".join(f"{name} of shape {shape}" for name, shape in wide.items())
        raise ValueError(
            f"the tap also depends on {shown}, which a single number cannot replace; choose a tap "
            "before it"
        ) from error
    mode = canonical(graph.card.preprocess or _likely_convention(network))
    size = _size(graph, network, mode)
    words = ["vgg-transfer", "finetune", "--model", str(graph.prefix)]
    words += (
        [] if graph.card.tap and graph.tensor(graph.card.tap) == tap else ["--tap", _short(tap)]
    )
    words += [] if input is None else ["--input", _short(input)]
    for name, value in feeds.items():
        words += ["--feed", f"{name}={str(value).lower()}"]
    words += [] if graph.card.preprocess else ["--preprocess", mode]
    words += [] if size is None else ["--image-size", show_size(size)]
    planned = partial(plan, tap=tap, input=input, feeds=feeds, preprocess=mode, image_size=size)
    words += [f"--rename={part}={other}" for part, other in graph.rename.items()]
    try:
        try:
            planned(graph)
        except checkpoint.MismatchError as error:
            graph, use_ema, flag = _other_reading(graph, network, error)
            planned(graph, use_ema=use_ema)
            words.append(flag)
        graph.check_files(network.variables)
    except FileNotFoundError as error:
        return Suggestion(None, f"{error}. With it: {shlex.join(words)}", network)
    return Suggestion(shlex.join(words), None, network)


def _other_reading(
    graph: MetaGraph, network: Network, error: checkpoint.MismatchError
) -> tuple[MetaGraph, bool, str]:
    """The graph with a rename, or with moving averages instead of the weights; and the flag for it.

    Raises:
        MismatchError: if the checkpoint suggests neither.
    """
    if error.rename is not None:
        part, other = error.rename
        renamed = replace(graph, rename=dict(graph.rename) | {part: other})
        return renamed, False, f"--rename={part}={other}"
    try:
        graph.match(network.variables, use_ema=True)
    except ValueError:
        raise error from None
    return graph, True, "--use-ema"


def unknown_feeds(graph: MetaGraph, tap: str, input: str | None) -> list[str]:
    """Placeholders that a tap depends on and whose purpose cannot be inferred from their use."""
    upstream = upstream_of(graph, tap, input)
    if input is None:
        try:
            feeds = {graph.tensor(name): value for name, value in graph.card.feeds.items()}
            input = graph.tensor(graph.card.input or graph.find_input(tap, feeds))
        except ValueError:
            return []
        upstream = upstream_of(graph, tap, input)
    known = {mode.tensor for mode in find_modes(upstream, input)} | {input}
    known |= {graph.tensor(name) for name in graph.card.feeds}
    names = [f"{node.name}:0" for node in placeholders(upstream)]
    return [name for name in names if name not in known]


def upstream_of(graph: MetaGraph, tap: str | None, input: str | None) -> list[NodeDef]:
    """The nodes between an input, or the graph's sources, and a tap; empty if they cannot be
    determined."""
    if tap is None:
        return []
    try:
        return ancestors(graph.nodes.values(), tap, stop_at=[input] if input else [])
    except ValueError:
        return []


def _value(graph: MetaGraph, name: str) -> float | bool:
    """A default value for a placeholder, of its dtype."""
    dtype = dtype_of(graph.node(name))
    return False if dtype is not None and dtype.is_bool else 1.0


def _size(graph: MetaGraph, network: Network, mode: str) -> Size | None:
    """The image size to pass, ``None`` if the model states it.

    Raises:
        ValueError: if the input takes no images, or needs a non-square size that it does not state.
    """
    try:
        graph.preprocess(network.input, mode)
    except ValueError:
        prepared = graph.preprocess(network.input, mode, _ANY_SIDE)
        fitting = fitting_size(network, prepared)
        if fitting is None:
            check_images(network, prepared)  # raises: it does not fit at 224 pixels either
        return fitting
    return None


def _likely_convention(network: Network) -> str:
    """A guess: networks named like VGG mostly use the original weights, with their convention."""
    if network.input_dtype is not None and network.input_dtype.is_integer:
        return "none"
    prepared = graph_preprocessing.find(network)
    if prepared.means or prepared.swaps:
        # The graph expects 0..255, unless it multiplies by 255 first.
        return "unit" if any(scale > 1 for scale in prepared.scales) else "none"
    channels = (network.input_shape or (3,))[-1]
    is_vgg = any("conv5_3" in v.name or "conv3_3" in v.name for v in network.variables)
    return "caffe" if is_vgg and channels == 3 else "unit"


def _short(tensor: str) -> str:
    return tensor.removesuffix(":0")
