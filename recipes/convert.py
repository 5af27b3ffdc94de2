"""From published weights of a VGG to a meta graph with its checkpoint and card.

    vgg-transfer convert vgg16_weights_tf_dim_ordering_tf_kernels.h5 --out models/vgg16
    vgg-transfer convert vgg16-397923af.pth --out models/vgg16_torch

What a file is follows from what it holds, not from its name. Nothing in it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from recipes import terminal
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Flags of ``vgg-transfer convert``, with their defaults."""

    out: Path
    """Prefix of the model to write, e.g. models/vgg16."""
    convolutional: bool = False
    """Write fc6 to fc8 as convolutions, so that images of any size from 32 pixels up fit."""
    preprocess: str | None = None
    """What the weights expect: caffe, slim, torch, tf, unit or none; or means of their own, e.g.
    '{"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}'. [default: what the file says; for a
    file that is known by its hash, what it was published with; else what others of its layout were,
    with a warning]"""
    labels: Path | None = None
    """File with one class name a line. [default: the file's own, or the names of ImageNet where
    there are 1000]"""
    spatial_order: Literal["auto", "rows", "columns"] = "auto"
    """Which of the spatial axes of the kernels comes first; old MatConvNet files have the columns
    first. auto: by the age of the file."""
    pooling: Literal["flatten", "average"] | None = None
    """What stands before the first fully connected layer; needed where its inputs are as many as
    the last convolution has outputs and the file does not say."""
    leave_out: tuple[str, ...] = ()
    """Arrays of the file that do not matter for its features, e.g. 'extras.*'; repeatable."""


def convert(
    file: Annotated[
        Path,
        Parameter(
            help="Keras .h5 or .keras, tf-slim checkpoint, .npz, .npy, PyTorch .pth, .safetensors, "
            "MatConvNet .mat, .caffemodel, or a frozen .tfmodel."
        ),
    ],
    *,
    config: ConvertConfig,
) -> int:
    """Convert published weights of a VGG to a meta graph."""
    with job():
        from recipes.convert_report import lines_of
        from transfer.vgg.published.conversion import convert as convert_file

        conversion = convert_file(file, **vars(config))
    print("\n".join([*lines_of(conversion), terminal.escaped(str(conversion.prefix))]))
    return 0
