import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import VARIANTS, save_vgg

from transfer import Backbone, Card, Classifier, Head, Preprocess, load_meta_graph, save_meta_graph
from transfer.exports.meta_graph import check_savable, save_classifier

PHOTOS = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3)).astype(np.uint8)


def new_classifier(prefix, **head):
    backbone = Backbone(load_meta_graph(prefix), name="backbone")
    classifier = Classifier(
        backbone, Head(3, seed=0, **head), Preprocess("caffe", 16), ["a", "b", "c"]
    )
    classifier.build_from_size()
    return classifier


def test_probabilities_accept_images_of_any_size(model):
    probabilities = new_classifier(model).probabilities(PHOTOS)
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities.numpy().sum(-1), 1, rtol=1e-5)


def test_classifier_composes_preprocess_backbone_and_head(model):
    classifier = new_classifier(model)
    expected = classifier.head(classifier.backbone(Preprocess("caffe", 16)(PHOTOS)))
    np.testing.assert_array_equal(classifier(PHOTOS), expected)


@pytest.mark.slow_variants
@pytest.mark.parametrize("at", [None, "images", "conv1_1", "pool2", "fc7"])
def test_split_parts_compose_to_classifier(model, at):
    classifier = new_classifier(model)
    frozen, trained = classifier.split(at)
    images = classifier.preprocess(PHOTOS)
    np.testing.assert_allclose(
        trained(images if frozen is None else frozen(images)), classifier(PHOTOS), rtol=1e-5
    )
    assert (frozen is None) == (at is None)


@pytest.mark.slow_variants
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hidden", [(), (8, 4)], ids=["softmax", "hidden"])
def test_saved_classifier_runs_in_plain_tensorflow_session(
    tmp_path, stock_session, variant, hidden
):
    classifier = new_classifier(save_vgg(tmp_path / "vgg", **VARIANTS[variant]), hidden=hidden)
    expected = classifier(PHOTOS).numpy()
    save_classifier(classifier, tmp_path / "run" / "model", Card(source="a test"))

    stock = stock_session(tmp_path / "run" / "model")
    images = classifier.preprocess(PHOTOS).numpy()
    logits, probabilities = stock.run(
        ["head/logits:0", "head/probabilities:0"], {"images:0": images}
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probabilities, tf.nn.softmax(expected), rtol=1e-4, atol=1e-5)
    assert {v.op.type for v in _variables(stock)} == {"VariableV2"}

    loaded = Classifier.load(tmp_path / "run")
    np.testing.assert_allclose(loaded(PHOTOS), expected, rtol=1e-4, atol=1e-5)
    assert loaded.labels == ["a", "b", "c"]
    assert loaded.preprocess.settings() == classifier.preprocess.settings()


def _variables(stock):
    with stock.graph.as_default():
        return tf.compat.v1.global_variables()


def test_fine_tuned_model_can_be_used_as_pretrained_model(tmp_path, model):
    save_classifier(new_classifier(model), tmp_path / "first" / "model", Card())
    graph = load_meta_graph(tmp_path / "first")
    assert graph.card.tap == "fc7:0"
    second = new_classifier(graph.prefix)
    save_classifier(second, tmp_path / "second" / "model", Card())
    np.testing.assert_allclose(
        Classifier.load(tmp_path / "second")(PHOTOS), second(PHOTOS), rtol=1e-5, atol=1e-6
    )


def test_classifier_can_be_saved_as_keras_model(tmp_path, model):
    classifier = new_classifier(model, hidden=(4,))
    classifier.save(tmp_path / "c.keras")
    loaded = keras.models.load_model(tmp_path / "c.keras")
    np.testing.assert_array_equal(loaded(PHOTOS), classifier(PHOTOS))
    assert loaded.labels == classifier.labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [("../labels.txt", "expected a file beside the card"), ("two.txt", "3 logits but 2 labels")],
)
def test_load_checks_the_labels(tmp_path, model, labels, message):
    save_classifier(new_classifier(model), tmp_path / "m", Card())
    (tmp_path / "two.txt").write_text("a\nb\n")
    card = (tmp_path / "m.json").read_text().replace("labels.txt", labels)
    (tmp_path / "m.json").write_text(card)
    with pytest.raises(ValueError, match=message):
        Classifier.load(tmp_path / "m")


def test_load_rejects_other_models(model):
    with pytest.raises(ValueError, match="is not a fine-tuned model: its card must name"):
        Classifier.load(model)


def test_single_image_without_batch_axis_is_rejected(model):
    classifier = new_classifier(model)
    classifier(PHOTOS)
    for use in (classifier, classifier.probabilities):
        with pytest.raises(ValueError, match=r"\(20, 30, 3\); expected .*classifier\(images\[None"):
            use(PHOTOS[0])
    np.testing.assert_allclose(classifier(PHOTOS[0][None]), classifier(PHOTOS)[:1], atol=1e-5)


def test_pixels_are_not_rounded_under_a_mixed_precision_policy(model):
    photos = PHOTOS + np.float32(0.03)
    expected = new_classifier(model)(photos)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        np.testing.assert_array_equal(new_classifier(model)(photos), expected)
    finally:
        keras.config.set_dtype_policy("float32")


def test_max_pooled_backbone_can_be_saved(model, tmp_path):
    backbone = Backbone(load_meta_graph(model), "pool2", pooling="max")
    classifier = Classifier(backbone, Head(3, seed=0), Preprocess("caffe", 16), ["a", "b", "c"])
    classifier.build_from_size()
    save_classifier(classifier, tmp_path / "m", Card())
    loaded = Classifier.load(tmp_path / "m")
    np.testing.assert_allclose(loaded(PHOTOS), classifier(PHOTOS), rtol=1e-5, atol=1e-6)
    images = classifier.preprocess(PHOTOS)
    np.testing.assert_allclose(Backbone(tmp_path / "m")(images), backbone(images), rtol=1e-5)


def dynamic_flatten(prefix):
    """As built by ``tf.layers.flatten`` of TensorFlow 1: the width is computed at run time."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 16, 16, 3], name="images")
        net = tf.nn.conv2d(x, tf.compat.v1.get_variable("kernel", [3, 3, 3, 4]), 2, "VALID")
        net = tf.reshape(tf.nn.relu(net), tf.stack([tf.shape(net)[0], -1]), name="flatten")
        net = tf.matmul(tf.ensure_shape(net, [None, 196]), tf.ones([196, 2]))
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 4)) / 5
    save_meta_graph(graph, prefix, {"kernel": kernel}, Card(tap="flatten:0"))
    return prefix


def test_tap_at_dynamic_flatten_can_be_saved(tmp_path, stock_session):
    classifier = new_classifier(dynamic_flatten(tmp_path / "m"))
    check_savable(classifier)
    save_classifier(classifier, tmp_path / "run" / "model", Card())
    images = classifier.preprocess(PHOTOS).numpy()
    logits = stock_session(tmp_path / "run" / "model").run("head/logits:0", {"images:0": images})
    np.testing.assert_allclose(logits, classifier(PHOTOS), rtol=1e-4, atol=1e-5)
    loaded = Classifier.load(tmp_path / "run")
    np.testing.assert_allclose(loaded(PHOTOS), classifier(PHOTOS), rtol=1e-4, atol=1e-5)


def test_save_rejects_unsupported_heads(model, tmp_path):
    backbone = Backbone(load_meta_graph(model))
    classifier = Classifier(backbone, keras.layers.Dense(2), Preprocess("tf", 16), ["a", "b"])
    with pytest.raises(TypeError, match="got a Backbone with a Dense"):
        save_classifier(classifier, tmp_path / "m", Card())


def test_pixels_of_another_range_are_refused_or_warned_of(model, caplog):
    classifier = new_classifier(model)
    images = np.full((1, 16, 16, 3), 200, np.uint8)
    classifier.probabilities(images)
    assert not caplog.text
    classifier.probabilities(images / np.float32(255))
    assert "pixels are at most 0.784; expected 0 to 255" in caplog.text
    for wrong, message in (
        (images > 0, "booleans"),
        (images.astype(np.uint16) * 257, "up to 51400"),
        (np.full_like(images, np.nan, dtype=np.float32), "up to nan"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.probabilities(wrong)
    with pytest.raises(ValueError, match="booleans"):
        tf.function(classifier.probabilities)(tf.constant(images > 0))
