"""`to_keras` on VGG16 as others publish it. `pytest -s` shows the differences.

The networks of Keras Applications are built for 64 pixels and 10 classes, with the same layers; the
others have 224 pixels.
"""

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SHARED

from transfer import (
    Backbone,
    Card,
    Classifier,
    Preprocess,
    convert,
    load_meta_graph,
    save_meta_graph,
    to_keras,
)
from transfer.exports.meta_graph import save_classifier
from transfer.vgg import architectures

tf1 = tf.compat.v1
VGG16 = architectures.ARCHITECTURES["vgg16"]
REAL = SHARED / "weights" / "vgg16_imagenet_notop.h5"
PARAMETERS = {"fc7": 134_260_544, "prob": 138_357_544, "small": 39_929_674}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("memory_is_returned")]


def check(name, source, compared, tap=None, parameters=None):
    model = to_keras(source, tap)
    (difference,) = compared
    print(f"| {name} | {difference.outputs:.1e} | {difference.gradients:.1e} |")
    assert model.count_params() == parameters
    stock = {type(layer).__module__.split(".")[0] for layer in model.layers}
    assert stock == {"keras"}
    return model


@pytest.mark.filterwarnings("ignore")  # tf-slim is from 2020
def test_tf_slim(tmp_path, compared):
    slim_vgg = pytest.importorskip("tf_slim.nets.vgg")
    prefix = str(tmp_path / "vgg_16.ckpt")
    with tf.Graph().as_default(), tf1.Session() as session:
        images = tf1.placeholder(tf.float32, [None, 224, 224, 3])
        is_training = tf1.placeholder_with_default(False, [], name="is_training")
        slim_vgg.vgg_16(images, is_training=is_training)
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, prefix)
    model = check("VGG16 of tf-slim, fc7", prefix, compared, "fc7", PARAMETERS["fc7"])
    assert {"conv1_1", "conv5_3", "pool5", "fc6", "fc7"} <= {n.name for n in model.layers}
    assert model.get_layer("dropout6").rate == 0.5


def keras_applications_vgg16():
    return keras.applications.VGG16(weights=None, input_shape=(64, 64, 3), classes=10)


def test_keras_applications_saved_model(tmp_path, compared):
    keras_applications_vgg16().export(tmp_path / "saved", verbose=False)
    graph = load_meta_graph(tmp_path / "saved")
    check(
        "VGG16 of Keras Applications, SavedModel", graph, compared, graph.outputs[0],
        PARAMETERS["small"],
    )  # fmt: skip


def test_keras_applications_meta_graph(tmp_path, compared):
    """Written as a meta graph by way of `from_model`."""
    model = keras_applications_vgg16()
    labels = [str(number) for number in range(10)]
    classifier = Classifier.from_model(model, Preprocess("caffe", 64), labels)
    save_classifier(classifier, tmp_path / "vgg", Card())
    check(
        "VGG16 of Keras Applications, meta graph", tmp_path / "vgg", compared, "probabilities",
        PARAMETERS["small"],
    )  # fmt: skip


def test_torchvision(tmp_path, compared, monkeypatch):
    import published_files

    values = architectures.random_weights(VGG16, 1000)
    layers = [name.split("/")[0] for name in values if name.endswith("/weights")]
    full_size = {"SMALL": VGG16, "VALUES": values, "CONVOLUTIONS": layers[:-3]}
    full_size |= {"WINDOW": VGG16.pooled_size, "CHANNELS": 512}
    for name, value in full_size.items():
        monkeypatch.setattr(published_files, name, value)
    published_files.write_torch_zip(tmp_path / "vgg16.pth")
    prefix = convert(tmp_path / "vgg16.pth", tmp_path / "vgg16").prefix
    check("VGG16 in torchvision's layout, prob", prefix, compared, "prob", PARAMETERS["prob"])


def test_real_convolutions(tmp_path, compared):
    """Weights that are trained, and images in gray levels minus their mean."""
    if not REAL.is_file():
        pytest.skip("needs ../shared/weights")
    graph = load_meta_graph(convert(REAL, tmp_path / "vgg16").prefix)
    model = check("VGG16 of ImageNet, pool5", graph, compared, "pool5", 14_714_688)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3))
    prepared = Preprocess("caffe", 224).normalize(tf.constant(images))
    expected = np.asarray(Backbone(graph, "pool5")(prepared))
    largest = np.abs(np.asarray(model(prepared)) - expected).max() / np.abs(expected).max()
    assert largest < 1e-5


def test_half_precision(tmp_path, compared):
    """A graph in float16 stays in float16."""
    with tf.Graph().as_default() as graph:
        images = tf1.placeholder(tf.float16, [None, 8, 8, 3], name="images")
        weights = tf1.get_variable("w", [3, 3, 3, 4], tf.float16, use_resource=False)
        tf.nn.relu(tf.nn.conv2d(images, weights, 1, "SAME"), name="fc7")
    values = {"w": np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float16)}
    save_meta_graph(graph, tmp_path / "half", values, replace(Card(), tap="fc7:0"))
    model = check("float16", tmp_path / "half", compared, None, 108)
    assert model.output.dtype == "float16"
