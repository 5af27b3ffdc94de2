"""Known layouts of published weights: names, shapes and preprocessing, and where they are
documented.

=================  =========================================================================
keras              keras.applications.vgg16, vgg19: github.com/keras-team/keras-applications
tf-slim            github.com/tensorflow/models, research/slim: vgg_16.ckpt, vgg_19.ckpt
keras 1, Theano    github.com/fchollet/deep-learning-models, ..._th_dim_ordering_th_kernels.h5; and
                   gist.github.com/baraldilorenzo/07d7802847aaad0a35d3: vgg16_weights.h5
frossard           cs.toronto.edu/~frossard/post/vgg16: vgg16_weights.npz
chainer            github.com/chainer/chainer, links/model/vision/vgg.py: VGG16Layers, VGG19Layers;
                   prepare() takes BGR
tensorpack         github.com/tensorpack/tensorpack, tensorpack/utils/loadcaffe.py: vgg16.npz; the
                   channel order stays Caffe's
lasagne            github.com/Lasagne/Recipes, modelzoo/vgg16.py: vgg16.pkl, vgg19.pkl
paddle             github.com/PaddlePaddle/Paddle, python/paddle/vision/models/vgg.py; matrices
                   [inputs, outputs]: paddlepaddle.org.cn, paddle.nn.Linear
mxnet              github.com/apache/mxnet, python/mxnet/gluon/model_zoo/vision/vgg.py; symbolic
                   vgg16-0000.params, from Caffe with the channels swapped to RGB:
                   tools/caffe_converter/convert_model.py, github.com/dmlc/mxnet-model-gallery
machrisaa          github.com/machrisaa/tensorflow-vgg: vgg16.npy, vgg19.npy
torchvision, timm  pytorch.org/vision, github.com/huggingface/pytorch-image-models
gatys              github.com/leongatys/PytorchNeuralStyleTransfer: vgg_conv.pth, BGR
pytorch-mcn        robots.ox.ac.uk/~albanie/pytorch-models.html: vgg_face_dag.pth, whose meta has
                   the mean in the order RGB
ssd                github.com/amdegroot/ssd.pytorch: vgg16_reducedfc.pth; normalization:
                   torchvision/models/detection/ssd.py, which ported these weights
matconvnet         vlfeat.org/matconvnet/pretrained: imagenet-vgg-verydeep-16.mat, -19
caffe              robots.ox.ac.uk/~vgg/research/very_deep: VGG_ILSVRC_16_layers.caffemodel
tfmodel            github.com/ry/tensorflow-vgg16: vgg16.tfmodel
vgg-face           github.com/rcmalli/keras-vggface: rcmalli_vggface_tf_vgg16.h5. Unnamed layers:
                   github.com/serengil/deepface, models/facial_recognition/VGGFace.py; BGR minus
                   the mean is normalization="VGGFace" in its modules/preprocessing.py
flaxmodels         github.com/matthias-wright/flaxmodels: vgg16_weights.h5, vgg19_weights.h5
onnx               github.com/onnx/models, torch.onnx, tf2onnx: see ``onnx_model``
=================  =========================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transfer.vgg.published import torch_vgg


@dataclass(frozen=True)
class Layout:
    """Names, shapes and preprocessing of one kind of published weights.

    Args:
        name: name for messages.
        container: ``Container.kind`` of its files.
        pattern: regular expression for array names, with a group ``layer``.
        preprocess: preprocessing of the published weights: a key of
            ``transfer.images.preprocess.CONVENTIONS``.
        outputs_first: kernels are ``[outputs, inputs, height, width]`` and ``[outputs, inputs]``,
            and the inputs of fc6 are in the order channel, height, width.
        columns_first: the two spatial axes are swapped.
        channels_first: the inputs of fc6 are in the order channel, height, width, in kernels
            ``[inputs, outputs]``.
    """

    name: str
    container: str
    pattern: str
    preprocess: str | dict[str, Any]
    outputs_first: bool = False
    columns_first: bool = False
    channels_first: bool = False


_LAYER = r"(?P<layer>conv\d_\d|fc[678])"
# Places365 and others call their own last layer fc8a, fc8_flickr, ...
_CAFFE = r"(?P<layer>conv\d_\d|fc[67]|fc8)(?:(?<=fc8)[a-z_]\w*)?"
_CAFFE_NAME = r"(?:.*\.)?conv1_1"
_UNNAMED = r"(?:conv2d|convolution2d|dense)"  # the second one: Keras 1
_SLIM = r"(?:weights|biases|BatchNorm/(?:beta|gamma|moving_mean|moving_variance))"
LAYOUTS = (
    Layout("keras", "HDF5", r"(?:.*/)?(?P<layer>block\d_conv\d|fc[12]|predictions)/.*", "caffe"),
    Layout("keras", "HDF5", rf"(?:.*/)?(?P<layer>{_UNNAMED}(?:_\d+)?)/(?:.*/)?[^/]*", "caffe"),
    Layout("flaxmodels", "HDF5", rf"{_LAYER}/(?:weight|bias)$", "torch", channels_first=True),
    Layout(
        "vgg-face",
        "HDF5",
        rf"(?:.*/)?{_LAYER}/(?:\w+_\d_|fc\d_)?(?:kernel|bias|W|b)(?:_\d)?(?::0)?$",
        {"mean": [93.5940, 104.7624, 129.1863], "order": "BGR"},
    ),
    Layout("keras 1, Theano", "HDF5", r"(?P<layer>layer_\d+)/param_[01]$", "caffe"),
    Layout("keras", "TF2 checkpoint", r"(?:.*/)?(?P<layer>(?:conv2d|dense)_\d+)/.*", "caffe"),
    Layout("tf-slim", "checkpoint", rf"vgg_\w+/(?:conv\d/|fc/)?{_LAYER}/{_SLIM}$", "slim"),
    Layout("frossard", "npz", rf"{_LAYER}_[Wb]$", "slim"),
    Layout("chainer", "npz", rf"{_LAYER}/[Wb]$", "caffe", outputs_first=True),
    Layout("tensorpack", "npz", rf"{_LAYER}/[Wb]$", "caffe"),
    Layout("machrisaa", "npy", rf"(?:.*/)?{_LAYER}/[01]$", "caffe"),
    # Those that torch_vgg reads: by the name of their first convolution.
    Layout("gatys", "PyTorch", _CAFFE_NAME, "caffe"),
    Layout("torchvision", "PyTorch", ".*", "torch"),
    Layout("timm", "safetensors", ".*", "torch"),
    Layout("lasagne", "Lasagne", ".*", "caffe"),
    Layout("paddle", "Paddle", ".*", "torch"),
    Layout("mxnet", "MXNet", _CAFFE_NAME, "slim"),
    Layout("mxnet", "MXNet", ".*", "torch"),
    Layout("matconvnet", "MatConvNet", rf"{_LAYER}/[01]$", "slim"),
    Layout(
        "matconvnet, before 1.0-beta9",
        "MatConvNet",
        rf"{_LAYER}/(?:filters|biases)$",
        "slim",
        columns_first=True,
    ),
    Layout("onnx", "ONNX", r"(?P<layer>.*)/.*", "torch"),
    Layout("caffe", "Caffe", rf"{_CAFFE}/[01]$", "caffe", outputs_first=True),
    Layout("tfmodel", "frozen graph", rf"(?:import/)?{_LAYER}/[a-z]+$", "caffe"),
)
# As gatys, with fully connected layers: MatConvNet's networks, which take RGB.
_PYTORCH_MCN = Layout("pytorch-mcn", "PyTorch", _CAFFE_NAME, "slim")
# As torchvision, with the dilated fc6 of SSD.
_SSD = Layout("ssd", "PyTorch", ".*", torch_vgg.FEATURES_MEAN)


def of_torch(kind: str, vgg: torch_vgg.TorchVGG) -> Layout:
    """The layout of a state dict, by the name of its first convolution and by its head.

    Args:
        kind: ``Container.kind`` of its file.
        vgg: from ``torch_vgg.interpret``.
    """
    first = vgg.names[0]
    layout = next(
        one for one in LAYOUTS if one.container == kind and re.fullmatch(one.pattern, first)
    )
    if layout.name == "gatys" and vgg.head is not None:
        return _PYTORCH_MCN
    return _SSD if layout.name == "torchvision" and vgg.rounds_up else layout
