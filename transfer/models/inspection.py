"""Inspect a model: inputs, taps, variables, their coverage by the checkpoint, and hazards.

The files are only parsed; nothing is run, and the weights are not needed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import (
    VARIABLES,
    Mode,
    Network,
    Variable,
    downstream,
    find_dropout,
    find_modes,
    graph_preprocessing,
    infer,
    operation_of,
)
from transfer.graph import variable as graph_variable
from transfer.graph.batch_statistics import batch_statistics
from transfer.graph.cuts import Cut, list_cuts, stopped
from transfer.graph.policy import RANDOM_OPS
from transfer.models import repair
from transfer.models.checkpoint import Checkpoint, average_entries, check_files
from transfer.models.formats import state
from transfer.models.meta_graph import MetaGraph, TensorInfo
from transfer.models.suggestions import suggest, unknown_feeds, upstream_of

Shape = tuple[int | None, ...] | None


@dataclass(frozen=True)
class Variables:
    """Number of variables and of their parameters, and their size in megabytes (10^6 bytes)."""

    count: int
    parameters: int
    megabytes: float


@dataclass(frozen=True)
class Coverage:
    """How far the checkpoint covers the variables of the graph.

    ``problem`` is the reason why it cannot be read, ``None`` if it can. ``matched`` counts matching
    variables, ``missing`` lists variables without a value, ``different`` those of another shape or
    dtype, ``extra`` the entries that belong to no variable.
    """

    prefix: str | None
    problem: str | None
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    has_averages: bool = False


@dataclass(frozen=True)
class Inspection:
    """The result of ``inspect``.

    ``variables`` are all variables of the graph, ``tap_variables`` those that the first tap depends
    on (including constant weights), ``feeds`` the placeholders that switch between training and
    inference, ``unknown_feeds`` other placeholders that the first tap depends on and that need a
    value. ``tap_error`` is the reason why the first tap cannot be used as a layer; ``None`` if it
    can. ``cuts`` are the cuts of its network, from input to output. ``all_taps`` maps each of the
    activations that the tap ``all`` stands for to its number of features, the average and the
    maximum of each channel; empty if there are none. ``command`` passed all checks with which
    fine-tuning starts; if it is ``None``, ``command_problem`` gives the reason and an alternative.
    """

    model: str
    format: str
    tensorflow_version: str
    operations: int
    inputs: list[TensorInfo]
    taps: list[TensorInfo]
    input: str | None
    tap_error: str | None
    variables: Variables
    tap_variables: Variables
    checkpoint: Coverage
    feeds: list[Mode]
    unknown_feeds: list[str]
    cuts: list[Cut]
    all_taps: dict[str, int]
    hazards: list[str]
    command: str | None
    command_problem: str | None


def inspect(graph: MetaGraph) -> Inspection:
    """Inspect a model.

    Raises:
        ValueError: if the graph is damaged.
    """
    nodes = list(graph.nodes.values())
    variables = [graph_variable(node) for node in nodes if node.op in VARIABLES]
    coverage = _coverage(graph, variables)
    found = graph.taps()
    first = found[0].name if found else None
    input, network, error = _try(graph, first)
    suggestion = suggest(graph, [tap.name for tap in found])
    shortcoming = None
    if network is None and suggestion.network is not None:
        network = suggestion.network
        shortcoming = error if network.input != input else None
        input, error = network.input, None
    upstream = upstream_of(graph, first, input)
    modes = find_modes(upstream, input)
    return Inspection(
        model=str(graph.prefix),
        format=graph.format,
        tensorflow_version=graph.tensorflow_version,
        operations=len(nodes),
        inputs=graph.inputs(input),
        taps=found,
        input=input,
        tap_error=error,
        variables=_sum(variables),
        tap_variables=_sum(network.variables if network else ()),
        checkpoint=coverage,
        feeds=modes,
        unknown_feeds=[] if first is None or input is None else unknown_feeds(graph, first, input),
        cuts=[] if network is None else list_cuts(network, graph.card.image_size),
        all_taps=_all_taps(graph, input),
        hazards=_hazards(graph, upstream, input, network, coverage, found)
        + (
            []
            if shortcoming is None
            else [f"the first tap needs {input!r} as its input: {shortcoming}"]
        )
        + ([] if error is None else [f"the first tap cannot be used: {error}"]),
        command=suggestion.command,
        command_problem=suggestion.problem,
    )


def _coverage(graph: MetaGraph, variables: Sequence[Variable]) -> Coverage:
    """Coverage by the checkpoint."""
    if not variables:
        return Coverage(None, None)
    prefix = graph.checkpoint_prefix or graph.prefix
    problem = None
    try:
        check_files(prefix)
    except FileNotFoundError as error:
        problem = str(error)
    try:
        source = Checkpoint(prefix, index_only=True)
        entries = graph.entries(source)
    except (OSError, ValueError) as error:
        return Coverage(str(prefix), problem or str(error))
    local = graph.local_variables
    variables = [variable for variable in variables if variable.name not in local]
    matched, missing, different = source.compare(variables, entries)
    keys = {entry.key for entry in matched.values()}
    try:
        has_averages = bool(average_entries([variable.name for variable in variables], source))
    except ValueError:
        has_averages = False
    return Coverage(
        str(prefix),
        problem,
        len(matched),
        missing,
        different,
        sorted(source.shapes.keys() - keys),
        has_averages,
    )


def _try(graph: MetaGraph, tap: str | None) -> tuple[str | None, Network | None, str | None]:
    """The input of a tap, the network between them, and an error message."""
    if tap is None:
        return None, None, "no layer of a network was found in it"
    input = None
    try:
        input = graph.card.input or graph.find_input(tap)
        return input, graph.network(tap, input), None
    except (ValueError, OSError) as error:
        return input, None, str(error)


def _all_taps(graph: MetaGraph, input: str | None) -> dict[str, int]:
    """The number of features of each activation of the tap ``all``."""
    try:
        network = graph.network("all", input)
    except (ValueError, OSError):
        return {}
    shapes = infer(network)
    widths = {}
    for name, tensor in network.taps.items():
        shape = shapes.get(tensor)
        width = shape[-1] if shape and len(shape) in (2, 4) else None
        if shape is None or width is None:
            return {}
        widths[name] = width * (2 if len(shape) == 4 else 1)
    return widths


def _sum(variables: Iterable[Variable]) -> Variables:
    sizes = [(math.prod(v.shape or ()), v.dtype.size) for v in variables]
    num_bytes = sum(count * size for count, size in sizes)
    return Variables(len(sizes), sum(count for count, _ in sizes), round(num_bytes / 1e6, 1))


def _hazards(
    graph: MetaGraph,
    upstream: Sequence[NodeDef],
    input: str | None,
    network: Network | None,
    coverage: Coverage,
    taps: Sequence[TensorInfo],
) -> list[str]:
    ops = Counter(node.op for node in graph.nodes.values())
    hazards = []
    if coverage.problem:
        hazards.append(coverage.problem)
    needed = {v.name for v in network.variables} if network else set()
    lacking = sorted(needed & set(coverage.missing))
    if lacking:
        hazards.append(
            f"the checkpoint lacks {len(lacking)} of the tap's variables: {_few(lacking)}"
        )
    named = state(graph.prefix.parent)
    if named and graph.checkpoint_prefix and named != graph.checkpoint_prefix.name:
        hazards.append(f"the state file names another checkpoint, {named!r}; it is ignored")
    devices = sorted({n.device for n in graph.nodes.values() if not _is_cpu(n.device)})
    if devices:
        hazards.append(f"pinned to devices ({_few(devices)}); devices are cleared")
    queues = [op for op in ops if "Queue" in op or "Reader" in op or op.startswith("Iterator")]
    if queues:
        hazards.append(f"has its own input pipeline ({_few(sorted(queues))}); it is removed")
    unresolved = repair.unresolved(graph.meta)
    if unresolved:
        hazards.append(
            f"collections refer to missing operations ({_few(unresolved)}); they are ignored"
        )
    loops = [node.name for node in graph.nodes.values() if node.op in ("Enter", "While")]
    if loops:
        hazards.append(f"has while loops ({_few(loops[:1])}); nothing inside can be tapped")
    live = downstream(upstream, [input] if input else [])
    dropouts = find_dropout(upstream, live)
    constant = [d.node for d in dropouts if graph.nodes[operation_of(d.amount)].op == "Const"]
    if constant and network is not None and network.training is not None:
        hazards.append(
            f"dropout is always on ({_few(constant)}); bypassed at inference, active in training"
        )
    noise = [
        n.name
        for n in upstream
        if n.op in RANDOM_OPS and n.name not in {d.uniform for d in dropouts}
    ]
    if noise:
        hazards.append(
            f"random numbers before the tap ({_few(noise)}): features differ from run to run"
        )
    if mixing := batch_statistics(network) if network is not None else []:
        hazards.append(
            f"features depend on the other images of a batch ({_few(mixing)}): batch norm before "
            "the tap uses their statistics, also at inference"
        )
    for tensor, names in (stopped(network) if network is not None else {}).items():
        hazards.append(
            f"stops gradients at {tensor!r}: variables before it stay untrained under any "
            f"freeze_until ({len(names)} variables: {_few(names)})"
        )
    if network is not None and network.batch_size is not None:
        hazards.append(f"takes batches of {network.batch_size} only; others are padded")
    prepared = graph_preprocessing.find(network) if network is not None else None
    if prepared:
        mode = graph.card.preprocess
        twice = prepared.repeats(mode) if mode else None
        hazards.append(
            f"the graph preprocesses its images itself: it {prepared}"
            + (f"; preprocess {mode} would {twice} again" if twice else "")
        )
    if graph.card.preprocess is None:
        hazards.append(
            "the preprocessing of the images is unknown; preprocess=MODE is a guess, check it"
        )
    if coverage.has_averages:
        hazards.append("the checkpoint has moving averages of the weights; use_ema=True takes them")
    copies = _copies(taps)
    if copies > 1:
        hazards.append(f"{copies} copies of the network, or heads; the taps of each are listed")
    return hazards


def _is_cpu(device: str) -> bool:
    return re.fullmatch(r"(/device:|/)?(cpu:0)?", device, re.IGNORECASE) is not None


def _copies(taps: Sequence[TensorInfo]) -> int:
    return sum(", the last layer" in tap.about for tap in taps)


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if names[count:] else "")
