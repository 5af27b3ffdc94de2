"""Name files that are not converted by what they are, with the way to one that is."""

from __future__ import annotations

import re

from transfer.vgg.published import wire

_TORCH7 = b"\x04\x00\x00\x00\x01\x00\x00\x00\x03\x00\x00\x00V 1"
"""Of a Torch7 file in binary: an object (4) with index 1, and the version "V 1" of its class.
Source: github.com/torch/torch7, File.lua."""
_FIRST_COREML_TYPE = 200
"""In CoreML's Model, the kinds of models have field numbers from here. Source:
github.com/apple/coremltools, mlmodel/format/Model.proto."""


def kind_of(head: bytes, size: int) -> str | None:
    """What a file is and what to do instead; ``None`` if it is unknown.

    Args:
        head: at least the first 128 bytes, if the file has as many.
        size: of the file in bytes.
    """
    if not size:
        return "it is empty; get it again"
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "it is a pointer of Git LFS, not the file that it stands for; get that: git lfs pull"
    if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
        return (
            "it is a web page, such as an error or a request to confirm a download; get the file "
            "itself"
        )
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip; unpack it first: tar xzf FILE, or gunzip FILE"
    if head[4:8] == b"TFL3":  # source: tensorflow/lite/schema/schema.fbs, file_identifier
        return (
            "it is a TFLite model, whose weights are often quantized and renamed; convert the "
            "Keras file or SavedModel from which it was made"
        )
    if head.startswith(b"MATLAB 7.3 MAT-file"):
        return (
            "it is a MATLAB 7.3 file (HDF5); save it as version 5 in MATLAB: "
            "x = load('FILE.mat'); save('weights.mat', '-struct', 'x', '-v7'), "
            "or download MatConvNet's original file"
        )
    if head.lstrip()[:1] == b"{" and re.search(rb'"(format|modelTopology|weightsManifest)"', head):
        return (
            "it is the model.json of TensorFlow.js, whose weights are in shards beside it; convert "
            "it back first: tensorflowjs_converter --input_format=tfjs_layers_model "
            "--output_format=keras model.json model.h5"
        )
    if head.startswith(_TORCH7):
        return (
            "it is a Torch7 file (.t7); convert its source, a .caffemodel or a file of PyTorch, or "
            "save its weights with NumPy: np.savez with names conv1_1_W, conv1_1_b, ..., fc8_b"
        )
    # major, minor and revision as int32, then the images seen: int64, before version 0.2 int32.
    # Source: github.com/pjreddie/darknet, src/parser.c: load_weights_upto.
    if size > 20 and re.match(rb"\0\0\0\0[\x01\x02]\0\0\0[\0-\x09]\0\0\0", head):
        return (
            "it looks like weights of Darknet (.weights), which do not say what their layers are; "
            "save them with NumPy: np.savez with names conv1_1_W, conv1_1_b, ..., fc8_b"
        )
    return None


def kind_of_message(data: memoryview) -> str | None:
    """What a protocol buffer is and what to do instead; ``None`` if it is unknown."""
    try:
        found = dict(wire.fields(data))
    except ValueError:
        return None
    is_versioned = isinstance(found.get(1), int) and isinstance(found.get(2), memoryview)
    if is_versioned and any(number >= _FIRST_COREML_TYPE for number in found):
        return (
            "it is a CoreML model, whose weights are often quantized and renamed; convert the "
            "file from which it was made"
        )
    return None
