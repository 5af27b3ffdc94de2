"""Open model files: parse meta graphs, frozen graphs and SavedModels, without running them.

A model is identified by its prefix: ``vgg`` for ``vgg.meta``, ``vgg.index``, ``vgg.json``;
``frozen`` for ``frozen.pb``; the prefix of a SavedModel is its folder.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from google.protobuf import text_format
from google.protobuf.message import DecodeError, Message
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from transfer.core import wire
from transfer.models import checkpoint

_SUFFIX = re.compile(r"(\.(meta|index|json|data-\d{5}-of-\d{5})|-\d{5}-of-\d{5})$")
_STEP = re.compile(r"-\d+$")
_GRAPHS = (".pb", ".pbtxt")
_WEIGHTS = (
    *(".h5", ".hdf5", ".keras", ".onnx", ".npz", ".npy", ".pth", ".pt", ".ckpt", ".bin"),
    *(".safetensors", ".mat", ".caffemodel", ".tfmodel", ".pkl", ".params", ".pdparams"),
)
"""Files of weights, for ``convert``."""
_SAVED_MODELS = ("saved_model.pb", "saved_model.pbtxt")
MAX_BYTES = 2**31 - 1
"""Maximum size of a file; protobuf's own limit."""
MAX_TEXT_BYTES = 2**24
"""Maximum size of a file in text format, which takes a second and 50 MB of memory per MB."""

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class ModelFiles:
    """A parsed graph and the location of the other files of the model.

    ``checkpoint_prefix`` is ``None`` if no checkpoint was found; ``format`` is "meta graph",
    "frozen graph" or "SavedModel".
    """

    format: str
    prefix: Path
    meta: MetaGraphDef
    checkpoint_prefix: Path | None


def open_model(path: Path) -> ModelFiles:
    """Find and parse the graph of a model.

    Args:
        path: a prefix, a ``.meta``, ``.index`` or ``.data-...`` file, a V1 checkpoint, a ``.pb`` or
            ``.pbtxt`` with a GraphDef, or a folder with one of these or with a SavedModel.

    Raises:
        FileNotFoundError: if no graph is found.
        ValueError: if the file is not a graph, is damaged, or the folder contains several.
    """
    if path.is_dir():
        path = _only_model(path)
    if path.is_dir() or path.name in _SAVED_MODELS:
        return _open_saved_model(path if path.is_dir() else path.parent)
    if path.suffix in _GRAPHS and path.is_file():
        return _open_graph(path)
    prefix = _prefix_of(path)
    meta_path = checkpoint.file_of(prefix, ".meta")
    if not meta_path.is_file():
        for suffix in _GRAPHS:
            if prefix.with_name(prefix.name + suffix).is_file():
                return _open_graph(prefix.with_name(prefix.name + suffix))
        raise FileNotFoundError(_no_graph(path, meta_path))
    meta = _parse(meta_path, MetaGraphDef, "meta graph")
    if not meta.graph_def.node:
        raise ValueError(f"{str(meta_path)!r} is not a meta graph: it holds no graph")
    return ModelFiles("meta graph", prefix, meta, _find_checkpoint(prefix))


def is_graph(path: Path) -> bool:
    """Whether a path is meant as that of a graph, and not of weights alone.

    It is if ``open_model`` would find a graph there, damaged or not.
    """
    if path.is_dir() or path.name in _SAVED_MODELS or path.suffix in (".meta", *_GRAPHS):
        return True
    return checkpoint.file_of(_prefix_of(path), ".meta").is_file()


def _open_graph(path: Path) -> ModelFiles:
    graph_def = _parse(path, GraphDef, "frozen graph")
    if not graph_def.node:
        raise ValueError(f"{str(path)!r} is not a frozen graph: it holds no nodes")
    prefix = path.with_suffix("")
    meta = MetaGraphDef(graph_def=graph_def)
    return ModelFiles("frozen graph", prefix, meta, _find_checkpoint(prefix))


def _open_saved_model(folder: Path) -> ModelFiles:
    files = [folder / name for name in _SAVED_MODELS if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"no SavedModel in {str(folder)!r}: expected {_SAVED_MODELS[0]}")
    model = _parse(files[0], SavedModel, "SavedModel")
    tagged = {tuple(graph.meta_info_def.tags): graph for graph in model.meta_graphs}
    if not tagged:
        raise ValueError(f"{str(files[0])!r} is not a SavedModel: it holds no graph")
    meta = tagged.get(("serve",)) or (len(tagged) == 1 and next(iter(tagged.values())))
    if not meta:
        shown = ", ".join("+".join(tags) or "none" for tags in tagged)
        raise ValueError(
            f"{str(folder)!r} holds {len(tagged)} graphs, tagged {shown}; expected one that is "
            "tagged 'serve', or one only: save the one that you want by itself"
        )
    if not meta.graph_def.node:
        raise ValueError(f"{str(files[0])!r} is not a SavedModel: its graph is empty")
    return ModelFiles("SavedModel", folder, meta, folder / "variables" / "variables")


def _parse(path: Path, kind: type[M], name: str) -> M:
    """Parse a file as a protobuf, in binary or text format."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{str(path)!r} is empty; expected a {name}")
    if size > MAX_BYTES:
        raise ValueError(
            f"{str(path)!r} has {size:,} bytes; a {name} has at most {MAX_BYTES:,} "
            "(its weights are in the checkpoint)"
        )
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{str(path)!r} is a pointer of Git LFS, not the file itself; fetch it: git lfs pull"
        )
    try:
        wire.check(content, kind.DESCRIPTOR)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a {name}: {error}") from None
    try:
        message = kind.FromString(content)
        if message.ListFields():
            return message
        problem = "it holds nothing that is known"
    except DecodeError as error:
        problem = str(error)
    text = _as_text(content)
    if text is not None:
        if size > MAX_TEXT_BYTES:
            raise ValueError(
                f"{str(path)!r} has {size:,} bytes of text; at most {MAX_TEXT_BYTES:,} are read: "
                "convert it to a binary one"
            )
        try:
            return text_format.Parse(text, kind())
        except (text_format.ParseError, RecursionError, ValueError) as error:
            problem = str(error)
    raise ValueError(f"{str(path)!r} is not a {name}, or it is damaged: {problem}")


def _as_text(content: bytes) -> str | None:
    """The content as text if it may be the text format, which is ASCII with braces."""
    if b"\0" in content[:4096] or b"{" not in content:
        return None
    try:
        return content.decode("ascii")
    except UnicodeDecodeError:
        return None


def _only_model(folder: Path) -> Path:
    """The only model in a folder; among several steps of a model, the one in the state file."""
    if any((folder / name).is_file() for name in _SAVED_MODELS):
        return folder
    graphs = sorted(folder.glob("*.meta")) or sorted(
        path for path in folder.iterdir() if path.suffix in _GRAPHS and path.is_file()
    )
    if len(graphs) == 1:
        return graphs[0]
    if len({_STEP.sub("", path.stem) for path in graphs}) == 1:
        newest = next((path for path in graphs if path.stem == state(folder)), None)
        if newest is not None:
            return newest
    names = ", ".join(path.name for path in graphs) or "none"
    weights = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _WEIGHTS)
    hint = f". To use its {weights[0]}, convert it first: vgg-transfer convert" if weights else ""
    raise (ValueError if graphs else FileNotFoundError)(
        f"folder {str(folder)!r} holds {len(graphs)} graphs ({names}); expected one, or the path "
        f"of one: .meta, .pb, or a folder with a saved_model.pb{hint if not graphs else ''}"
    )


def _no_graph(path: Path, meta_path: Path) -> str:
    siblings = []
    if meta_path.parent.is_dir():
        siblings = sorted(
            p.name for p in meta_path.parent.iterdir() if p.suffix in (".meta", *_GRAPHS)
        )
    convert = (
        f"vgg-transfer convert {shlex.quote(str(path))} --out "
        f"models/{shlex.quote(path.name.split('.')[0])}"
    )
    if path.is_file() and path.suffix.lower() in _WEIGHTS:
        return f"{str(path)!r} is a file of weights, not a graph; convert it first: {convert}"
    is_part = _SUFFIX.search(path.name) and path.suffix != ".json"
    if path.is_file() and not is_part:
        return (
            f"{str(path)!r} is not a graph, and there is no {meta_path.name!r} beside it; if it is "
            f"a file of weights, convert it first: {convert}"
        )
    message = f"no meta graph {str(meta_path)!r}"
    if checkpoint.exists(_prefix_of(path)):
        message += (
            "; a checkpoint alone holds weights but no network, put its .meta beside it; if it is "
            f"that of a VGG of tf-slim or Keras, convert it: {convert}"
        )
    return f"{message}; graphs in that folder: {', '.join(siblings) or 'none'}"


def _prefix_of(path: Path) -> Path:
    """The prefix of a model, from the path of one of its files; for files without a stem, their
    folder."""
    name = _SUFFIX.sub("", path.name)
    return path.with_name(name) if name else path.parent.resolve()


def _find_checkpoint(prefix: Path) -> Path | None:
    """The checkpoint with the graph's own prefix, else the only one of the same name with a step.

    Programs that write the graph once save ``model.meta`` beside ``model-1000.index``. If there are
    several, the one that the state file names as the newest is used, if it exists.
    """
    if checkpoint.exists(prefix):
        return prefix
    stem = _STEP.sub("", prefix.name)
    # A name with a step does not mean the weights of another one.
    step = "" if stem != prefix.name else r"(-\d+)?"
    beside = [
        path.with_suffix("")
        for path in sorted(prefix.parent.glob("*.index"))
        if re.fullmatch(re.escape(stem) + step, path.stem)
    ]
    if len(beside) == 1:
        return beside[0]
    newest = state(prefix.parent) if beside else None
    return next((path for path in beside if path.name == newest), None)


def state(folder: Path) -> str | None:
    """Name of the newest checkpoint according to the state file, ignoring the folder it states."""
    path = folder / "checkpoint"
    if not path.is_file() or path.stat().st_size > 2**20:
        return None
    # Not parsed as a protobuf: the backslashes of Windows paths are not valid escapes.
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
    return re.split(r"[/\\]", match[1])[-1] or None if match else None
