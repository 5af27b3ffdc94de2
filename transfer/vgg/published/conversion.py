"""Convert published weights to a meta graph with its checkpoint and card."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from transfer.core.escapes import escaped
from transfer.core.files import read_names, replacing, write_names
from transfer.images.preprocess import Size, as_size, canonical, for_card
from transfer.models import checkpoint
from transfer.models.card import Card
from transfer.models.saver import file_sha256, save_meta_graph
from transfer.vgg import architectures
from transfer.vgg.published import containers, layouts, network, origins
from transfer.vgg.published.heads import Pooling
from transfer.vgg.published.kernel_flips import Kernels
from transfer.vgg.published.network import Published
from transfer.vgg.published.origins import Origin

NUM_IMAGENET_CLASSES = 1000
_VGG_FACE_CLASSES = 2622
# Source: robots.ox.ac.uk/~vgg/software/vgg_face; its Caffe model takes BGR, its .mat RGB.
_VGG_FACE_RGB = {"mean": [129.1863, 104.7624, 93.5940], "order": "RGB"}
_VGG_FACE = {"mean": [93.5940, 104.7624, 129.1863], "order": "BGR"}

SpatialOrder = Literal["auto", "rows", "columns"]


class Preprocessing(NamedTuple):
    """``mode``: for the card, ``None`` if unknown. ``why``: how it was determined. ``warning``:
    what to do if it is unknown or assumed. ``note``: what to do if the head was trained with
    another."""

    mode: str | dict[str, Any] | None
    why: str
    warning: str = ""
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """The result of ``convert``, and how it was determined.

    ``warnings`` name what was assumed because the file does not say; read them.
    """

    prefix: Path
    """Checkpoint prefix of the model: a path for ``load_meta_graph``."""
    card: Card
    network: str
    """Architecture, such as ``vgg16``."""
    num_parameters: int
    num_classes: int | None
    """``None`` if the file has no classifier."""
    layout: str
    """How the file names and orders its arrays, such as ``torchvision``."""
    why_preprocess: str
    """How the preprocessing on the card was determined."""
    origin: str | None
    """Name of the published file, if its hash is known."""
    left_out: list[str] = field(default_factory=list)
    """Arrays of the file that are not part of the network."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Lines that describe the model, its origin, and what was assumed."""
        classes = "no classes" if self.num_classes is None else f"{self.num_classes} classes"
        lines = [
            f"{self.network}, {self.num_parameters:,} parameters, {classes}",
            f"layout: {self.layout}; preprocess: {self.card.preprocess}, {self.why_preprocess}",
            f"origin: {self.origin}"
            if self.origin
            else "origin and licence: unknown by the file's hash",
        ]
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        lines += [*self.notes, *(f"warning: {warning}" for warning in self.warnings)]
        return [escaped(line) for line in lines]


def convert(
    file: str | Path,
    out: str | Path,
    *,
    convolutional: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    labels: str | Path | None = None,
    image_size: Size | None = None,
    spatial_order: SpatialOrder = "auto",
    pooling: Pooling | None = None,
    kernels: Kernels = "auto",
    leave_out: Collection[str] = (),
    top: bool = True,
) -> Conversion:
    """Convert published weights of a VGG to a meta graph with its checkpoint and card.

    The file is identified by its contents, not by its name. Nothing in it is executed. The network
    computes the same function as the original, or the conversion is refused. Existing files are
    never overwritten.

    Args:
        file: Keras ``.h5`` or ``.keras``, tf-slim checkpoint, ``.npz``, ``.npy``, PyTorch
            ``.pth``, ``.safetensors``, ONNX, MatConvNet ``.mat``, ``.caffemodel``,
            MXNet ``.params``, Paddle ``.pdparams``, Lasagne ``.pkl``, or a frozen ``.tfmodel``.
        out: prefix of the model to write, such as ``models/vgg16``.
        convolutional: write fc6 to fc8 as convolutions, for images of any size from 32 pixels.
        preprocess: preprocessing of the weights: ``caffe``, ``slim``, ``torch``, ``tf``, ``unit``
            or ``none``; or custom means, such as ``{"mean": [93.594, 104.7624, 129.1863], "order":
            "BGR"}``. Default: that in the file; else that of the published file, if its hash is
            known; else the usual one of its layout, with a warning.
        labels: file with one class name per line. Default: the names in the file, or those of
            ImageNet if there are 1000 classes, else ``class 0``, ``class 1``, ...
        image_size: size of the images that the weights were trained with, for files of weights
            alone. Default: the one that the head needs, else 224 pixels, with a warning if there
            is a head that does not say.
        spatial_order: which spatial axis of MatConvNet's kernels comes first; in old files it is
            the columns. ``auto``: by the age of the file.
        pooling: the layer before the first fully connected layer; needed if that layer has as many
            inputs as the last convolution has outputs and the file does not say.
        kernels: whether kernels are ``flipped``, as those of Theano are, or ``unflipped``; needed
            for files of Keras 1 and Lasagne that do not say.
        leave_out: patterns of arrays that do not matter for the features, such as ``extras.*``,
            in files that have no more than arrays.
        top: convert the head with the classes, if there is one; ``False`` leaves it out.

    Returns:
        The model that was written, and what was assumed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a VGG, or ``out`` exists; then nothing is written.

    Example:
        >>> import numpy as np
        >>> from transfer import Backbone, convert
        >>> from transfer.vgg.architectures import ARCHITECTURES, random_weights
        >>> weights = random_weights(ARCHITECTURES["vgg_small"], num_classes=2)
        >>> arrays = {name.replace("/weights", "_W"): value for name, value in weights.items()}
        >>> arrays = {name.replace("/biases", "_b"): value for name, value in arrays.items()}
        >>> np.savez("weights.npz", **arrays)
        >>> conversion = convert("weights.npz", "models/mine")
        >>> Backbone(conversion.prefix).network.output
        'fc7:0'
    """
    file, out = Path(file), Path(out)
    if preprocess is not None:
        try:
            canonical(preprocess)
        except ValueError as error:
            raise ValueError(f"preprocess={preprocess}: {error}") from error
    if out.suffix == ".keras":
        raise ValueError(
            f"out={str(out)!r} names a Keras model, and convert writes a meta graph; give a "
            "prefix, like models/vgg16, and write it with to_keras(prefix).save(...)"
        )
    check_out(out)
    if spatial_order not in _COLUMNS_FIRST:
        raise ValueError(
            f"spatial_order={spatial_order!r} is unknown; choose from {', '.join(_COLUMNS_FIRST)}"
        )
    if kernels not in get_args(Kernels):
        raise ValueError(
            f"kernels={kernels!r} is unknown; choose from {', '.join(get_args(Kernels))}"
        )
    container = containers.read(file)
    published = layouts.identify(
        container,
        columns_first=_COLUMNS_FIRST[spatial_order],
        pooling=pooling,
        leave_out=tuple(leave_out),
        kernels=kernels,
    )
    if not top:
        published = network.without_head(published)
    size, size_warning = _image_size(published, image_size, convolutional)
    sha256 = file_digest(file, container.beside)
    origin = origins.of_file(file_md5(file), sha256) if file.is_file() else None
    preprocessing = preprocessing_of(published, preprocess, origin)
    names, name_note = _class_names(published, labels)
    is_known = f" ({origin.name})" if origin else ""
    source = f"{file.name}{is_known}, layout of {published.layout.name}, sha256 {sha256}"
    card = _save(published, out, names, source, preprocessing.mode, origin, size, convolutional)
    warnings = [warning for warning in (preprocessing.warning, size_warning) if warning]
    if not origin and not labels and not published.labels and names and not name_note:
        warnings.append("the names of its 1000 classes are assumed to be ImageNet's")
    return Conversion(
        prefix=out,
        card=card,
        network=published.name,
        num_parameters=sum(value.size for value in published.values.values()),
        num_classes=published.num_classes,
        layout=published.layout.name,
        why_preprocess=preprocessing.why,
        origin=origin.name if origin else None,
        left_out=[*published.left_out],
        notes=[note for note in (*published.notes, preprocessing.note, name_note) if note],
        warnings=warnings,
    )


_COLUMNS_FIRST = {"auto": None, "rows": False, "columns": True}


def preprocessing_of(
    published: Published, requested: str | Mapping[str, Any] | None, origin: Origin | None
) -> Preprocessing:
    """The preprocessing of the weights, and how it was determined."""
    if requested is not None:
        return Preprocessing(for_card(requested), "as given")
    if published.preprocess is not None:
        return Preprocessing(for_card(published.preprocess), "as the file says")
    if origin is not None:
        return Preprocessing(for_card(origin.preprocess), "as published")
    known = origins.convention_of(published.values["conv1_1/weights"])
    is_imagenet = published.num_classes in (None, NUM_IMAGENET_CLASSES)
    if known is not None:
        why = "as the first convolution, which is that of Oxford's VGG16, was trained with"
        note = "" if is_imagenet else "if the head was trained with another: preprocess=MODE"
        return Preprocessing(known, why, note=note)
    if not is_imagenet and published.layout.container in ("Caffe", "MatConvNet"):
        if published.num_classes == _VGG_FACE_CLASSES:
            return Preprocessing(
                for_card(_VGG_FACE),
                "assumed",
                f"its {_VGG_FACE_CLASSES} classes are as many as VGG-Face has, whose mean is "
                "taken. If it was trained otherwise, convert it with preprocess=MODE",
            )
        warning = (
            f"nothing tells which mean the images of its {published.num_classes} classes had; give "
            "it with preprocess=MEAN, here or when the model is fine-tuned"
        )
        return Preprocessing(None, "unknown", warning)
    mode = published.layout.preprocess
    if published.num_classes == _VGG_FACE_CLASSES:
        mode = _VGG_FACE_RGB if mode in ("slim", "torch") else _VGG_FACE
    return Preprocessing(
        mode,
        "assumed",
        f"the file is not one that is known by its hash; preprocess {mode} is what others of its "
        "layout expect. If it was trained otherwise, convert it with preprocess=MODE",
    )


def _image_size(
    published: Published, requested: Size | None, convolutional: bool
) -> tuple[Size, str]:
    """The size of the images for the card, and a warning if it is assumed."""
    architecture = published.architecture
    known = published.image_size
    has_head = published.num_classes is not None
    if has_head and architecture.pooling == "flatten":
        known = known or architecture.image_size
    if requested is None:
        is_assumed = has_head and known is None
        return known or architecture.image_size, is_assumed * (
            f"the file does not say the size of its images; {architecture.image_size} pixels are "
            "assumed. If its head was trained with another, convert it with image_size=PIXELS"
        )
    is_fixed = has_head and architecture.pooling == "flatten" and not convolutional
    if is_fixed and as_size(requested) != known:
        raise ValueError(
            f"image_size={requested} does not fit its head, which takes images of {known} pixels"
        )
    return as_size(requested), ""


def _save(
    published: Published,
    prefix: Path,
    names: list[str],
    source: str,
    preprocess: str | dict[str, Any] | None,
    origin: Origin | None,
    image_size: Size,
    convolutional: bool,
) -> Card:
    """Write meta graph, checkpoint, labels and card; returns the card."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    labels = prefix.with_name(f"{prefix.name}.labels.txt")
    architecture = published.architecture
    tap = f"pool{len(architecture.blocks)}:0"
    outputs: dict[str, str] = {}
    if published.num_classes is not None:
        *hidden, (logits, *_) = architecture.connected
        outputs = {"logits": f"{logits}:0", "probabilities": "prob:0"}
        if hidden:
            tap = f"{hidden[-1][0]}:0"
    card = Card(
        input="images:0",
        tap=tap,
        image_size=image_size,
        preprocess=preprocess,
        labels=labels.name if names else None,
        outputs=outputs,
        source=source,
        licence=origin.licence if origin else None,
        trained_on=origin.trained_on if origin else None,
    )
    graph = architectures.build_graph(
        published.architecture, published.num_classes, convolutional=convolutional
    )
    shapes = architectures.kernel_shapes(
        published.architecture, published.num_classes, convolutional=convolutional
    )
    values = {
        name: value.reshape(shapes[layer]) if part == "weights" else value
        for name, value in published.values.items()
        for layer, part in [name.split("/")]
    }
    # The labels get their name after the model: alone, they would prevent the next conversion.
    with replacing(labels) if names else nullcontext() as draft:
        if draft is not None:
            write_names(draft, names)
        save_meta_graph(graph, prefix, values, card)
    return card


def check_out(prefix: Path) -> None:
    """Check that no file of a model with this prefix exists, so that nothing is overwritten.

    Raises:
        ValueError: names an existing file.
    """
    checkpoint.check_path(prefix)
    name = glob.escape(prefix.name)
    patterns = [f"{name}.{end}" for end in ("meta", "index", "data-*", "json", "labels.txt")]
    existing = [path for pattern in patterns for path in prefix.parent.glob(pattern)]
    if existing:
        raise ValueError(f"{str(existing[0])!r} is there already; choose another out=PREFIX")


def file_digest(path: Path, beside: Iterable[Path] = ()) -> str:
    """SHA-256 of a file and those ``beside`` it with its arrays, or of all files of a checkpoint,
    concatenated."""
    files = [path] if path.is_file() and not checkpoint.PART.search(path.name) else []
    if not files:
        prefix = glob.escape(checkpoint.PART.sub("", path.name))
        patterns = (f"{prefix}.index", f"{prefix}.data-*", f"{prefix}-?????-of-?????")
        files = [part for pattern in patterns for part in sorted(path.parent.glob(pattern))]
    return file_sha256(*files, *beside)


def file_md5(path: Path) -> str:
    """MD5 of a file, by which files of Keras, Caffe and MatConvNet are identified."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _class_names(published: Published, labels: str | Path | None) -> tuple[list[str], str]:
    """Class names, and a note if there are none."""
    num_classes = published.num_classes
    if labels is not None:
        names = read_names(Path(labels))
        if len(names) != num_classes:
            raise ValueError(
                f"{str(labels)!r} has {len(names)} names; the model has {num_classes or 'no'} "
                "classes"
            )
        return names, ""
    if num_classes is None:
        return [], ""
    if published.labels:
        return [" ".join(name.split()) for name in published.labels], ""
    if num_classes != NUM_IMAGENET_CLASSES:
        names = [f"class {number}" for number in range(num_classes)]
        return names, "the file has no class names; give them with labels=FILE"
    text = (files("transfer.vgg.published") / "imagenet_labels.txt").read_text(encoding="utf-8")
    return text.splitlines(), ""
