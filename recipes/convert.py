"""Convert published VGG weights to a meta graph with its checkpoint and card; any model to Keras.

    vgg-transfer convert vgg16_weights_tf_dim_ordering_tf_kernels.h5 --out models/vgg16
    vgg-transfer convert vgg16-397923af.pth --out models/vgg16_torch
    vgg-transfer convert vgg.meta --out vgg.keras --tap fc7

With --out FILE.keras the result is a Keras model of stock layers, which loads without this package
on TensorFlow, JAX and PyTorch. Meta graphs, V1 checkpoints, frozen graphs and SavedModels are
converted like published weights.

The file format is detected from the content, not the name. No code in the file is executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from recipes import console, terminal
from recipes.flag_values import changed
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Flags of ``vgg-transfer convert``, with their defaults."""

    out: Path
    """Checkpoint prefix of the model to write, e.g. models/vgg16; or a file like models/vgg16.keras
    for a native Keras model."""
    tap: str | None = None
    """Tensor with the output of a native Keras model. [default: the card's, else fc7]"""
    image_size: str | None = None
    """Size of its images, if the file does not state it: pixels, or HEIGHTxWIDTH. [default: that of
    the file or its card; for weights alone, the one that the head needs, else 224]"""
    convolutional: bool = False
    """Write fc6 to fc8 as convolutions, to accept images of any size from 32 pixels up."""
    preprocess: str | None = None
    """Preprocessing that the weights expect: caffe, slim, torch, tf, unit or none; or custom means,
    e.g. '{"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}'. [default: as stored in the file;
    for a file with a known hash, as published; else as usual for its layout, with a warning]"""
    labels: Path | None = None
    """File with one class name per line. [default: the names in the weights file, or the ImageNet
    names for 1000 classes, else class 0, class 1, ...]"""
    spatial_order: Literal["auto", "rows", "columns"] = "auto"
    """Spatial axis of the kernels that comes first; old MatConvNet files are columns-first. auto:
    decided by the age of the file."""
    pooling: Literal["flatten", "average", "max"] | None = None
    """Operation before the first fully connected layer; needed if that layer has as many inputs as
    the last convolution has output channels and the file does not say which one it is."""
    kernels: Literal["auto", "flipped", "unflipped"] = "auto"
    """Whether kernels are flipped, as Theano's are; needed for files of Keras 1 and Lasagne that do
    not say."""
    top: bool = True
    """Convert the head with the classes, if there is one; --no-top leaves it out."""
    leave_out: tuple[str, ...] = ()
    """Arrays in the file to ignore, because the features do not depend on them, e.g. 'extras.*'.
    Repeatable."""


def convert(
    file: Annotated[
        Path,
        Parameter(
            help="Keras .h5 or .keras, tf-slim checkpoint, .npz, .npy, PyTorch .pth, .safetensors, "
            "ONNX, MatConvNet .mat, .caffemodel, MXNet .params, Paddle .pdparams, Lasagne .pkl, or "
            "a frozen .tfmodel. For --out FILE.keras also a meta graph, a frozen graph or a "
            "SavedModel."
        ),
    ],
    *,
    config: ConvertConfig,
) -> int:
    """Convert published VGG weights to a meta graph, or any model to a native Keras model."""
    with job():
        conversion = _convert(file, changed(config))
    print("\n".join(map(console.with_flags, conversion.describe())))
    print(terminal.escaped(str(conversion.prefix)))
    return 0


def _convert(file: Path, options: dict[str, Any]) -> Any:
    from transfer.images.preprocess import parse_size

    if "image_size" in options:
        options["image_size"] = parse_size(options["image_size"])
    if options["out"].suffix == ".keras":
        from transfer.vgg.native import convert_to_keras

        return convert_to_keras(file, **options)
    from transfer.vgg.published.conversion import convert

    if "tap" in options:
        raise ValueError(f"tap={options['tap']} is for a native Keras model: out=FILE.keras")
    return convert(file, **options)
