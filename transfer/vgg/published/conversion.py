"""What ``vgg-transfer convert`` does; its flags are in ``recipes.convert``."""

from __future__ import annotations

import glob
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from recipes.convert import ConvertConfig
from transfer import Card, save_meta_graph
from transfer.core.files import read_names, write_names
from transfer.images.preprocess import canonical, for_card
from transfer.models import checkpoint
from transfer.models.saver import file_sha256
from transfer.vgg import architectures
from transfer.vgg.published import containers, layouts, origins
from transfer.vgg.published.layouts import Published
from transfer.vgg.published.origins import Origin

NUM_IMAGENET_CLASSES = 1000


_VGG_FACE_CLASSES = 2622
# Source: robots.ox.ac.uk/~vgg/software/vgg_face; the same numbers in RGB are in its .mat.
_VGG_FACE = {"mean": [93.5940, 104.7624, 129.1863], "order": "BGR"}


class Preprocessing(NamedTuple):
    """``mode``: for the card, ``None`` if nothing tells. ``why``: how it is known. ``warning``:
    what to do if it is not."""

    mode: str | dict[str, Any] | None
    why: str
    warning: str = ""


def run(file: Path, config: ConvertConfig) -> list[str]:
    """Convert a file; returns what to print.

    Raises:
        ValueError, OSError: if it cannot be read or is no VGG; nothing is written then.
    """
    if config.preprocess is not None:
        try:
            canonical(config.preprocess)
        except ValueError as error:
            raise ValueError(f"--preprocess {config.preprocess}: {error}") from error
    check_out(config.out)
    columns_first = {"auto": None, "rows": False, "columns": True}[config.spatial_order]
    found = layouts.identify(
        containers.read(file),
        columns_first=columns_first,
        pooling=config.pooling,
        leave_out=config.leave_out,
    )
    sha256 = file_digest(file)
    origin = origins.of_file(file_md5(file), sha256) if file.is_file() else None
    preprocessing = preprocessing_of(found, config, origin)
    names = _class_names(config, found)
    is_known = f" ({origin.name})" if origin else ""
    source = f"{file.name}{is_known}, layout of {found.layout.name}, sha256 {sha256}"
    save(found, config, names, source, preprocessing.mode, origin)
    lines = [
        f"{found.name}, {sum(v.size for v in found.values.values()):,} parameters, "
        + ("no classes" if found.num_classes is None else f"{found.num_classes} classes"),
        f"layout: {found.layout.name}; preprocess: {preprocessing.mode}, {preprocessing.why}",
        f"origin: {origin.name}" if origin else "origin and licence: unknown by the file's hash",
    ]
    lines += [f"left out: {', '.join(found.left_out)}"] if found.left_out else []
    lines += [*found.notes, preprocessing.warning]
    if not origin and not config.labels and not found.labels and names:
        lines.append("warning: the names of its 1000 classes are assumed to be ImageNet's")
    return [line for line in lines if line] + [str(config.out)]


def preprocessing_of(
    found: Published, config: ConvertConfig, origin: Origin | None
) -> Preprocessing:
    """What the weights expect of their images, and how that is known."""
    if config.preprocess is not None:
        return Preprocessing(for_card(config.preprocess), "as given")
    if found.preprocess is not None:
        return Preprocessing(for_card(found.preprocess), "as the file says")
    if origin is not None:
        return Preprocessing(for_card(origin.preprocess), "as published")
    known = origins.convention_of(found.values["conv1_1/weights"])
    is_imagenet = found.num_classes in (None, NUM_IMAGENET_CLASSES)
    if known is not None:
        why = "as the first convolution, which is that of Oxford's VGG16, was trained with"
        warning = "" if is_imagenet else "if the head was trained with another: --preprocess"
        return Preprocessing(known, why, warning)
    if not is_imagenet and found.layout.container in ("Caffe", "MatConvNet"):
        hint = f"; VGG-Face expects {canonical(_VGG_FACE)}"
        warning = (
            f"warning: nothing tells which mean the images of its {found.num_classes} classes had; "
            "give it with --preprocess, here or to finetune"
            + (hint if found.num_classes == _VGG_FACE_CLASSES else "")
        )
        return Preprocessing(None, "unknown", warning)
    mode = found.layout.preprocess
    return Preprocessing(
        mode,
        "assumed",
        f"warning: the file is not one that is known by its hash; preprocess {mode} is what others "
        "of its layout expect. If it was trained otherwise, convert it with --preprocess",
    )


def save(
    found: Published,
    config: ConvertConfig,
    names: list[str],
    source: str,
    preprocess: str | dict[str, Any] | None,
    origin: Origin | None,
) -> Card:
    """Write meta graph, checkpoint, labels and card; returns the card."""
    prefix = config.out
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
        found.architecture, found.num_classes, convolutional=config.convolutional
    )
    shapes = architectures.kernel_shapes(
        found.architecture, found.num_classes, convolutional=config.convolutional
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
        raise ValueError(f"{str(existing[0])!r} is there already; choose another --out")


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


def _class_names(config: ConvertConfig, found: Published) -> list[str]:
    if config.labels is not None:
        names = read_names(config.labels)
        if len(names) != found.num_classes:
            raise ValueError(
                f"{str(config.labels)!r} has {len(names)} names; the model has {found.num_classes} "
                "classes"
            )
        return names
    if found.labels:
        return [" ".join(name.split()) for name in found.labels]
    if found.num_classes != NUM_IMAGENET_CLASSES:
        return []
    text = (files("transfer.vgg.published") / "imagenet_labels.txt").read_text(encoding="utf-8")
    return text.splitlines()
