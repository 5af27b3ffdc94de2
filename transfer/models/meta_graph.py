"""A model on disk as a ``MetaGraph``: its tensors, its checkpoint, its card.

Loading runs nothing: a graph is read as data. See ``transfer.layers.backbone`` for what
makes it a layer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from transfer.graph import (
    VARIABLES,
    Network,
    Variable,
    ancestors,
    channels_last,
    check,
    dtype_of,
    extract,
    find_modes,
    free_batch,
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
from transfer.images.preprocess import CONVENTIONS, Preprocess, Size, canonical
from transfer.models import checkpoint, formats, object_keys, repair
from transfer.models.card import Card, read_card
from transfer.models.object_keys import KEY


class SharedBatchError(ValueError):
    """Towers share the batch of the input: the tap gives fewer rows than images go in.

    ``inputs`` are tensors that a tower takes its own part from, the first one first.
    """

    def __init__(self, message: str, inputs: Sequence[str]):
        super().__init__(message)
        self.inputs = tuple(inputs)


EMBEDDED = "embedded"
"""Name of the small VGG that comes with the project."""
_EMBEDDED_PREFIX = Path(str(files("pretrained") / "vgg_small"))


@dataclass(frozen=True)
class MetaGraph:
    """A parsed model; ``load_meta_graph`` makes them.

    Attributes:
        prefix: path of the model without ``.meta``; of a SavedModel, its folder.
        meta: as it was read. Which checkpoint key feeds which variable is read off the operations
            of its saver.
        graph_def: all of its graph, calls of functions inlined.
        checkpoint_prefix: the checkpoint that belongs to it, ``None`` if there is none.
        card: what is known beside the graph; empty if there is no card.
        tensorflow_version: of the TensorFlow that wrote it, ``""`` if unknown.
        format: "meta graph", "frozen graph" or "SavedModel".
        outputs: tensors that a SavedModel serves.
        objects: of a SavedModel of TensorFlow 2, variable to the path of its object.
        rename: parts of variables' names to what the checkpoint's keys have in their place.
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
        """How run folders and caches refer to the model: its absolute prefix, or ``embedded``."""
        prefix = self.prefix.resolve()
        return EMBEDDED if prefix == _EMBEDDED_PREFIX.resolve() else str(prefix)

    @cached_property
    def nodes(self) -> dict[str, NodeDef]:
        """Operation to node."""
        return {node.name: node for node in self.graph_def.node}

    def tensor(self, name: str) -> str:
        """The full name of a tensor that is named by itself, by its operation, or in short.

        ``fc7`` may be ``vgg_16/fc7/Relu:0``: what a scope of that name gives to the rest of the
        network.

        Raises:
            ValueError: if there is none (suggests near ones), or there are several (lists them).
        """
        nodes = list(self.nodes.values())
        found = taps.find(nodes, name)
        if len(found) > 1 and self.outputs:
            # A SavedModel may hold a copy of its network for each of its signatures.
            served = {n.name for out in self.outputs for n in ancestors(nodes, out)}
            found = [t for t in found if operation_of(t) in served] or found
        if len(found) == 1:
            return found[0]
        where = f"{str(self.prefix)!r} has {'several tensors' if found else 'no tensor'} {name!r}"
        if found:
            raise ValueError(f"{where}: {', '.join(found[:8])}; name the one that you mean")
        operation, _ = split_tensor_name(name)
        near = difflib.get_close_matches(operation, self.nodes, n=5, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(near)}?" if near else f"it has {len(self.nodes)} operations"
        )
        raise ValueError(f"{where}; {hint} (vgg-transfer inspect lists what may be tapped)")

    def network(
        self,
        tap: str,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
        keep_dropout: bool = False,
    ) -> Network:
        """The arithmetic from the input to the tap. Images, and all that has a height and a width,
        are channels last, whatever they are in the graph.

        Args:
            tap: tensor or operation with the features, or a short name (see ``tensor``).
            input: tensor or operation that takes the images; by default the card's, or else the one
                that the tap depends on and that may be it.
            feeds: values of other placeholders, over those of the card. What tells training from
                inference is found by itself.
            keep_dropout: leave dropout that is always on in the graph on.

        Raises:
            ValueError: if a tensor is unknown, several placeholders might be the input, one has no
                value, or the tap is inside a while loop.
            ForbiddenOpError: if it needs more than arithmetic.
        """
        output = self.tensor(tap)
        feeds = {self.tensor(name): value for name, value in (feeds or {}).items()}
        card_feeds = {self.tensor(name): value for name, value in self.card.feeds.items()}
        feeds = card_feeds | feeds
        name = self.tensor(input or self.card.input or self.find_input(output, feeds))
        node, index = self.node(name), split_tensor_name(name)[1]
        dtype = dtype_of(node, index)
        if dtype is not None and not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise ValueError(
                f"input {name!r} takes elements of type {dtype.name}, not pixels; name the tensor "
                "after the images are decoded as the input"
                + _one_of(inputs.candidates(list(self.nodes.values()), output, [name]))
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

    def _check_rows(self, network: Network) -> None:
        """Refuse towers that share a batch: half the labels would be compared with nothing."""
        shared = inputs.shared_batch(network)
        if shared is None:
            return
        rows, parts = shared
        parts = [part for part in parts if operation_of(part) in self.nodes]
        raise SharedBatchError(
            f"the images of input {network.input!r} are split between towers: tap "
            f"{network.output!r} gives {rows} of a row for each; name the part of this tower as "
            "the input" + _one_of(parts),
            parts,
        )

    @property
    def local_variables(self) -> set[str]:
        """Variables that savers leave out: counters of metrics and of input pipelines."""
        return repair.variables_of(self.meta, ("local_variables", "metric_variables"))

    def repaired(self) -> MetaGraphDef:
        """For ``tf.compat.v1.train.import_meta_graph`` in a program of your own: without devices,
        and without collections that do not resolve. Unlike the rest of this library, what is
        imported so is the whole program."""
        return repair.repaired(self.meta)

    def node(self, tensor: str) -> NodeDef:
        """The operation that a tensor is an output of."""
        return self.nodes[operation_of(self.tensor(tensor))]

    def read(self, variables: Sequence[Variable], use_ema: bool = False) -> dict[str, tf.Tensor]:
        """The values of variables, from the checkpoint; nothing else is read.

        Args:
            variables: of a network of this graph; weights that are constants are read off the
                graph.
            use_ema: read the moving averages of those that have one.

        Raises:
            FileNotFoundError: if there is no checkpoint, or a file of it is missing.
            ValueError: if it does not fit; lists all that is missing or different. With
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
        """Check that ``read`` will find what it needs, without the data where there is an index.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it does not fit.
        """
        if stored := self._stored(variables):
            prefix = self.checkpoint_prefix or self.prefix
            source = checkpoint.Checkpoint(prefix, index_only=True)
            source.match(stored, self.entries(source, use_ema))

    def check_files(self, variables: Sequence[Variable]) -> None:
        """Look whether the files that ``read`` needs are there.

        Raises:
            FileNotFoundError: names those that are missing.
        """
        if self._stored(variables):
            checkpoint.check_files(self.checkpoint_prefix or self.prefix)

    def _stored(self, variables: Sequence[Variable]) -> list[Variable]:
        """Those that are not constants of the graph."""
        return [v for v in variables if self.nodes[v.name].op != "Const"]

    def entries(
        self, source: checkpoint.Checkpoint, use_ema: bool = False
    ) -> dict[str, checkpoint.Entry]:
        """Where a checkpoint has the value of each variable that is not stored under its name.

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
            entries |= checkpoint.average_entries([n.name for n in variables], source)
        names = [node.name for node in variables]
        return entries | checkpoint.renamed_entries(names, entries, source.shapes, self.rename)

    def preprocess(
        self,
        input: str,
        mode: str | Mapping[str, Any] | None = None,
        image_size: Size | None = None,
    ) -> Preprocess:
        """What the images that go into a tensor must be put through.

        Args:
            input: the tensor.
            mode: input convention; by default the card's.
            image_size: by default what the graph states, or else the card.

        Raises:
            ValueError: if the convention or the size is not known, or the graph takes another size.
        """
        mode = mode or self.card.preprocess
        if mode is None:
            raise ValueError(
                f"no card ({self.prefix.name}.json) says how images are to be prepared for "
                f"{str(self.prefix)!r}, and the wrong convention costs accuracy without any error; "
                f"say which with preprocess=MODE: {', '.join(CONVENTIONS)}"
            )
        mode = canonical(mode)
        node, index = self.node(input), split_tensor_name(input)[1]
        shape = static_shape(node, index) or (None, None, None, None)
        dtype = dtype_of(node, index)
        if dtype is not None and dtype.is_integer and mode != "none":
            raise ValueError(
                f"input {input!r} takes whole numbers ({dtype.name}), so the network prepares its "
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
        preprocess = Preprocess(mode, size, channels or 3)
        if (height or preprocess.height, width or preprocess.width) != preprocess.shape[:2]:
            taken = "x".join(str(side or "any") for side in (height, width))
            raise ValueError(
                f"input {input!r} takes images of {taken} pixels, not "
                f"{preprocess.height}x{preprocess.width}"
            )
        return preprocess

    def find_input(self, output: str, feeds: Mapping[str, float | bool] | None = None) -> str:
        """The tensor that takes the images on the way to an output.

        Raises:
            ValueError: if there is none, or more than one that might be it.
        """
        upstream = ancestors(self.nodes.values(), output, stop_at=feeds or {})
        read = graph_outputs(upstream)
        read.setdefault(operation_of(output), [graph_canonical(output)])
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
        for found in (images, known, names):
            if len(found) == 1:
                return found[0]
        shown = f"{len(names)} tensors might be it ({', '.join(names)}); name it as the input"
        if not names:
            shown = "the tap depends on no placeholder for them; name a tensor that has them"
            shown += _one_of(inputs.candidates(list(self.nodes.values()), output))
        raise ValueError(
            f"cannot tell which tensor of {str(self.prefix)!r} takes the images: {shown}"
        )


def _one_of(tensors: Sequence[str]) -> str:
    """The end of a message that says which tensors would do."""
    return f": {', '.join(tensors[:4])}" if tensors else ""


def _as_image(length: int | None, size: Size | None) -> tuple[None, int, int, int] | None:
    """The image, gray or in colour, that a vector of this length may be: of this size, or
    square."""
    for channels in (1, 3):
        if isinstance(size, tuple) and math.prod(size) * channels == length:
            return None, *size, channels
    for channels in (1, 3):
        size = math.isqrt((length or 0) // channels)
        if size > 1 and size * size * channels == length:
            return None, size, size, channels
    return None


def load_meta_graph(path: str | Path, *, rename: Mapping[str, str] | None = None) -> MetaGraph:
    """Parse a model and find its checkpoint and card. Runs nothing, reads no weights.

    Args:
        path: a prefix (``pretrained/vgg16``), the ``.meta``, ``.index`` or ``.data-...`` file, a V1
            checkpoint with its ``.meta``, a frozen graph (``.pb`` or ``.pbtxt``), a SavedModel, or
            a folder with one of these in it. ``"embedded"`` is the small VGG that comes with the
            project.
        rename: where the checkpoint's keys differ from the graph's names by a rule, parts of the
            names to what the keys have in their place: ``{"weights": "kernel"}``. An empty part
            stands for the beginning of the name: ``{"": "vgg_16/"}``.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the file is no graph, is damaged, or the folder holds several.
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
