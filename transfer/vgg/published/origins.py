"""Published files by hash: their origin, licence and preprocessing.

Only the hash identifies the origin of weights. The layout does not: users' own networks have the
layouts of Keras Applications and torchvision, but other means, classes and licences.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.vgg.published.torch_vgg import FEATURES_MEAN

_OXFORD = "CC BY 4.0 (weights: Visual Geometry Group, University of Oxford)"
_TORCHVISION = "BSD-3-Clause (weights: torchvision)"


@dataclass(frozen=True)
class Origin:
    """A published file. ``preprocess`` is the preprocessing of its weights, see
    ``transfer.images.preprocess.convention``."""

    name: str
    licence: str | None
    preprocess: str | dict[str, Any]
    trained_on: str = "ImageNet"


def _oxford(name: str, preprocess: str = "caffe") -> Origin:
    return Origin(name, _OXFORD, preprocess)


def _torchvision(name: str) -> Origin:
    return Origin(name, _TORCHVISION, "torch")


# Sources: keras/src/applications/vgg16.py and vgg19.py; for Caffe's, the gists of K. Simonyan that
# publish them and ry/tensorflow-vgg16; for MatConvNet's, tests that download them.
_BY_MD5 = {
    "64373286793e3c8b2b4e3219cbf3544b": _oxford("Keras Applications VGG16"),
    "6d6bbae143d832006294945121d1f1fc": _oxford("Keras Applications VGG16 without top"),
    "cbe5617147190e668d6c5d5026f83318": _oxford("Keras Applications VGG19"),
    "253f8cb515780f3b799900260a226db6": _oxford("Keras Applications VGG19 without top"),
    "441315b0ff6932dbfde97731be7ca852": _oxford("VGG_ILSVRC_16_layers.caffemodel"),
    "b5c644beabd7cf06bdd9065cfd674c97": _oxford("VGG_ILSVRC_19_layers.caffemodel"),
    "f72d927587ca4c97fbd165ec9cb9997f": _oxford("MatConvNet imagenet-vgg-verydeep-16", "slim"),
    "106118b7cf60435e6d8e04f6a6dc3657": _oxford("MatConvNet imagenet-vgg-verydeep-19", "slim"),
    # Source: github.com/ZZUTK/Tensorflow-VGG-face; mean: robots.ox.ac.uk/~vgg/software/vgg_face.
    "3d6cd504bf9c98af4a561aad059565d1": Origin(
        "VGG-Face for MatConvNet",
        None,
        {"mean": [129.1863, 104.7624, 93.5940], "order": "RGB"},
        "VGG-Face",
    ),
}

# PyTorch's file names end with the first eight digits of their SHA256, which torch.hub checks.
# Sources: torchvision/models/vgg.py of several years; github.com/jcjohnson/pytorch-vgg, whose files
# contain Oxford's weights under PyTorch's names.
_BY_SHA256 = {
    "8a719046": _torchvision("torchvision vgg11"),
    "bbd30ac9": _torchvision("torchvision vgg11"),
    "19584684": _torchvision("torchvision vgg13"),
    "c768596a": _torchvision("torchvision vgg13"),
    "397923af": _torchvision("torchvision vgg16"),
    "dcbb9e9d": _torchvision("torchvision vgg19"),
    "6002323d": _torchvision("torchvision vgg11_bn"),
    "abd245e5": _torchvision("torchvision vgg13_bn"),
    "6c64b313": _torchvision("torchvision vgg16_bn"),
    "c79401a0": _torchvision("torchvision vgg19_bn"),
    # Its normalization: images in 0..1 minus a mean, divided by 1/255.
    "88682ab5": Origin("torchvision vgg16, IMAGENET1K_FEATURES", None, FEATURES_MEAN),
    "00b39a1b": _oxford("jcjohnson/pytorch-vgg vgg16"),
    "d01eb7cb": _oxford("jcjohnson/pytorch-vgg vgg19"),
}

# SHA256 of the kernel of VGG16's conv1_1, float32 [3, 3, 3, 64], input channels BGR.
_OXFORD_CONV1_1 = "564034bfdba3ca76c2787bb27101f4fff7fa318d2fbce72b98ee85a91ac7233c"


def of_file(md5: str, sha256: str) -> Origin | None:
    """The published file with these hashes; ``None`` if none is known."""
    return _BY_MD5.get(md5) or _BY_SHA256.get(sha256[:8])


def convention_of(kernel: np.ndarray) -> str | None:
    """Preprocessing of a first convolution that is bit-identical to that of Oxford's VGG16, in any
    file: ``caffe`` or ``slim``, depending on its channel order; otherwise ``None``.

    Args:
        kernel: float32 ``[3, 3, 3, outputs]``.
    """
    for mode, inputs in (("caffe", kernel), ("slim", kernel[:, :, ::-1])):
        digest = hashlib.sha256(np.ascontiguousarray(inputs, "<f4").tobytes()).hexdigest()
        if digest == _OXFORD_CONV1_1:
            return mode
    return None
