"""Files of other kinds are named by what they are."""

import struct

import pytest

from transfer.vgg.published import containers


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1c\0\0\0TFL3" + bytes(200), "TFLite model.*convert the Keras file"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + bytes(600), "save it as version 5"),
        (b'{"format": "layers-model", "modelTopology": {}}', "tensorflowjs_converter"),
        (struct.pack("<4i", 4, 1, 3, 0)[:12] + b"V 1" + bytes(99), "Torch7"),
        (struct.pack("<3iq", 0, 2, 0, 32013312) + bytes(400), "Darknet"),
        # specificationVersion 4, description of 2 bytes, neuralNetwork (500) of 3 bytes
        (b"\x08\x04\x12\x02\x0a\x00\xa2\x1f\x03abc", "CoreML.*file from which it was made"),
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Virus scan warning", "web page, such as .* confirm a download"),
        (b"\x1f\x8b\x08" + bytes(300), "compressed with gzip; unpack it first"),
    ],
    ids=[
        "tflite",
        "matlab 7.3",
        "tf.js",
        "t7",
        "darknet",
        "coreml",
        "empty",
        "lfs",
        "html",
        "gzip",
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, data, message):
    (tmp_path / "weights").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        containers.read(tmp_path / "weights")


def test_files_in_a_folder_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a folder; .* such as its model\.safetensors"):
        containers.read(tmp_path)
