"""Name files that are not converted by what they are, with the way to one that is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transfer.vgg.published import wire

_TORCH7 = (b"\x04\x00\x00\x00\x01\x00\x00\x00\x03\x00\x00\x00V 1", b"4\n1\n3\nV 1\n")
"""Of a Torch7 file, in binary and in text: an object (4) with index 1, and the version "V 1" of its
class. Source: github.com/torch/torch7, File.lua."""
_PADDLE = re.compile(rb"\0{16}.\0\0\0\x08[\x04-\x06]", re.DOTALL)
"""Of Paddle's .pdiparams: versions of the file and of a tensor, without levels of detail, and the
size and beginning of its description, which is the type. Source: github.com/PaddlePaddle/Paddle,
paddle/phi/core/framework/dense_tensor_serialize.cc."""
_ARCHIVES = {
    b"\x1f\x8b": "with gzip; unpack it first: tar xzf FILE, or gunzip FILE",
    b"BZh": "with bzip2; unpack it first: tar xjf FILE, or bunzip2 FILE",
    b"\xfd7zXZ\0": "with xz; unpack it first: tar xJf FILE, or unxz FILE",
    b"7z\xbc\xaf\x27\x1c": "with 7-Zip; unpack it first: 7z x FILE",
    b"Rar!\x1a\x07": "with RAR; unpack it first: unrar x FILE",
}
_UNPACKABLE = re.compile(
    r"\.(h5|hdf5|keras|onnx|np[yz]|pth|pt|ckpt|index|bin|safetensors|mat|caffemodel|params|"
    r"pdparams|pkl|pb|meta)$"
)
_FIRST_COREML_TYPE = 200
"""In CoreML's Model, the kinds of models have field numbers from here. Source:
github.com/apple/coremltools, mlmodel/format/Model.proto."""


def kind_of(head: bytes, size: int, name: str = "") -> str | None:
    """What a file is and what to do instead; ``None`` if it is unknown.

    Args:
        head: at least the first 512 bytes, if the file has as many.
        size: of the file in bytes.
        name: of the file, for those that nothing else tells apart.
    """
    if not size:
        return "it is empty; get it again"
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "it is a pointer of Git LFS, not the file that it stands for; get that: git lfs pull"
    if re.match(rb"(\.\./)*(\.git|/)?/?annex/objects/", head):
        return "it is a pointer of git-annex, not the file that it stands for: git annex get FILE"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype html|html|\?xml[^>]*>\s*<(html|!doctype html|error))", text, re.I):
        return (
            "it is a web page, such as an error or a request to confirm a download; get the file "
            "itself"
        )
    for magic, how in _ARCHIVES.items():
        if head.startswith(magic):
            return f"it is compressed {how}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first: tar xf FILE"
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
    if text[:1] == b"{" and re.search(rb'"(format|modelTopology|weightsManifest)"', text):
        return (
            "it is the model.json of TensorFlow.js, whose weights are in shards beside it; convert "
            "it back first: tensorflowjs_converter --input_format=tfjs_layers_model "
            "--output_format=keras model.json model.h5"
        )
    if re.fullmatch(r"group\d+-shard\d+of\d+(\.bin)?", name):
        return (
            "its name is that of a shard of TensorFlow.js, whose arrays are described in the "
            "model.json beside it; convert that back first: tensorflowjs_converter "
            "--input_format=tfjs_layers_model --output_format=keras model.json model.h5"
        )
    if _PADDLE.match(head):
        return (
            "it looks like the weights of a program of Paddle (.pdiparams), which have no names; "
            "save those of its network: paddle.save(net.state_dict(), 'weights.pdparams')"
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


def kind_of_text(head: bytes) -> str | None:
    """What a file is that begins with readable text, and what to do instead; ``None`` if it does
    not."""
    text = head.strip()
    if not text or re.search(rb"[^\t-\r -~]", text):
        return None
    if re.search(rb"^\s*(layers?|input_param|input_dim|input_shape)\s*[{:]", text, re.MULTILINE):
        return (
            "it is the definition of a Caffe network (.prototxt), which has no weights; convert "
            "its .caffemodel"
        )
    if re.match(rb"<\?xml[^>]*>\s*<net\b", text):
        return (
            "it is a model of OpenVINO, whose weights are in the .bin beside it; convert the file "
            "from which it was made"
        )
    shown = text.splitlines()[0][:40].decode("ascii")
    return f"it is a text file, which has no weights; it begins with {shown!r}"


def kind_of_archive(names: Sequence[str]) -> str:
    """What a zip archive without arrays is and what to do instead."""
    inside = [name for name in names if _UNPACKABLE.search(name)]
    if inside:
        return f"it is a zip archive; unpack it first, and convert its {inside[0]}"
    return f"it is a zip archive of {', '.join(names[:5]) or 'nothing'}, no weights"


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
