"""What ``vgg-transfer convert`` does; its flags are in ``recipes.convert``."""

from __future__ import annotations

import glob
from importlib.resources import files
from pathlib import Path

from recipes.convert import ConvertConfig
from transfer import Card, checkpoint, save_meta_graph, vgg
from transfer.preprocess import CONVENTIONS
from transfer.published import containers, layouts
from transfer.published.layouts import Published
from transfer.runs import run_folder
from transfer.saver import file_sha256

NUM_IMAGENET_CLASSES = 1000


def run(file: Path, config: ConvertConfig) -> list[str]:
    """Convert a file; returns what to print.

    Raises:
        ValueError, OSError: if it cannot be read or is no VGG; nothing is written then.
    """
    if config.preprocess is not None and config.preprocess not in CONVENTIONS:
        raise ValueError(f"--preprocess {config.preprocess}: choose from {', '.join(CONVENTIONS)}")
    check_out(config.out)
    columns_first = {"auto": None, "rows": False, "columns": True}[config.spatial_order]
    found = layouts.identify(containers.read(file), columns_first=columns_first)
    names = _class_names(config, found)
    source = f"{file.name}, layout of {found.layout.name}, sha256 {file_digest(file)}"
    card = save(found, config, names, source)
    return [
        f"{found.name}, {sum(v.size for v in found.values.values()):,} parameters, "
        + ("no classes" if found.num_classes is None else f"{found.num_classes} classes"),
        f"layout: {found.layout.name}; preprocess: {card.preprocess}"
        + ("" if config.preprocess else ", as published; --preprocess if yours expect another"),
        *([f"left out: {', '.join(found.left_out)}"] if found.left_out else []),
        str(config.out),
    ]


def save(found: Published, config: ConvertConfig, names: list[str], source: str) -> Card:
    """Write meta graph, checkpoint, labels and card; returns the card."""
    prefix = config.out
    prefix.parent.mkdir(parents=True, exist_ok=True)
    has_top = found.num_classes is not None
    labels = prefix.with_name(f"{prefix.name}.labels.txt")
    if names:
        run_folder.write_text(labels, "".join(f"{name}\n" for name in names))
    card = Card(
        input="images:0",
        tap="fc7:0" if has_top else f"pool{len(found.architecture.blocks)}:0",
        image_size=found.architecture.image_size,
        preprocess=config.preprocess or found.layout.preprocess,
        labels=labels.name if names else None,
        outputs={"logits": "fc8:0", "probabilities": "prob:0"} if has_top else {},
        source=source,
        licence=found.licence,
        trained_on="ImageNet" if found.num_classes == NUM_IMAGENET_CLASSES else None,
    )
    graph = vgg.build_graph(
        found.architecture, found.num_classes, convolutional=config.convolutional
    )
    shapes = vgg.kernel_shapes(
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


def _class_names(config: ConvertConfig, found: Published) -> list[str]:
    if config.labels is not None:
        names = config.labels.read_text(encoding="utf-8").splitlines()
        if len(names) != found.num_classes:
            raise ValueError(
                f"{str(config.labels)!r} has {len(names)} names; the model has {found.num_classes} "
                "classes"
            )
        return names
    if found.num_classes != NUM_IMAGENET_CLASSES:
        return []
    text = (files("transfer.published") / "imagenet_labels.txt").read_text(encoding="utf-8")
    return text.splitlines()
