"""Load a model from disk as a ``MetaGraph``: its graph, checkpoint and card.

Loading only parses the graph and runs nothing. ``transfer.layers.backbone`` makes it a layer.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from transfer.graph import (
    VARIABLES,
    Network,
    Variable,
    activations,
    ancestors,
    channels_last,
    check,
    concatenated,
    dtype_of,
    extract,
    find_modes,
    free_batch,
    infer,
    inline,
    inputs,
    is_channels_first,
    operation_of,
    split_tensor_name,
    static_shape,
    taps,
)
from transfer.graph import canonical as graph_canonical
from transfer.graph import outputs as graph_outputs
from transfer.graph import variable as graph_variable
from transfer.graph.cuts import Cut, list_cuts
from transfer.graph.taps import Tap
from transfer.images.preprocess import CONVENTIONS, Mode, Preprocess, Size, canonical
from transfer.models import checkpoint, formats, object_keys, repair
from transfer.models.card import Card, read_card
from transfer.models.object_keys import KEY


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a graph with a remark ``about`` it.

    ``shape`` is ``None`` if unknown, and has ``None`` for unknown dimensions.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str
    about: str


class SharedBatchError(ValueError):
    """The batch of the input is split between towers: the tap has fewer rows than the input.

    ``inputs`` are the tensors with the parts of the towers, the first tower's first.
    """

    def __init__(self, message: str, inputs: Sequence[str]):
        super().__init__(message)
        self.inputs = tuple(inputs)


EMBEDDED = "embedded"
"""Name of the small VGG included in the project."""
_EMBEDDED_PREFIX = Path(str(files("pretrained") / "vgg_small"))


@dataclass(frozen=True)
class MetaGraph:
    """A parsed model, as returned by ``load_meta_graph``.

    Attributes:
        prefix: path of the model without ``.meta``; for a SavedModel, its folder.
        meta: the unmodified ``MetaGraphDef``. The operations of its saver map checkpoint keys to
            variables.
        graph_def: the complete graph, with function calls inlined.
        checkpoint_prefix: the checkpoint of the model, ``None`` if there is none.
        card: its card; empty if there is none.
        tensorflow_version: version of TensorFlow that wrote it, ``""`` if unknown.
        format: "meta graph", "frozen graph" or "SavedModel".
        outputs: output tensors of the serving signature of a SavedModel.
        objects: for a TensorFlow 2 SavedModel, variable name to the path of its object.
        rename: parts of variable names to the parts of checkpoint keys that replace them.

    Example:
        >>> from transfer import MetaGraph, load_meta_graph
        >>> graph: MetaGraph = load_meta_graph("pretrained/vgg_small")
        >>> graph.tensor("fc7"), graph.format, len(graph.nodes) > 50
        ('fc7:0', 'meta graph', True)
    """

    prefix: Path
    meta: MetaGraphDef = field(repr=False)
    graph_def: GraphDef = field(repr=False)
    checkpoint_prefix: Path | None
    card: Card
    tensorflow_version: str
    format: str = "meta graph"
    outputs: tuple[str, ...] = ()
    objects: Mapping[str, object_keys.Path] = field(default_factory=dict, repr=False)
    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Identifier of the model in run folders and caches: its absolute prefix, or
        ``embedded``."""
        prefix = self.prefix.resolve()
        return EMBEDDED if prefix == _EMBEDDED_PREFIX.resolve() else str(prefix)

    @cached_property
    def nodes(self) -> dict[str, NodeDef]:
        """Operation name to node."""
        return {node.name: node for node in self.graph_def.node}

    def tensor(self, name: str) -> str:
        """The full name of a tensor, from its full name, its operation or a short name.

        ``fc7`` may be short for ``vgg_16/fc7/Relu:0``: the output of the scope of that name.

        Raises:
            ValueError: if it does not exist (suggests similar names), or is ambiguous (lists the
                candidates).
        """
        nodes = list(self.nodes.values())
        matches = taps.find(nodes, name)
        if len(matches) > 1 and self.outputs:
            # A SavedModel may contain a copy of its network for each signature.
            served = {n.name for out in self.outputs for n in ancestors(nodes, out)}
            matches = [t for t in matches if operation_of(t) in served] or matches
        if len(matches) == 1:
            return matches[0]
        where = f"{str(self.prefix)!r} has {'several tensors' if matches else 'no tensor'} {name!r}"
        if matches:
            raise ValueError(f"{where}: {', '.join(matches[:8])}; name the one that you mean")
        operation, _ = split_tensor_name(name)
        near = difflib.get_close_matches(operation, self.nodes, n=5, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(near)}?" if near else f"it has {len(self.nodes)} operations"
        )
        raise ValueError(f"{where}; {hint} (vgg-transfer inspect lists what may be tapped)")

    def network(
        self,
        tap: str | Sequence[str] | None = None,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
    ) -> Network:
        """The subgraph from the input to the tap, or to several taps, converted to channels last.

        Args:
            tap: tensor or operation with the features, or a short name (see ``tensor``); or several
                of them. ``all`` are the outputs of all nonlinearities up to the default tap.
                Default: the card's tap, else ``fc7``.
            input: tensor or operation that takes the images; defaults to the card's, else to the
                only candidate that the tap depends on.
            feeds: values of other placeholders; they override those of the card. Placeholders that
                switch between training and inference are detected.
            keep_dropout: keep dropout active at inference where the graph always applies it.

        Raises:
            TypeError: if ``tap`` is neither a name nor a list or tuple of names.
            ValueError: if a tensor is unknown, several placeholders may be the input, one has no
                value, a tap is inside a while loop, or a tap is given twice.
            ForbiddenOpError: if it depends on operations that are not pure computation.
        """
        if tap == "all":
            tap = self._activations(input, feeds, keep_dropout)
        output, outputs = self._outputs(tap)
        feeds = {self.tensor(name): value for name, value in (feeds or {}).items()}
        card_feeds = {self.tensor(name): value for name, value in self.card.feeds.items()}
        feeds = card_feeds | feeds
        name = self.tensor(input or self.card.input or self.find_input(outputs, feeds))
        node, index = self.node(name), split_tensor_name(name)[1]
        dtype = dtype_of(node, index)
        if dtype is not None and not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise ValueError(
                f"input {name!r} takes elements of type {dtype.name}, not pixels; name the tensor "
                "after the images are decoded as the input"
                + _one_of(inputs.candidates(list(self.nodes.values()), outputs[0], [name]))
            )
        network = extract(
            self.graph_def,
            output,
            name,
            dtype,
            feeds,
            keep_dropout or self.card.keep_dropout,
            static_shape(node, index),
        )
        network = free_batch(network)
        self._check_rows(network)
        return channels_last(network)

    def _outputs(self, tap: str | Sequence[str] | None) -> tuple[str | dict[str, str], list[str]]:
        """The tensor of a tap, or the name of each tap to its tensor; and the list of tensors."""
        tap = self.card.tap or "fc7" if tap is None else tap
        if isinstance(tap, str):
            return self.tensor(tap), [self.tensor(tap)]
        if not isinstance(tap, list | tuple) or not all(isinstance(name, str) for name in tap):
            raise TypeError(f"tap is {tap!r}; expected a tensor's name, or a list of names")
        if len({*tap}) < max(len(tap), 1):
            raise ValueError(f"tap is {list(tap)}; expected one name or more, each once")
        by_name = {name: self.tensor(name) for name in tap}
        return by_name, list(by_name.values())

    def _activations(
        self,
        input: str | None,
        feeds: Mapping[str, float | bool] | None,
        keep_dropout: bool,
    ) -> list[str]:
        """The outputs of all nonlinearities up to the card's tap, else ``fc7``, else the first of
        ``taps``."""
        last = self.card.tap or "fc7"
        if not taps.find(list(self.nodes.values()), last) and (ranked := self.taps()):
            last = ranked[0].name
        found = activations(self.network(last, input, feeds, keep_dropout))
        # Others are of functions and conditionals that were simplified.
        found = [tensor for tensor in found if operation_of(tensor) in self.nodes]
        if not found:
            raise ValueError(
                f"tap 'all': there is no nonlinearity up to {last!r}; name the taps instead"
            )
        return found

    def taps(self) -> list[TensorInfo]:
        """Tensors with features, most promising first: the inputs of the last layers."""
        covered = self.covered()
        ranked = taps.rank(
            list(self.nodes.values()),
            lambda names: covered is None or set(names) <= covered,
            self.outputs,
        )
        return [self._tap(tap) for tap in ranked]

    def _tap(self, tap: Tap) -> TensorInfo:
        """A tap with its shape, inferred where the graph does not state it."""
        node, index = self.node(tap.tensor), split_tensor_name(tap.tensor)[1]
        shape = tap.shape
        if shape is None or None in shape[1:]:
            with contextlib.suppress(ValueError, OSError):
                network = self.network(tap.tensor)
                shape = infer(network).get(network.output, shape)
        dtype = dtype_of(node, index)
        return TensorInfo(tap.tensor, shape, dtype.name if dtype else "unknown", tap.why)

    def inputs(self, chosen: str | None = None) -> list[TensorInfo]:
        """All tensors that provide data: placeholders, and dequeued tensors that are used.

        Args:
            chosen: the tensor that takes the images, which is listed first. Default: the card's.
        """
        chosen = chosen or self.card.input
        used = graph_outputs(self.nodes.values())
        tensors = []
        for node in self.nodes.values():
            if node.op not in taps.SOURCES:
                continue
            for name in used.get(node.name) or [f"{node.name}:0"]:
                index = split_tensor_name(name)[1]
                dtype, shape = dtype_of(node, index), static_shape(node, index)
                about = "takes the images" if name == chosen else node.op
                tensors.append(TensorInfo(name, shape, dtype.name if dtype else "unknown", about))
        # The file names of savers are also placeholders.
        tensors = [t for t in tensors if t.dtype != "string" or t.name == chosen]
        return sorted(tensors, key=lambda tensor: tensor.name != chosen)

    def cuts(
        self, tap: str | Sequence[str] | None = None, image_size: Size | None = None
    ) -> list[Cut]:
        """Where the network up to a tap can be cut: one cut per layer, the tap last.

        Args:
            tap: see ``network``. ``inspect`` lists the cuts of the first of ``taps``.
            image_size: used if the graph does not fix height and width. Default: the card's.

        Raises:
            ValueError: see ``network``.
        """
        network = concatenated(self.network(tap))
        return list_cuts(network, image_size or self.card.image_size)

    def covered(self) -> set[str] | None:
        """The variables that have a matching value in the checkpoint; ``None`` if unknown."""
        variables = [graph_variable(node) for node in self.nodes.values() if node.op in VARIABLES]
        if not variables:
            return set()
        try:
            source = checkpoint.Checkpoint(self.checkpoint_prefix or self.prefix, index_only=True)
            matched, _, _ = source.compare(variables, self.entries(source))
        except (OSError, ValueError):
            return None
        return set(matched) - self.local_variables

    def _check_rows(self, network: Network) -> None:
        """Reject a tower that computes only a part of the batch: outputs would not match labels."""
        shared = inputs.shared_batch(network)
        if shared is None:
            return
        rows, parts = shared
        parts = [part for part in parts if operation_of(part) in self.nodes]
        raise SharedBatchError(
            f"the images of input {network.input!r} are split between towers: tap "
            f"{network.outputs[0]!r} gives {rows} of a row for each; name the part of this tower "
            "as the input" + _one_of(parts),
            parts,
        )

    @property
    def local_variables(self) -> set[str]:
        """Variables that savers do not save: counters of metrics and of input pipelines."""
        return repair.variables_of(self.meta, ("local_variables", "metric_variables"))

    def repaired(self) -> MetaGraphDef:
        """The meta graph for ``tf.compat.v1.train.import_meta_graph`` in your own program, without
        devices and without collections that do not resolve.

        Unlike elsewhere in this library, it is the complete program, with all its operations.
        """
        return repair.repaired(self.meta)

    def node(self, tensor: str) -> NodeDef:
        """The node that outputs a tensor."""
        return self.nodes[operation_of(self.tensor(tensor))]

    def read(self, variables: Sequence[Variable], use_ema: bool = False) -> dict[str, tf.Tensor]:
        """Read the values of these variables only from the checkpoint.

        Args:
            variables: variables of a network of this graph; the values of constant weights are
                taken from the graph.
            use_ema: read the exponential moving averages of variables that have one.

        Raises:
            FileNotFoundError: if there is no checkpoint, or a file of it is missing.
            ValueError: if it does not match; lists all missing and different variables. With
                ``use_ema``, if there are no moving averages.
        """
        constants = {v.name: n for v in variables if (n := self.nodes[v.name]).op == "Const"}
        values = {
            name: tf.constant(tf.make_ndarray(node.attr["value"].tensor))
            for name, node in constants.items()
        }
        if stored := self._stored(variables):
            source = checkpoint.Checkpoint(self.checkpoint_prefix or self.prefix)
            values |= source.read(source.match(stored, self.entries(source, use_ema)))
        return values

    def match(self, variables: Sequence[Variable], use_ema: bool = False) -> None:
        """Check that ``read`` will succeed; if there is an index, the data files are not needed.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it does not match.
        """
        if stored := self._stored(variables):
            prefix = self.checkpoint_prefix or self.prefix
            source = checkpoint.Checkpoint(prefix, index_only=True)
            source.match(stored, self.entries(source, use_ema))

    def check_files(self, variables: Sequence[Variable]) -> None:
        """Check that the files that ``read`` needs exist.

        Raises:
            FileNotFoundError: lists the missing files.
        """
        if self._stored(variables):
            checkpoint.check_files(self.checkpoint_prefix or self.prefix)

    def _stored(self, variables: Sequence[Variable]) -> list[Variable]:
        """The variables that are not constants of the graph."""
        return [v for v in variables if self.nodes[v.name].op != "Const"]

    def entries(
        self, source: checkpoint.Checkpoint, use_ema: bool = False
    ) -> dict[str, checkpoint.Entry]:
        """The checkpoint entries of variables that are not stored under their own names.

        Raises:
            ValueError: with ``use_ema``, if the checkpoint has no moving averages; if a part of
                ``rename`` leads to no entry.
        """
        variables = [node for node in self.nodes.values() if node.op in VARIABLES]
        entries = checkpoint.partition_entries(variables, source.shapes)
        entries |= checkpoint.saver_entries(self.graph_def, self.meta.saver_def)
        if self.objects:
            graph = source.read({KEY: checkpoint.Entry(KEY)})[KEY] if KEY in source.shapes else b""
            serialized = np.asarray(graph).ravel()[:1].tolist()
            keys = object_keys.checkpoint_keys(self.objects, *serialized)
            entries |= {name: checkpoint.Entry(key) for name, key in keys.items()}
        if use_ema:
            entries |= checkpoint.average_entries([n.name for n in variables], source, entries)
        names = [node.name for node in variables]
        return entries | checkpoint.renamed_entries(names, entries, source.shapes, self.rename)

    def preprocess(
        self,
        input: str | None = None,
        mode: str | Mapping[str, Any] | None = None,
        image_size: Size | None = None,
    ) -> Preprocess:
        """The preprocessing of the images that a tensor takes.

        Args:
            input: the tensor; defaults to the card's, else the only candidate.
            mode: input convention; defaults to the card's.
            image_size: defaults to the size in the graph, else the card's.

        Raises:
            ValueError: if the convention or the size is unknown, or the graph takes another size.
        """
        mode = mode or self.card.preprocess
        if mode is None:
            raise ValueError(
                f"no card ({self.prefix.name}.json) states the preprocessing of images for "
                f"{str(self.prefix)!r}, and the wrong convention costs accuracy without any error; "
                f"say which with preprocess=MODE: {', '.join(CONVENTIONS)}"
            )
        mode = canonical(mode)
        input = input or self.card.input or self.network().input
        node, index = self.node(input), split_tensor_name(input)[1]
        shape = static_shape(node, index) or (None, None, None, None)
        dtype = dtype_of(node, index)
        if dtype is not None and dtype.is_integer and mode != "none":
            raise ValueError(
                f"input {input!r} takes integers ({dtype.name}), so the network preprocesses its "
                f"images itself; preprocess={mode!r} does not fit, use none"
            )
        if len(shape) == 2:
            shape = _as_image(shape[1], image_size) or shape
        if len(shape) != 4:
            raise ValueError(
                f"input {input!r} has shape {shape}; expected images: "
                "[batch, height, width, channels], or vectors of square ones or of the image size"
            )
        if is_channels_first(shape):
            shape = (shape[0], *shape[2:], shape[1])
        _, height, width, channels = shape
        stated = (height, width) if height and width else height or width
        size = image_size or stated or self.card.image_size
        if size is None:
            raise ValueError(f"input {input!r} takes any image size; give one as the image size")
        preprocess = Preprocess(cast(Mode, mode), size, channels or 3)
        if (height or preprocess.height, width or preprocess.width) != preprocess.shape[:2]:
            taken = "x".join(str(side or "any") for side in (height, width))
            raise ValueError(
                f"input {input!r} takes images of {taken} pixels, not "
                f"{preprocess.height}x{preprocess.width}"
            )
        return preprocess

    def find_input(
        self, output: str | Sequence[str], feeds: Mapping[str, float | bool] | None = None
    ) -> str:
        """Find the input tensor for images that an output, or several, depends on.

        Raises:
            ValueError: if there is no candidate, or more than one.
        """
        upstream = ancestors(self.nodes.values(), output, stop_at=feeds or {})
        outputs = [output] if isinstance(output, str) else output
        read = graph_outputs(upstream)
        for name in outputs:
            read.setdefault(operation_of(name), [graph_canonical(name)])
        candidates = {}
        for node in upstream:
            for tensor in read.get(node.name, ()) if node.op in taps.SOURCES else ():
                shape = static_shape(node, split_tensor_name(tensor)[1])
                is_batch = shape is None or len(shape) > 1
                if tensor not in (feeds or {}) and is_batch:
                    candidates[tensor] = shape
        modes = {mode.tensor for mode in find_modes(upstream, None)}
        names = [name for name in candidates if name not in modes]
        images = [name for name in names if len(candidates[name] or ()) == 4]
        known = [name for name in names if candidates[name] is not None]
        for group in (images, known, names):
            if len(group) == 1:
                return group[0]
        shown = f"{len(names)} tensors might be it ({', '.join(names)}); name it as the input"
        if not names:
            shown = "the tap depends on no placeholder for them; name a tensor that has them"
            shown += _one_of(inputs.candidates(list(self.nodes.values()), outputs[0]))
        raise ValueError(
            f"cannot tell which tensor of {str(self.prefix)!r} takes the images: {shown}"
        )


def _one_of(tensors: Sequence[str]) -> str:
    """End of an error message: the tensors to choose from."""
    return f": {', '.join(tensors[:4])}" if tensors else ""


def _as_image(length: int | None, size: Size | None) -> tuple[None, int, int, int] | None:
    """Shape of the gray or RGB image that a vector of this length represents: of the given size,
    else square."""
    for channels in (1, 3):
        if isinstance(size, tuple) and math.prod(size) * channels == length:
            return None, *size, channels
    for channels in (1, 3):
        size = math.isqrt((length or 0) // channels)
        if size > 1 and size * size * channels == length:
            return None, size, size, channels
    return None


def load_meta_graph(path: str | Path, *, rename: Mapping[str, str] | None = None) -> MetaGraph:
    """Parse a model and locate its checkpoint and card, without running it or reading weights.

    Args:
        path: a prefix (``pretrained/vgg16``), the ``.meta``, ``.index`` or ``.data-...`` file, a V1
            checkpoint with its ``.meta``, a frozen graph (``.pb`` or ``.pbtxt``), a SavedModel, or
            a folder that contains one of these. ``"embedded"`` is the small VGG included in the
            project.
        rename: if the checkpoint's keys differ systematically from the names in the graph, parts of
            names to the parts of keys that replace them: ``{"weights": "kernel"}``. An empty part
            adds a prefix to the names: ``{"": "vgg_16/"}``.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if the file is not a graph, is damaged, or the folder contains several.
        ForbiddenOpError: if the graph contains operations that are not pure computation.

    Example:
        >>> from transfer import load_meta_graph
        >>> load_meta_graph("pretrained/vgg_small.meta").card.tap
        'fc7:0'
    """
    if str(path) == EMBEDDED:
        path = _EMBEDDED_PREFIX
    model = formats.open_model(Path(path).expanduser())
    check(model.meta.graph_def.node)
    graph_def = inline(model.meta.graph_def)
    check(graph_def.node)
    card_path = checkpoint.file_of(model.prefix, ".json")
    return MetaGraph(
        prefix=model.prefix,
        meta=model.meta,
        graph_def=graph_def,
        checkpoint_prefix=model.checkpoint_prefix,
        card=read_card(card_path) if card_path.is_file() else Card(),
        tensorflow_version=model.meta.meta_info_def.tensorflow_version,
        format=model.format,
        outputs=tuple(
            info.name
            for name, signature in sorted(model.meta.signature_def.items())
            if name == "serving_default"
            for info in signature.outputs.values()
        ),
        objects=object_keys.variable_paths(model.meta),
        rename=dict(rename or {}),
    )
