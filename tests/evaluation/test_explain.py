"""Grad-CAM compared with the implementation in the Keras documentation."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph
from transfer.evaluation.explain import Explainer, grad_cam, overlay
from transfer.graph.cuts import last_feature_maps
from transfer.images.preprocess import Region
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
    photo = np.full((16, 16, 3), 100, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    found = np.asarray(overlay(photo, heat, Region(0, 0, 16, 16))).astype(int)
    assert found.shape == (16, 16, 3)
    assert found[0, 0, 0] - found[0, 0, 2] > 50
    np.testing.assert_array_equal(found[12, 12], [100, 100, 100])
    gray = overlay(photo[..., :1], heat, Region(0, 0, 16, 16))
    np.testing.assert_array_equal(np.asarray(gray), found)


def test_unseen_part_of_photo_is_darker():
    photo = np.full((10, 30, 3), 100, np.uint8)
    found = np.asarray(overlay(photo, np.zeros((2, 2)), Region(0, 10, 10, 10)))
    assert {*found[:, 10:20].ravel()} == {100}
    assert {*found[:, :10].ravel(), *found[:, 20:].ravel()} == {40}


@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (47, 211), (9, 700), (1, 1)])
def test_seen_region_inverts_resizing(height, width, size):
    """A bright patch in a corner of what the network sees lies in that corner of the photo."""
    preprocess = Preprocess("unit", size)
    top, left, seen_height, seen_width = preprocess.seen_region(height, width)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    # Coordinates of the photo, as the network sees them; linear, so that resizing keeps them.
    seen = preprocess.resize(np.stack([rows, columns, rows], -1)).numpy()
    middle = np.arange(2, 5)  # not at the border, where resizing has fewer pixels
    expected_rows = top + (middle + 0.5) * seen_height / preprocess.height - 0.5
    expected_columns = left + (middle + 0.5) * seen_width / preprocess.width - 0.5
    np.testing.assert_allclose(seen[2:5, 5, 0], expected_rows.clip(0, height - 1), atol=0.6)
    np.testing.assert_allclose(seen[5, 2:5, 1], expected_columns.clip(0, width - 1), atol=0.6)
    assert top >= 0 and top + seen_height <= height + 1e-6 + (seen_height < 1)
    assert left >= 0 and left + seen_width <= width + 1e-6


def test_explained_photo_has_its_own_size_and_its_marked_corner(classifier, tmp_path, monkeypatch):
    """The network sees the middle of a wide photo: its top left corner is at a third of it."""

    def top_left(images, classes):
        heat = np.zeros((len(images), 8, 8), np.float32)
        heat[:, 0, 0] = 1
        return heat

    monkeypatch.setattr("transfer.evaluation.explain.grad_cam", lambda _: top_left)
    photo = np.full((160, 480, 3), 90, np.uint8)
    photo[:20, 160:180] = 200  # the marked corner, with the heat of one position
    path = tmp_path / f"{'é' * 125}.png"  # with the number of the image, too long for a file name
    Image.fromarray(photo).save(path)
    explain = Explainer(classifier, tmp_path / "out")
    explain([path], classifier.preprocess.resize(photo)[None], np.zeros(1, int))
    with Image.open(tmp_path / "out" / f"000001-{'é' * 100}.jpg") as image:
        found = np.asarray(image).astype(int)
    assert found.shape == (160, 480, 3)
    red = found[..., 0] - found[..., 2] > 60
    rows, columns = np.nonzero(red)
    assert (rows.min(), columns.min()) == (0, pytest.approx(160, abs=2))
    assert rows.max() < 30 and columns.max() < 190
    assert red[4:14, 164:174].all()
    assert not red[:, :155].any()
