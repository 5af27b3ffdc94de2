"""Files of other kinds are named by what they are."""

import struct
import zipfile

import h5py
import numpy as np
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
        (b"7z\xbc\xaf\x27\x1c" + bytes(300), "compressed with 7-Zip; unpack it first"),
        (b"vgg_16.ckpt".ljust(257, b"\0") + b"ustar" + bytes(300), "tar archive; unpack it first"),
        (bytes(16) + b"\x0a\0\0\0\x08\x05\x10\x40\x10\x03" + bytes(300), "program of Paddle"),
        (b"4\n1\n3\nV 1\n13\nnn.Sequential\n", "Torch7"),
        (b"/annex/objects/MD5E-s553467096--6437.h5\n", "git annex get"),
        (b"\xef\xbb\xbf\r\n<html lang='en'>" + bytes(99), "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b'<?xml version="1.0"?>\n<net name="vgg" version="11">', "OpenVINO"),
        (b'name: "VGG"\ninput: "data"\nlayer {\n  name: "conv1_1"\n}\n', "convert its .caffemodel"),
        (b"7767517\n24 24\n", "a text file, which has no weights; it begins with '7767517'"),
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
        "7-zip",
        "tar",
        "pdiparams",
        "t7 in text",
        "annex",
        "html with a byte order mark",
        "error in xml",
        "openvino",
        "prototxt",
        "text",
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


def test_shards_of_tensorflow_js_are_named_by_their_names(tmp_path):
    (tmp_path / "group1-shard1of24.bin").write_bytes(b"l\xbf\x00>" * 99)
    with pytest.raises(ValueError, match=r"shard of TensorFlow\.js, .* tensorflowjs_converter"):
        containers.read(tmp_path / "group1-shard1of24.bin")


@pytest.mark.parametrize(("name", "message"), [
    ("vgg16.pth", r"a zip archive; unpack it first, and convert its vgg16\.pth"),
    ("notes.txt", r"a zip archive of notes\.txt, no weights"),
])  # fmt: skip
def test_zip_archives_are_unpacked_by_the_user(tmp_path, name, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"weights")
    with pytest.raises(ValueError, match=message):
        containers.read(tmp_path / "a.zip")


def test_files_that_were_cut_short_are_fetched_again(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(99))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = np.ones(9999)
    for name, message in (
        ("a.npz", "cut short, or is damaged: the directory at the end .* get it again"),
        ("a.h5", r"cut short after \d\d,\d+ of \d\d,\d+ bytes; get it again"),
    ):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=message):
            containers.read(tmp_path / name)
