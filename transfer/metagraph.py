"""Meta graphs on disk: find the files, parse them, say what is in them.

Loading runs nothing: a ``.meta`` is read as data. See ``transfer.backbone`` for what makes it a
layer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.saver_pb2 import SaverDef

from transfer import checkpoint, surgery
from transfer.card import Card, read_card
from transfer.preprocess import CONVENTIONS, Preprocess

_SUFFIX = re.compile(r"\.(meta|index|json|data-\d{5}-of-\d{5})$")


@dataclass(frozen=True)
class MetaGraph:
    """A parsed meta graph; ``load_meta_graph`` makes them.

    Attributes:
        prefix: path of the model without ``.meta``.
        graph_def: all of its graph.
        saver_def: its saver; which checkpoint key feeds which variable is read off its operations.
        checkpoint_prefix: the checkpoint that belongs to it, ``None`` if there is none.
        card: what is known beside the graph; empty if there is no card.
        tensorflow_version: of the TensorFlow that wrote it, ``""`` if unknown.
    """

    prefix: Path
    graph_def: GraphDef = field(repr=False)
    saver_def: SaverDef = field(repr=False)
    checkpoint_prefix: Path | None
    card: Card
    tensorflow_version: str

    def tensor(self, name: str) -> str:
        """The full name of a tensor that is named by itself or by its operation.

        Raises:
            ValueError: if there is none; suggests near ones.
        """
        operation, index = surgery.split_tensor_name(name)
        names = [node.name for node in self.graph_def.node]
        if operation in set(names):
            return f"{operation}:{index}"
        part_of = [n for n in names if operation in n.split("/") and "/Assign" not in n]
        near = difflib.get_close_matches(operation, names, n=5, cutoff=0.5)
        near += [n for n in part_of if n not in near][-3:]
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(names)} operations"
        raise ValueError(f"{str(self.prefix)!r} has no tensor {name!r}; {hint}")

    def network(
        self,
        tap: str,
        input: str | None = None,
        feeds: Mapping[str, float | bool] | None = None,
    ) -> surgery.Network:
        """The arithmetic from the input to the tap.

        Args:
            tap: tensor or operation with the features.
            input: tensor or operation that takes the images; by default the card's, or else the one
                placeholder that the tap depends on and that is not a scalar.
            feeds: values of other placeholders, over those of the card.

        Raises:
            ValueError: if a tensor is unknown, several placeholders might be the input, or one has
                no value.
            ForbiddenOpError: if it needs more than arithmetic.
        """
        output = self.tensor(tap)
        feeds = {self.tensor(name): value for name, value in (feeds or {}).items()}
        card_feeds = {self.tensor(name): value for name, value in self.card.feeds.items()}
        feeds = card_feeds | feeds
        name = self.tensor(input or self.card.input or self._find_input(output, feeds))
        input_dtype = surgery.dtype_of(self.node(name), surgery.split_tensor_name(name)[1])
        return surgery.extract(self.graph_def, output, name, input_dtype, feeds)

    def node(self, tensor: str) -> NodeDef:
        """The operation that a tensor is an output of."""
        operation, _ = surgery.split_tensor_name(self.tensor(tensor))
        return next(node for node in self.graph_def.node if node.name == operation)

    def read(self, variables: tuple[surgery.Variable, ...]) -> dict[str, tf.Tensor]:
        """The values of variables, from the checkpoint; nothing else is read.

        Raises:
            FileNotFoundError: if there is no checkpoint, or a file of it is missing.
            ValueError: if it does not fit; lists all that is missing or different.
        """
        if not variables:
            return {}
        source = checkpoint.Checkpoint(self.checkpoint_prefix or self.prefix)
        entries = checkpoint.saver_entries(self.graph_def, self.saver_def)
        matched = source.match(variables, entries)
        return {name: source.read(entry) for name, entry in matched.items()}

    def preprocess(
        self, input: str, mode: str | None = None, image_size: int | None = None
    ) -> Preprocess:
        """What the images that go into a tensor must be put through.

        Args:
            input: the tensor.
            mode: input convention; by default the card's.
            image_size: height and width; by default what the graph states, or else the card.

        Raises:
            ValueError: if the convention or the size is not known, or the graph takes another size.
        """
        mode = mode or self.card.preprocess
        if mode is None:
            raise ValueError(
                f"no card ({self.prefix.name}.json) says how images are to be prepared for "
                f"{str(self.prefix)!r}, and the wrong convention costs accuracy without any error; "
                f"say which with --preprocess: {', '.join(CONVENTIONS)}"
            )
        node, index = self.node(input), surgery.split_tensor_name(input)[1]
        shape = surgery.static_shape(node, index) or (None, None, None, None)
        dtype = surgery.dtype_of(node, index)
        if dtype is not None and dtype.is_integer and mode != "none":
            raise ValueError(
                f"input {input!r} takes whole numbers ({dtype.name}), so the network prepares its "
                f"images itself; preprocess={mode!r} does not fit, use none"
            )
        if len(shape) != 4:
            raise ValueError(
                f"input {input!r} has shape {shape}; expected images: "
                "[batch, height, width, channels]"
            )
        _, height, width, channels = shape
        size = image_size or height or self.card.image_size
        if size is None:
            raise ValueError(f"input {input!r} takes any image size; give one as the image size")
        if (height or size, width or size) != (size, size):
            raise ValueError(
                f"input {input!r} takes images of {height}x{width} pixels, not {size}x{size}"
            )
        return Preprocess(mode, size, channels or 3)

    def _find_input(self, output: str, feeds: Mapping[str, float | bool]) -> str:
        upstream = surgery.ancestors(self.graph_def, output, stop_at=feeds)
        shapes = {n.name: surgery.static_shape(n) for n in surgery.placeholders(upstream)}
        candidates = [
            name
            for name, shape in shapes.items()
            if f"{name}:0" not in feeds and (shape is None or len(shape) > 1)
        ]
        images = [name for name in candidates if len(shapes[name] or ()) == 4]
        if len(images) == 1 or len(candidates) == 1:
            return (images or candidates)[0]
        found = f"{len(candidates)} placeholders might be it ({', '.join(candidates)})"
        raise ValueError(
            f"cannot tell which tensor of {str(self.prefix)!r} takes the images: "
            f"{found if candidates else 'the tap depends on no placeholder'}; name it as the input"
        )


def load_meta_graph(path: str | Path) -> MetaGraph:
    """Parse a meta graph and find its checkpoint and card. Runs nothing, reads no weights.

    Args:
        path: a prefix (``pretrained/vgg16``), the ``.meta``, ``.index`` or ``.data-...`` file, or a
            folder with one meta graph in it.

    Raises:
        FileNotFoundError: if there is no such meta graph.
        ValueError: if the file is no meta graph, or the folder holds several.
    """
    prefix = _find_prefix(Path(path).expanduser())
    meta_path = prefix.with_name(prefix.name + ".meta")
    meta = MetaGraphDef()
    try:
        meta.ParseFromString(meta_path.read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{str(meta_path)!r} is not a meta graph, or it is damaged: {error}"
        ) from error
    if not meta.graph_def.node:
        raise ValueError(f"{str(meta_path)!r} is not a meta graph: it holds no graph")
    card_path = prefix.with_name(prefix.name + ".json")
    return MetaGraph(
        prefix=prefix,
        graph_def=meta.graph_def,
        saver_def=meta.saver_def,
        checkpoint_prefix=_find_checkpoint(prefix),
        card=read_card(card_path) if card_path.is_file() else Card(),
        tensorflow_version=meta.meta_info_def.tensorflow_version,
    )


def _find_prefix(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.meta"))
        if len(found) == 1:
            return found[0].with_suffix("")
        names = ", ".join(p.name for p in found) or "none"
        raise (ValueError if found else FileNotFoundError)(
            f"folder {str(path)!r} holds {len(found)} meta graphs ({names}); "
            "expected one, or the path of one"
        )
    prefix = path.with_name(_SUFFIX.sub("", path.name))
    if not prefix.with_name(prefix.name + ".meta").is_file():
        siblings = [p.stem for p in prefix.parent.glob("*.meta")] if prefix.parent.is_dir() else []
        near = ", ".join(sorted(siblings)) or "none"
        raise FileNotFoundError(
            f"no meta graph {str(prefix) + '.meta'!r}; meta graphs in that folder: {near}"
        )
    return prefix


def _find_checkpoint(prefix: Path) -> Path | None:
    """The graph's own checkpoint, else the one that lies beside it, if it is one only.

    Programs that write the graph once save ``model.meta`` beside ``model-1000.index``. The state
    file names the newest of several; it is believed where that exists.
    """
    if checkpoint.exists(prefix):
        return prefix
    stem = re.sub(r"-\d+$", "", prefix.name)
    beside = [
        path.with_suffix("")
        for path in sorted(prefix.parent.glob("*.index"))
        if re.fullmatch(re.escape(stem) + r"(-\d+)?", path.stem)
    ]
    if len(beside) == 1:
        return beside[0]
    state_path = prefix.parent / "checkpoint"
    if beside and state_path.is_file():
        match = re.search(r'^model_checkpoint_path: "(.*)"', state_path.read_text(), re.MULTILINE)
        newest = re.split(r"[/\\]", match[1])[-1] if match else ""
        return next((path for path in beside if path.name == newest), None)
    return None
