"""Published VGG weights that ``pull`` can download: where they are, and what is known of them.

Hashes are only those that the publisher states: MD5 in the source of Keras Applications, the first
eight digits of SHA-256 in torchvision's file names, SHA-256 of Hugging Face's large files. Accuracy
is that on ImageNet's validation images, one crop, as the publisher states it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_TORCH = "https://download.pytorch.org/models"
_TIMM = "https://huggingface.co/timm"
_SLIM = "http://download.tensorflow.org/models"
_FACE = "https://github.com/rcmalli/keras-vggface/releases/download/v2.0"
_OXFORD = "CC BY 4.0 (weights: Visual Geometry Group, University of Oxford)"
_BSD = "BSD-3-Clause (weights: torchvision)"
_KERAS_ACCURACY = "github.com/keras-team/keras-applications"
_TORCH_ACCURACY = "torchvision/models/vgg.py"


@dataclass(frozen=True)
class Entry:
    """One published file. ``sha256`` may be its first digits only; without ``md5`` and ``sha256``
    the download cannot be verified. ``accuracy``: top-1 and top-5 in percent, ``accuracy_source``:
    who states it. ``preprocess`` is ``None`` if the publisher does not state it."""

    name: str
    network: str
    publisher: str
    url: str
    licence: str | None
    preprocess: str | dict[str, Any] | None
    md5: str = ""
    sha256: str = ""
    accuracy: tuple[float, float] | None = None
    accuracy_source: str = ""
    num_classes: int = 1000
    trained_on: str = "ImageNet"

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        file = self.url.rsplit("/", 1)[1]
        return f"{self.name}.safetensors" if file == "model.safetensors" else file

    @property
    def verified_by(self) -> str:
        """The hash that a download is compared with; ``unverified`` if none is published."""
        if self.md5:
            return "MD5"
        if not self.sha256:
            return "unverified"
        return "SHA-256" if len(self.sha256) == 64 else f"SHA-256, first {len(self.sha256)} digits"


def _torchvision(name: str, digits: str, accuracy: tuple[float, float]) -> Entry:
    return Entry(
        f"{name}-torchvision",
        name.removesuffix("_bn"),
        "torchvision",
        f"{_TORCH}/{name}-{digits}.pth",
        _BSD,
        "torch",
        sha256=digits,
        accuracy=accuracy,
        accuracy_source=_TORCH_ACCURACY,
    )


def _timm(name: str, sha256: str = "") -> Entry:
    url = f"{_TIMM}/{name}.tv_in1k/resolve/main/model.safetensors"
    network = name.removesuffix("_bn")
    return Entry(f"{name}-timm", network, "timm", url, _BSD, "torch", sha256=sha256)


def _keras(name: str, md5: str, accuracy: tuple[float, float]) -> Entry:
    return Entry(
        name,
        name,
        "Keras Applications",
        f"{_KERAS}/{name}/{name}_weights_tf_dim_ordering_tf_kernels.h5",
        _OXFORD,
        "caffe",
        md5=md5,
        accuracy=accuracy,
        accuracy_source=_KERAS_ACCURACY,
    )


_ENTRIES = (
    _keras("vgg16", "64373286793e3c8b2b4e3219cbf3544b", (71.268, 90.050)),
    _keras("vgg19", "cbe5617147190e668d6c5d5026f83318", (71.256, 89.988)),
    _torchvision("vgg11", "8a719046", (69.020, 88.628)),
    _torchvision("vgg11_bn", "6002323d", (70.370, 89.810)),
    _torchvision("vgg13", "19584684", (69.928, 89.246)),
    _torchvision("vgg13_bn", "abd245e5", (71.586, 90.374)),
    _torchvision("vgg16", "397923af", (71.592, 90.382)),
    _torchvision("vgg16_bn", "6c64b313", (73.360, 91.516)),
    _torchvision("vgg19", "dcbb9e9d", (72.376, 90.876)),
    _torchvision("vgg19_bn", "c79401a0", (74.218, 91.842)),
    _timm("vgg16", "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8"),
    _timm("vgg16_bn", "88bbedbc8e780413736db38ac4efd41b06fc0e93fd5b8879b584bba63a950129"),
    _timm("vgg19_bn", "f8249087e63bae61c6166bb23d7c26efe1b2a43fd9fb5cd60ac6ce00535ba312"),
    Entry(
        "vgg16-slim",
        "vgg16",
        "tf-slim",
        f"{_SLIM}/vgg_16_2016_08_28.tar.gz",
        _OXFORD,
        "slim",
        accuracy=(71.5, 89.8),
        accuracy_source="tensorflow/models, research/slim/README.md",
    ),
    Entry(
        "vgg19-slim",
        "vgg19",
        "tf-slim",
        f"{_SLIM}/vgg_19_2016_08_28.tar.gz",
        _OXFORD,
        "slim",
        accuracy=(71.1, 89.8),
        accuracy_source="tensorflow/models, research/slim/README.md",
    ),
    Entry(
        "vgg16-places365",
        "vgg16",
        "MIT, Places365",
        "http://places2.csail.mit.edu/models_places365/vgg16_places365.caffemodel",
        None,
        None,
        num_classes=365,
        trained_on="Places365",
    ),
    Entry(
        "vgg16-vggface",
        "vgg16",
        "keras-vggface",
        f"{_FACE}/rcmalli_vggface_tf_vgg16.h5",
        None,
        {"mean": [93.5940, 104.7624, 129.1863], "order": "BGR"},
        num_classes=2622,
        trained_on="VGG-Face",
    ),
)
CATALOGUE = {entry.name: entry for entry in _ENTRIES}


def table() -> str:
    """The catalogue as text, one row per file."""
    rows = []
    for entry in CATALOGUE.values():
        preprocess = entry.preprocess if isinstance(entry.preprocess, str) else "means"
        rows.append(
            [
                entry.name,
                f"{entry.publisher}, {entry.trained_on}",
                *([f"{value:.3f}" for value in entry.accuracy or ()] or ["-", "-"]),
                preprocess if entry.preprocess else "?",
                entry.verified_by,
                (entry.licence or "not stated").split(" (")[0],
            ]
        )
    header = ["name", "published by", "top-1", "top-5", "preprocess", "verified by", "licence"]
    return tabulate(rows, header, tablefmt="plain", disable_numparse=True)
