"""Native Keras models load and train on JAX and PyTorch, without TensorFlow and this package.

They run in the environments of `make backends`, or in this one if it has them.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from native_graphs import GRAPHS
from stock import Program

from transfer import Backbone, Classifier, Head, Preprocess, export, open_source, to_keras
from transfer.exports import keras_file
from transfer.images.decoding import read_image
from transfer.images.preprocess import to_channels
from transfer.layers.native import conversion

PROGRAM = Path(__file__).resolve().parents[1] / "keras_program.py"
TOLERANCE = 3e-5  # other kernels add in another order


@pytest.fixture(scope="module", params=["jax", "torch"])
def backend(request):
    """Comes before other fixtures, so that they are not made where no backend is installed."""
    python_of(request.param)
    return request.param


def python_of(backend):
    """The Python program that has a backend."""
    path = PROGRAM.parents[1] / f".venv-{backend}" / "bin" / "python"
    if not path.is_file() and find_spec(backend) is None:
        pytest.skip(f"needs {backend}: make backends")
    return path if path.is_file() else sys.executable


def run(backend, *arguments):
    command = [python_of(backend), "-P", str(PROGRAM), *map(str, arguments)]
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Native models with every operation, and a classifier; images and expected outputs."""
    folder = tmp_path_factory.mktemp("native")
    layers = {name: Program(build).layer() for name, build in GRAPHS.items()}
    for name, layer in layers.items():
        shape = (3, *layer.network.input_shape[1:])
        images = np.random.default_rng(0).standard_normal(shape)
        dtype = layer.network.input_dtype.as_numpy_dtype
        images = (np.abs(images) * 60).astype(dtype) if name == "integers" else images.astype(dtype)
        with pytest.MonkeyPatch.context() as patch:  # test_to_keras compares them
            patch.setattr(conversion, "compare", lambda *_: None)
            model = to_keras(layer)
        save(folder, name, model, images)
    classifier = new_classifier()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    keras_file.save(classifier, folder / "classifier.keras")
    np.save(folder / "classifier.images.npy", pixels)
    np.save(folder / "classifier.expected.npy", classifier(pixels))
    return folder


def new_classifier():
    head = Head(3, hidden=[4], dropout=0.5, weights_stddev=1.0, seed=1)
    backbone = Backbone("pretrained/vgg_small")
    classifier = Classifier(backbone, head, Preprocess("caffe", 64), ["a", "b", "c"])
    classifier.build_from_size()
    return classifier


def save(folder, name, model, images):
    model.save(folder / f"{name}.keras")
    np.save(folder / f"{name}.images.npy", images)
    np.save(folder / f"{name}.expected.npy", model(images))


@pytest.mark.slow
def test_files_give_the_same_outputs_on_other_backends(backend, models):
    run(backend, "predict", models)
    differences = {}
    for path in sorted(models.glob("*.expected.npy")):
        name = path.name.removesuffix(".expected.npy")
        expected, found = np.load(path), np.load(models / f"{name}.outputs.npy")
        assert found.shape == expected.shape, name
        differences[name] = np.abs(found - expected).max() / np.abs(expected).max()
    assert len(differences) == len(GRAPHS) + 1
    print(backend, max(differences.items(), key=lambda item: item[1]))
    assert {name: d for name, d in differences.items() if d > TOLERANCE} == {}


@pytest.mark.slow
def test_program_of_the_readme_runs_on_other_backends(backend, tmp_path, monkeypatch):
    classifier = new_classifier()
    export(classifier, tmp_path, formats=["keras"])
    folder = tmp_path / "keras"
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tf.io.write_file(str(folder / "photo.jpg"), tf.io.encode_png(image))  # Pillow does not mind
    (folder / "program.py").write_text(code.replace("photo.jpg", str(folder / "photo.jpg")))
    monkeypatch.chdir(folder)
    printed = run(backend, "execute", folder / "program.py")
    label, probability = printed.split()
    expected = classifier.probabilities(image[None])[0].numpy()
    assert label == classifier.labels[expected.argmax()]
    assert float(probability) == pytest.approx(expected.max(), abs=1e-4)


@pytest.fixture(scope="module")
def digits(tmp_path_factory, digits_dir):
    """The embedded model, and the embedded digits as its inputs."""
    folder = tmp_path_factory.mktemp("digits")
    to_keras("pretrained/vgg_small").save(folder / "backbone.keras")
    preprocess = Preprocess("torch", 64)
    source = open_source("digits", data_dir=str(digits_dir))
    arrays = {}
    for name, split in zip(("train", "held_out"), source.train_and_eval_splits(), strict=True):
        examples = list(split.encoded())[: 600 if name == "train" else 300]
        pixels = [to_channels(read_image(e["image"].numpy()), 3) for e in examples]
        arrays[name] = np.stack([preprocess(image) for image in pixels])
        arrays[f"{name}_labels"] = np.array([int(e["label"]) for e in examples])
    np.savez(folder / "digits.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def ours(digits):
    """The accuracy on TensorFlow."""
    return float(run("tensorflow", "train", digits).split()[-1])


@pytest.mark.slow
def test_a_head_trains_to_the_same_accuracy(backend, digits, ours):
    theirs = float(run(backend, "train", digits).split()[-1])
    print(f"tensorflow {ours:.4f}, {backend} {theirs:.4f}")
    assert ours > 0.8
    assert abs(theirs - ours) <= 0.01
