"""Fine-tuned Keras models become classifiers with Keras' probabilities."""

import keras
import numpy as np
import pytest
from published_files import SMALL

from transfer import Classifier, convert

GENERATOR = np.random.default_rng(0)
L = keras.layers


def base(size):
    net = inputs = keras.Input((size, size, 3))
    for number, block in enumerate(SMALL.blocks, 1):
        for index, width in enumerate(block, 1):
            name = f"block{number}_conv{index}"
            net = L.Conv2D(width, 3, padding="same", activation="relu", name=name)(net)
        net = L.MaxPooling2D()(net)
    return keras.Model(inputs, net, name="vgg16")


def model_of(head, size=64, before=()):
    net = inputs = keras.Input((size, size, 3))
    for layer in (*before, base(size), *head):
        net = layer(net)
    model = keras.Model(inputs, net)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            shape = layer.gamma.shape
            gamma, variance = GENERATOR.uniform(0.5, 2, (2, *shape))
            layer.set_weights([gamma, *GENERATOR.normal(size=(2, *shape)), variance])
    return model


def assert_same(model, path, size=64, **options):
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    options.setdefault("preprocess", "none")
    conversion = convert(path, path.with_name("model"), **options)
    pixels = GENERATOR.uniform(0, 255, (2, size, size, 3)).astype("f4")
    expected = np.asarray(model(pixels, training=False))
    if expected.shape[1] == 1:
        expected = np.concatenate([1 - expected, expected], 1)
    found = np.asarray(Classifier.load(conversion.prefix).probabilities(pixels))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return conversion


HEADS = {
    "average, two hidden of one width": lambda: [
        L.GlobalAveragePooling2D(), L.Dense(16, "relu"), L.Dense(16, "relu"), L.Dense(3, "softmax"),
    ],
    "max, batch norm after ReLU": lambda: [
        L.GlobalMaxPooling2D(), L.Dense(16, "relu", name="fc1"), L.BatchNormalization(),
        L.Dropout(0.5), L.Dense(3, "softmax", name="predictions"),
    ],
    "flatten, batch norm before it": lambda: [
        L.BatchNormalization(), L.Flatten(), L.Dense(8), L.BatchNormalization(epsilon=0.1),
        L.Activation("tanh"), L.Dense(4, "relu"), L.Dense(3), L.Softmax(),
    ],
    "sigmoid": lambda: [L.GlobalAveragePooling2D(), L.Dense(1, "sigmoid")],
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("suffix", [".keras", pytest.param(".h5", marks=pytest.mark.slow_variants)])
def test_head_gives_probabilities_of_keras(tmp_path, head, suffix):
    found = assert_same(model_of(head()), tmp_path / f"m{suffix}")
    assert (found.left_out, found.card.labels) == ([], "model.labels.txt")


def test_odd_feature_maps_are_rounded_down_as_in_keras(tmp_path):
    head = [L.Flatten(), L.Dense(3, "softmax")]
    found = assert_same(model_of(head, size=75), tmp_path / "m.keras", size=75)
    assert (found.card.image_size, found.card.tap) == (75, "pool5:0")


def test_weight_file_says_the_pooling_by_its_layers(tmp_path):
    head = [L.GlobalMaxPooling2D(), L.Dense(8, "relu"), L.Dense(3, "softmax")]
    found = assert_same(model_of(head), tmp_path / "m.weights.h5")
    assert found.notes == ["a ReLU after each layer of its head but the last is assumed"]


def test_labels_and_no_top(tmp_path):
    model = model_of([L.GlobalAveragePooling2D(), L.Dense(2, "softmax", name="pets")])
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    found = assert_same(model, tmp_path / "m.keras", labels=tmp_path / "names.txt")
    assert Classifier.load(found.prefix).labels == ["cat", "dog"]
    base_only = convert(tmp_path / "m.keras", tmp_path / "base", top=False)
    assert (base_only.num_classes, base_only.card.tap) == (None, "pool5:0")
    assert base_only.left_out == ["pets"]


def test_multi_label_head_is_left_out_with_the_reason(tmp_path):
    model_of([L.Flatten(), L.Dense(3, "sigmoid", name="tags")]).save(tmp_path / "m.keras")
    found = convert(tmp_path / "m.keras", tmp_path / "model")
    assert (found.num_classes, found.left_out) == (None, ["tags"])
    assert "tags has 3 outputs with activation sigmoid" in found.notes[0]
