"""Any model as a ``.keras`` file of stock layers: meta graphs, SavedModels, published weights."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transfer.core.files import read_names
from transfer.images.preprocess import Size
from transfer.layers.backbone import Backbone
from transfer.layers.native.conversion import to_keras
from transfer.layers.native.saving import save_native
from transfer.models.formats import is_graph
from transfer.models.meta_graph import MetaGraph, load_meta_graph
from transfer.vgg.published.conversion import Conversion, convert


def convert_to_keras(
    file: str | Path,
    out: str | Path,
    *,
    tap: str | None = None,
    image_size: Size | None = None,
    **options: Any,
) -> Conversion:
    """Convert a model, or published weights, to a ``.keras`` file of stock layers.

    The file loads without this package, on any backend of Keras. The model takes preprocessed
    images, as ``Backbone`` does; the file contains ``card.json``, which states the preprocessing,
    and, if its output are the classes, ``labels.txt``; see ``save_native``.

    Args:
        file: anything that ``load_meta_graph`` or ``convert`` takes.
        out: file to write.
        tap: tensor with the output; defaults to the card's tap, else ``fc7``.
        image_size: see ``to_keras``.
        **options: how published weights are read; see ``convert``.

    Returns:
        What was converted, and what was assumed; ``prefix`` is ``out``.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if ``out`` exists, or the model cannot be expressed in stock layers.
    """
    file, out = Path(file), Path(out)
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; choose another out=FILE")
    if is_graph(file):
        given = [name for name, value in options.items() if value or name == "top"]
        if given:
            raise ValueError(
                f"{given[0]}={options[given[0]]} is for files of published weights, and "
                f"{str(file)!r} is a graph"
            )
        graph = load_meta_graph(file)
        conversion = _write(graph, out, tap, image_size)
        return conversion
    with tempfile.TemporaryDirectory() as folder:
        published = convert(file, Path(folder) / out.stem, image_size=image_size, **options)
        written = _write(load_meta_graph(published.prefix), out, tap, image_size)
    return replace(
        published,
        prefix=out,
        card=written.card,
        num_parameters=written.num_parameters,
        num_classes=written.num_classes,
    )


def _write(graph: MetaGraph, out: Path, tap: str | None, image_size: Size | None) -> Conversion:
    backbone = Backbone(graph, tap)
    model = to_keras(backbone, image_size=image_size, name=graph.prefix.name)
    output = backbone.network.output
    is_classes = output in graph.card.outputs.values()
    labels = []
    if is_classes and graph.card.labels:
        labels = read_names(graph.prefix.parent / Path(graph.card.labels).name)
    card = replace(
        graph.card,
        tap=output,
        image_size=_size(model.input_shape) or graph.card.image_size,
        labels="labels.txt" if labels else None,
        outputs={k: v for k, v in graph.card.outputs.items() if v == output},
        sha256={},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_native(model, out, labels=labels, card=card)
    return Conversion(
        prefix=out,
        card=card,
        network=f"{graph.prefix.name} up to {output}",
        num_parameters=model.count_params(),
        num_classes=model.output_shape[-1] if is_classes else None,
        layout=graph.format,
        why_preprocess="as on its card" if card.preprocess else "unknown",
        origin=card.source,
        warnings=[]
        if card.preprocess
        else ["no card states which preprocessing the images that the model takes must have"],
    )


def _size(shape: tuple[int | None, ...]) -> Size | None:
    if len(shape) != 4 or shape[1] is None or shape[2] is None:
        return None
    return shape[1] if shape[1] == shape[2] else (shape[1], shape[2])
