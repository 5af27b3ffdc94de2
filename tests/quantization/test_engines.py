"""int8 by each engine, compared with float32."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import tensorflow as tf
import tensorflow.compat.v1 as tf1
from conftest import graph_def_of, save_vgg

from transfer import Backbone, open_source
from transfer.activations.extraction import Compiled
from transfer.graph.network import extract
from transfer.images.preprocess import Preprocess
from transfer.layers.graph_layer import GraphLayer
from transfer.quantization import agreement, engines, openvino
from transfer.quantization.agreement import DisagreementError
from transfer.quantization.calibration import CalibrationImages
from transfer.quantization.prefix import QuantizedPrefix

needs_openvino = pytest.mark.skipif(
    not openvino.is_installed(), reason="OpenVINO and NNCF are not installed"
)
each_engine = pytest.mark.parametrize(
    "engine", ["litert", pytest.param("openvino", marks=needs_openvino)]
)


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """A small VGG up to a convolutional tap."""
    return Backbone(save_vgg(tmp_path_factory.mktemp("vgg") / "tiny"), "pool2", pooling=None)


@pytest.fixture
def images():
    return np.random.default_rng(0).random([40, 16, 16, 3]).astype(np.float32)


@each_engine
def test_int8_is_close_to_float32_for_any_batch(layer, images, engine):
    expected = np.asarray(Compiled(layer)(images))
    run = engines.quantize(engine, layer, images[:8])
    outputs = run(images)
    assert outputs.dtype == np.float32
    assert outputs.shape == expected.shape
    assert 0 < np.linalg.norm(outputs - expected) < 0.1 * np.linalg.norm(expected)
    # Integer arithmetic does not depend on the batch, and results are not overwritten.
    parts = [run(images[:3]), run(images[3:])]
    np.testing.assert_array_equal(np.concatenate(parts), outputs)


def lossy_network() -> GraphLayer:
    """A network in which int8 loses what tells images apart: the channel that becomes the feature
    shares a range with one that is a hundred thousand times larger."""

    values = {
        "mix": np.array([[[[1, 1e3], [1, 1e3], [1, 0]]]], np.float32),
        "select": np.array([[[[1], [0]]]], np.float32),
    }

    def build():
        images = tf1.placeholder(tf.float32, [None, 16, 16, 3], "images")
        mix, select = (tf.constant(value, name=name) for name, value in values.items())
        mixed = tf.nn.relu(tf.nn.conv2d(images, mix, 1, "SAME"))
        tf.nn.conv2d(mixed, select, 1, "SAME", name="features")

    return GraphLayer(extract(graph_def_of(build), "features:0", "images:0"), values)


@pytest.fixture
def drawn(smooth_folder):
    train, _ = open_source(image_folder=smooth_folder).train_and_eval_splits()
    return CalibrationImages(train, Preprocess("unit", 16), seed=0)


@each_engine
def test_network_that_int8_destroys_is_refused(drawn, engine):
    layer = lossy_network()
    prefix = QuantizedPrefix(layer, Compiled(layer), engine, drawn)
    with pytest.raises(DisagreementError, match="differ from those of float32 by"):
        prefix(np.zeros([2, 16, 16, 3], np.float32))


def test_calibration_images_are_drawn_by_the_seed(image_folder):
    train, _ = open_source(image_folder=image_folder).train_and_eval_splits()
    preprocess = Preprocess("unit", 8)
    first, again, other = (CalibrationImages(train, preprocess, seed) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    for one, two in zip(first.read(), again.read(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_int8_is_not_compared_on_the_images_that_it_is_calibrated_on(caplog):
    source = open_source("digits")

    def read(count):
        split = source.split(f"train[:{count}]")
        return CalibrationImages(split, Preprocess("unit", 8), seed=0).read()

    for count, sizes in {50: (16, 16), 24: (12, 12)}.items():
        calibration, compared = ([image.tobytes() for image in images] for images in read(count))
        assert (len(calibration), len(compared)) == sizes
        assert not {*calibration} & {*compared}
    assert not caplog.records
    assert [len(images) for images in read(3)] == [3, 3]
    assert "int8 is compared with float32 on the 3 images that it is calibrated" in caplog.text


def test_network_is_quantized_once_at_the_first_call(layer, drawn, caplog, monkeypatch):
    monkeypatch.setattr(agreement, "MAX_ERROR", 2.0)  # random weights
    caplog.set_level(logging.INFO, "transfer")
    prefix = QuantizedPrefix(layer, Compiled(layer), "litert", drawn)
    key = prefix.key()
    assert key["precision"] == "int8"
    assert not caplog.records
    images = np.random.default_rng(0).random([4, 16, 16, 3]).astype(np.float32)
    threads = [threading.Thread(target=prefix, args=[images]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("calibrating" in message for message in caplog.messages) == 1
