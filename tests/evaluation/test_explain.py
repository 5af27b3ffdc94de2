"""Grad-CAM compared with the implementation in the Keras documentation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph
from transfer.evaluation.explain import grad_cam, overlay
from transfer.graph.cuts import last_feature_maps
from transfer.vgg import architectures


@pytest.fixture
def classifier(model):
    found = Classifier(
        Backbone(load_meta_graph(model)), Head(3, seed=0), Preprocess("unit", 16), list("abc")
    )
    found.build_from_size()
    return found


def keras_model(classifier):
    """Reference model of the same network: images to the last feature maps and logits."""
    values = {name: np.asarray(value) for name, value in classifier.backbone.values().items()}
    net = images = keras.Input((16, 16, 3))
    for name in ("conv1_1", "pool", "conv2_1", "conv2_2", "pool"):
        if name == "pool":
            net = keras.layers.MaxPooling2D()(net)
            continue
        kernel, biases = values[f"{name}/weights"], values[f"{name}/biases"]
        layer = keras.layers.Conv2D(kernel.shape[-1], 3, padding="same", activation="relu")
        net = maps = layer(net)
        layer.set_weights([kernel, biases])
    net = keras.layers.Flatten()(net)
    for name in ("fc6", "fc7"):
        layer = keras.layers.Dense(32, activation="relu")
        net = layer(net)
        layer.set_weights([values[f"{name}/weights"], values[f"{name}/biases"]])
    layer = keras.layers.Dense(3)
    logits = layer(net)
    layer.set_weights([np.asarray(v) for v in classifier.head.values().values()])
    return keras.Model(images, [maps, logits])


def test_grad_cam_equals_keras(classifier, images):
    classes = np.array([0, 1, 2, 0, 1])
    reference = keras_model(classifier)
    with tf.GradientTape() as tape:
        maps, logits = reference(images)
        chosen = tf.gather(logits, classes, batch_dims=1)
    np.testing.assert_allclose(logits, classifier.head(classifier.backbone(images)), atol=1e-5)
    weights = tf.reduce_mean(tape.gradient(chosen, maps), axis=(1, 2))
    expected = np.maximum(np.einsum("bhwc,bc->bhw", maps, weights), 0)
    expected /= np.maximum(expected.max((1, 2), keepdims=True), 1e-12)
    found = grad_cam(classifier)(images, classes)
    assert found.shape == (5, 8, 8)
    assert found.max() == 1.0
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_grad_cam_checks_image_shape(classifier, images):
    explain = grad_cam(classifier)
    whole = explain(images, np.zeros(5, np.int32))
    np.testing.assert_allclose(explain(images[:2], np.zeros(2)), whole[:2], atol=1e-5)
    with pytest.raises(ValueError, match=r"\(16, 16, 3\); expected \(None, 16, 16, 3\)"):
        explain(images[0], np.zeros(1))


def test_the_last_feature_maps_of_vgg16():
    from transfer.graph import extract

    graph = architectures.build_graph(architectures.ARCHITECTURES["vgg16"], 5)
    network = extract(graph.as_graph_def(), "fc7:0", "images:0")
    assert last_feature_maps(network, 224).startswith("conv5_3")


def test_network_without_feature_maps_is_refused(classifier, monkeypatch):
    monkeypatch.setattr("transfer.evaluation.explain.last_feature_maps", lambda *_: None)
    with pytest.raises(ValueError, match="no feature maps with a height and a width"):
        grad_cam(classifier)


def test_overlay_is_red_in_hot_regions():
    pixels = np.full((16, 16, 3), 100.0, np.float32)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    found = overlay(pixels, heat).astype(int)
    assert found.shape == (16, 16, 3)
    assert found[0, 0, 0] - found[0, 0, 2] > 50
    np.testing.assert_array_equal(found[12, 12], [100, 100, 100])
    assert overlay(pixels[..., :1], heat).shape == (16, 16, 3)  # gray
