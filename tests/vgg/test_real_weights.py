"""The convolutions of VGG16 trained on ImageNet, saved by other software in each container, give
the features of Keras' own model."""

import importlib.util
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from recipes.cli import main
from transfer import Backbone, Preprocess, load_meta_graph

tf1 = tf.compat.v1
RNG = np.random.default_rng(0)
# Of two octaves, so that all layers see structure of their scale.
IMAGE = np.asarray(
    keras.ops.image.resize(RNG.uniform(0, 255, (1, 7, 7, 3)), (224, 224)) * 0.7
    + keras.ops.image.resize(RNG.uniform(0, 255, (1, 56, 56, 3)), (224, 224)) * 0.3
).astype(np.uint8)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("memory_is_returned")]

# In a process of its own: TensorFlow and PyTorch's exporter do not share one.
TORCH = """
import pathlib, sys
import numpy as np, torch
folder = pathlib.Path(sys.argv[1])
arrays = np.load(folder / "weights.npz")
layers, names = [], [name for name in arrays if name.endswith("weights")]
for name in names:
    kernel = torch.from_numpy(arrays[name].transpose(3, 2, 0, 1).copy())
    layer = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
    layer.weight.data = kernel
    layer.bias.data = torch.from_numpy(arrays[name.replace("weights", "biases")])
    layers += [layer, torch.nn.ReLU()]
    if name[:7] in ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"):
        layers.append(torch.nn.MaxPool2d(2))
network = torch.nn.Module()
network.features = torch.nn.Sequential(*layers)
for name, is_zip in (("zip.pth", True), ("legacy.pth", False)):
    torch.save(network.state_dict(), folder / name, _use_new_zipfile_serialization=is_zip)
image = torch.from_numpy(np.load(folder / "image.npy")).permute(0, 3, 1, 2).contiguous()
with torch.no_grad():
    np.save(folder / "torch.npy", network.features(image).permute(0, 2, 3, 1).numpy())
for is_dynamo in (False, True) if "onnx" in sys.argv else ():
    path = folder / ("dynamo.onnx" if is_dynamo else "script.onnx")
    torch.onnx.export(network.features, (image,), path, dynamo=is_dynamo, external_data=False)
"""


@pytest.fixture(scope="module")
def values(shared_vgg16):
    """Kernels and biases by ``architectures``' names, for images in BGR."""
    found = {}
    with h5py.File(shared_vgg16) as file:
        for name, group in file.items():
            layer = f"conv{name[5]}_{name[-1]}"
            for array in map(np.asarray, group.values()):
                found[f"{layer}/{'weights' if array.ndim == 4 else 'biases'}"] = array
    return {name: found[name] for layer in sorted({n[:7] for n in found})
            for name in (f"{layer}/weights", f"{layer}/biases")}  # fmt: skip


@pytest.fixture(scope="module")
def model(values):
    found = keras.applications.VGG16(include_top=False, weights=None, input_shape=(224, 224, 3))
    found.set_weights(list(values.values()))
    return found


@pytest.fixture(scope="module")
def expected(model):
    return np.asarray(model(keras.applications.vgg16.preprocess_input(IMAGE.astype(np.float32))))


@pytest.fixture(scope="module")
def by_torch(values, tmp_path_factory):
    """A folder with the files that PyTorch writes, and its features."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch: pip install 'vgg-transfer[references]'")
    folder = tmp_path_factory.mktemp("torch")
    np.savez(folder / "weights.npz", **values)
    image = keras.applications.vgg16.preprocess_input(IMAGE.astype(np.float32))
    np.save(folder / "image.npy", image)
    has_onnx = importlib.util.find_spec("onnxscript") is not None
    command = [sys.executable, "-c", TORCH, str(folder), *["onnx"] * has_onnx]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def features(path, out):
    """pool5 of the image, by the card of the converted file."""
    assert main(["convert", str(path), "--out", str(out)]) == 0
    graph = load_meta_graph(out)
    backbone = Backbone(graph, "pool5", pooling=None)
    return np.asarray(backbone(Preprocess(graph.card.preprocess, 224)(IMAGE)))


def test_file_of_keras_applications_gives_features_of_keras(tmp_path, shared_vgg16, expected):
    np.testing.assert_array_equal(features(shared_vgg16, tmp_path / "vgg"), expected)
    assert expected.max() > 10


@pytest.mark.parametrize("name", ["a.keras", "a.h5", "a.weights.h5"])
def test_files_of_keras_give_features_of_keras(tmp_path, model, expected, name):
    path = tmp_path / name
    (model.save_weights if "weights" in name else model.save)(path)
    np.testing.assert_array_equal(features(path, tmp_path / "vgg"), expected)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "script.onnx", "dynamo.onnx"])
def test_files_of_torch_give_features_of_keras(tmp_path, by_torch, expected, name):
    path = by_torch / name
    if not path.exists():
        pytest.skip("needs PyTorch's exporter: pip install onnxscript")
    np.testing.assert_array_equal(features(path, tmp_path / "vgg"), expected)
    scale = expected.max()
    np.testing.assert_allclose(np.load(by_torch / "torch.npy"), expected, atol=1e-5 * scale)


def test_slim_checkpoint_gives_features_of_keras(tmp_path, values, expected):
    """Written for RGB, whose mean in tf-slim has two digits."""
    with tf.Graph().as_default(), tf1.Session() as session:
        variables = []
        for name, value in values.items():
            layer, part = name.split("/")
            value = value[:, :, ::-1] if name == "conv1_1/weights" else value
            variable = f"vgg_16/{layer[:5]}/{layer}/{part}"
            variables.append(tf1.Variable(value, name=variable, use_resource=False))
        session.run(tf1.variables_initializer(variables))
        saver = tf1.train.Saver(variables, write_version=1)
        saver.save(session, str(tmp_path / "vgg_16.ckpt"), write_meta_graph=False)
    found = features(tmp_path / "vgg_16.ckpt", tmp_path / "vgg")
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected.max())
