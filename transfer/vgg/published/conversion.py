"""From a file of published weights to a meta graph with its checkpoint and card."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transfer.core.files import read_names, write_names
from transfer.images.preprocess import canonical, for_card
from transfer.models import checkpoint
from transfer.models.card import Card
from transfer.models.saver import file_sha256, save_meta_graph
from transfer.vgg import architectures
from transfer.vgg.published import containers, layouts, origins
from transfer.vgg.published.layouts import Published
from transfer.vgg.published.origins import Origin

NUM_IMAGENET_CLASSES = 1000
_VGG_FACE_CLASSES = 2622
# Source: robots.ox.ac.uk/~vgg/software/vgg_face; the same numbers in RGB are in its .mat.
_VGG_FACE = {"mean": [93.5940, 104.7624, 129.1863], "order": "BGR"}

SpatialOrder = Literal["auto", "rows", "columns"]


class Preprocessing(NamedTuple):
    """``mode``: for the card, ``None`` if nothing tells. ``why``: how it is known. ``warning``:
    what to do if it is not known; ``note``: what to do if it is but may not be meant."""

    mode: str | dict[str, Any] | None
    why: str
    warning: str = ""
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` wrote, and what it rests on.

    ``warnings`` say what was assumed because nothing in the file tells it; read them.
    """

    prefix: Path
    """Of the model: a path for ``load_meta_graph``."""
    card: Card
    network: str
    """Architecture, such as ``vgg16``."""
    num_parameters: int
    num_classes: int | None
    """``None`` where the file has no classifier."""
    layout: str
    """How the file names and orders its arrays, such as ``torchvision``."""
    why_preprocess: str
    """How the preprocessing on the card is known."""
    origin: str | None
    """What the file is, if it is known by its hash."""
    left_out: list[str] = field(default_factory=list)
    """Arrays of the file that are not part of the network."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def convert(
    file: str | Path,
    out: str | Path,
    *,
    convolutional: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    labels: str | Path | None = None,
    spatial_order: SpatialOrder = "auto",
    pooling: Literal["flatten", "average"] | None = None,
    leave_out: Collection[str] = (),
) -> Conversion:
    """Convert published weights of a VGG to a meta graph with its checkpoint and card.

    What a file is follows from its contents, not from its name. Nothing in it is executed. The
    network computes what the original computes, or the conversion is refused; nothing that exists
    is overwritten.

    Args:
        file: Keras ``.h5`` or ``.keras``, tf-slim checkpoint, ``.npz``, ``.npy``, PyTorch
            ``.pth``, ``.safetensors``, MatConvNet ``.mat``, ``.caffemodel``, or a frozen
            ``.tfmodel``.
        out: prefix of the model to write, such as ``models/vgg16``.
        convolutional: write fc6 to fc8 as convolutions, for images of any size from 32 pixels.
        preprocess: what the weights expect: ``caffe``, ``slim``, ``torch``, ``tf``, ``unit`` or
            ``none``; or means of their own, such as ``{"mean": [93.594, 104.7624, 129.1863],
            "order": "BGR"}``. Default: what the file says; else what it was published with, if its
            hash is known; else what its layout usually expects, with a warning.
        labels: file with one class name per line. Default: the file's own, or the names of
            ImageNet where there are 1000.
        spatial_order: which of the spatial axes of MatConvNet's kernels comes first; old files
            have the columns first. ``auto``: by the age of the file.
        pooling: what stands before the first fully connected layer; needed where its inputs are as
            many as the last convolution has outputs and the file does not say.
        leave_out: patterns of arrays that do not matter for the features, such as ``extras.*``.

    Returns:
        What was written, and what was assumed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a VGG, or ``out`` exists; nothing is written then.

    Example:
        >>> import numpy as np
        >>> from transfer import Backbone, convert
        >>> random, weights, width = np.random.default_rng(0), {}, 3
        >>> for block, layer, channels in [
        ...     (1, 1, 8), (1, 2, 8), (2, 1, 8), (2, 2, 8), (3, 1, 8), (3, 2, 8), (3, 3, 8),
        ...     (4, 1, 8), (4, 2, 8), (4, 3, 8), (5, 1, 8), (5, 2, 8), (5, 3, 8),
        ... ]:
        ...     kernel = random.normal(size=(3, 3, width, channels)).astype("float32")
        ...     weights[f"conv{block}_{layer}_W"], width = kernel, channels
        ...     weights[f"conv{block}_{layer}_b"] = np.zeros(channels, "float32")
        >>> np.savez("weights.npz", **weights)
        >>> conversion = convert("weights.npz", "models/mine")
        >>> Backbone(conversion.prefix).network.output
        'pool5:0'
    """
    file, out = Path(file), Path(out)
    if preprocess is not None:
        try:
            canonical(preprocess)
        except ValueError as error:
            raise ValueError(f"preprocess={preprocess}: {error}") from error
    check_out(out)
    if spatial_order not in _COLUMNS_FIRST:
        raise ValueError(
            f"spatial_order={spatial_order!r} is unknown; choose from {', '.join(_COLUMNS_FIRST)}"
        )
    found = layouts.identify(
        containers.read(file),
        columns_first=_COLUMNS_FIRST[spatial_order],
        pooling=pooling,
        leave_out=tuple(leave_out),
    )
    sha256 = file_digest(file)
    origin = origins.of_file(file_md5(file), sha256) if file.is_file() else None
    preprocessing = preprocessing_of(found, preprocess, origin)
    names = _class_names(found, labels)
    is_known = f" ({origin.name})" if origin else ""
    source = f"{file.name}{is_known}, layout of {found.layout.name}, sha256 {sha256}"
    card = _save(found, out, names, source, preprocessing.mode, origin, convolutional)
    warnings = [preprocessing.warning] if preprocessing.warning else []
    if not origin and not labels and not found.labels and names:
        warnings.append("the names of its 1000 classes are assumed to be ImageNet's")
    return Conversion(
        prefix=out,
        card=card,
        network=found.name,
        num_parameters=sum(value.size for value in found.values.values()),
        num_classes=found.num_classes,
        layout=found.layout.name,
        why_preprocess=preprocessing.why,
        origin=origin.name if origin else None,
        left_out=[*found.left_out],
        notes=[*found.notes, *([preprocessing.note] if preprocessing.note else [])],
        warnings=warnings,
    )


_COLUMNS_FIRST = {"auto": None, "rows": False, "columns": True}


def preprocessing_of(
    found: Published, given: str | Mapping[str, Any] | None, origin: Origin | None
) -> Preprocessing:
    """What the weights expect of their images, and how that is known."""
    if given is not None:
        return Preprocessing(for_card(given), "as given")
    if found.preprocess is not None:
        return Preprocessing(for_card(found.preprocess), "as the file says")
    if origin is not None:
        return Preprocessing(for_card(origin.preprocess), "as published")
    known = origins.convention_of(found.values["conv1_1/weights"])
    is_imagenet = found.num_classes in (None, NUM_IMAGENET_CLASSES)
    if known is not None:
        why = "as the first convolution, which is that of Oxford's VGG16, was trained with"
        note = "" if is_imagenet else "if the head was trained with another: preprocess=MODE"
        return Preprocessing(known, why, note=note)
    if not is_imagenet and found.layout.container in ("Caffe", "MatConvNet"):
        hint = f"; VGG-Face expects {canonical(_VGG_FACE)}"
        warning = (
            f"nothing tells which mean the images of its {found.num_classes} classes had; give it "
            "with preprocess=MEAN, here or when the model is fine-tuned"
            + (hint if found.num_classes == _VGG_FACE_CLASSES else "")
        )
        return Preprocessing(None, "unknown", warning)
    mode = found.layout.preprocess
    return Preprocessing(
        mode,
        "assumed",
        f"the file is not one that is known by its hash; preprocess {mode} is what others of its "
        "layout expect. If it was trained otherwise, convert it with preprocess=MODE",
    )


def _save(
    found: Published,
    prefix: Path,
    names: list[str],
    source: str,
    preprocess: str | dict[str, Any] | None,
    origin: Origin | None,
    convolutional: bool,
) -> Card:
    """Write meta graph, checkpoint, labels and card; returns the card."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    has_top = found.num_classes is not None
    labels = prefix.with_name(f"{prefix.name}.labels.txt")
    if names:
        write_names(labels, names)
    card = Card(
        input="images:0",
        tap="fc7:0" if has_top else f"pool{len(found.architecture.blocks)}:0",
        image_size=found.architecture.image_size,
        preprocess=preprocess,
        labels=labels.name if names else None,
        outputs={"logits": "fc8:0", "probabilities": "prob:0"} if has_top else {},
        source=source,
        licence=origin.licence if origin else None,
        trained_on=origin.trained_on if origin else None,
    )
    graph = architectures.build_graph(
        found.architecture, found.num_classes, convolutional=convolutional
    )
    shapes = architectures.kernel_shapes(
        found.architecture, found.num_classes, convolutional=convolutional
    )
    values = {
        name: value.reshape(shapes[layer]) if part == "weights" else value
        for name, value in found.values.items()
        for layer, part in [name.split("/")]
    }
    save_meta_graph(graph, prefix, values, card)
    return card


def check_out(prefix: Path) -> None:
    """Whether a model may be written there: nothing is replaced, not even what is converted.

    Raises:
        ValueError: names what is there.
    """
    checkpoint.check_path(prefix)
    name = glob.escape(prefix.name)
    patterns = [f"{name}.{end}" for end in ("meta", "index", "data-*", "json", "labels.txt")]
    existing = [path for pattern in patterns for path in prefix.parent.glob(pattern)]
    if existing:
        raise ValueError(f"{str(existing[0])!r} is there already; choose another out=PREFIX")


def file_digest(path: Path) -> str:
    """Of a file; of all files of a checkpoint, one after the other."""
    files = [path] if path.is_file() and not checkpoint.PART.search(path.name) else []
    if not files:
        prefix = glob.escape(checkpoint.PART.sub("", path.name))
        patterns = (f"{prefix}.index", f"{prefix}.data-*", f"{prefix}-?????-of-?????")
        files = [found for pattern in patterns for found in sorted(path.parent.glob(pattern))]
    return file_sha256(*files)


def file_md5(path: Path) -> str:
    """By which the files of Keras, Caffe and MatConvNet are known."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _class_names(found: Published, labels: str | Path | None) -> list[str]:
    if labels is not None:
        names = read_names(Path(labels))
        if len(names) != found.num_classes:
            raise ValueError(
                f"{str(labels)!r} has {len(names)} names; the model has {found.num_classes} classes"
            )
        return names
    if found.labels:
        return [" ".join(name.split()) for name in found.labels]
    if found.num_classes != NUM_IMAGENET_CLASSES:
        return []
    text = (files("transfer.vgg.published") / "imagenet_labels.txt").read_text(encoding="utf-8")
    return text.splitlines()
