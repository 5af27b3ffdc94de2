"""`export` from Python: exported models equal the classifier."""

import json
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import save_vgg

from transfer import (
    Backbone,
    Card,
    Classifier,
    Head,
    Preprocess,
    export,
    open_source,
    save_meta_graph,
)
from transfer.core.files import locked_folder
from transfer.exports import keras_file, tflite, writing
from transfer.exports.meta_graph import save_classifier

PHOTOS = np.random.default_rng(0).integers(0, 255, (2, 20, 24, 3)).astype(np.uint8)
LABELS = ["a", "b", "c"]


def new_classifier(model, head=None):
    classifier = Classifier(Backbone(model), head or Head(3), Preprocess("caffe", 16), LABELS)
    classifier.build_from_size()
    for variable in classifier.head.trainable_variables:  # so that the labels differ
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    return classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="caffe")
    return new_classifier(save_vgg(tmp_path_factory.mktemp("model") / "tiny", card=card))


@pytest.fixture
def loaded(classifier, tmp_path):
    """The classifier as returned by `fine_tune`: loaded from a run's model."""
    save_classifier(classifier, tmp_path / "run" / "model", Card(licence="MIT"))
    return Classifier.load(tmp_path / "run")


def test_keras_file_outputs_logits(classifier, tmp_path):
    metrics = export(classifier, tmp_path, formats=["keras"])
    path = tmp_path / "keras" / "model.keras"
    model = keras.models.load_model(path)
    pixels = classifier.preprocess.resize(PHOTOS)
    np.testing.assert_allclose(model(pixels), classifier(PHOTOS), rtol=1e-5, atol=1e-5)
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert zipfile.ZipFile(path).read("labels.txt").decode().splitlines() == LABELS
    assert metrics["exports"]["keras"]["max_difference"] < 1e-5
    assert json.loads((tmp_path / "export.json").read_text()) == metrics
    text = (tmp_path / "keras" / "README.md").read_text()
    assert "keras.models.load_model" in text and "of synthetic images:" in text
    assert "np.repeat" not in text


@pytest.mark.slow
def test_saved_model_outputs_probabilities(classifier, tmp_path):
    export(classifier, tmp_path, formats=["saved_model"])
    model = tf.saved_model.load(str(tmp_path / "saved_model" / "1"))
    found = model.signatures["pixels"](pixels=tf.constant(PHOTOS))["probabilities"]
    np.testing.assert_allclose(found, classifier.probabilities(PHOTOS), atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "loaded"])
def test_meta_graph_outputs_logits(request, tmp_path, stock_session, kind):
    exported = request.getfixturevalue(kind)
    export(exported, tmp_path / "out", formats=["meta_graph"])
    card = json.loads((tmp_path / "out" / "meta_graph" / "model.json").read_text())
    session = stock_session(tmp_path / "out" / "meta_graph" / "model")
    found = session.run(card["outputs"]["logits"], {"pixels:0": PHOTOS.astype(np.float32)})
    np.testing.assert_allclose(found, exported(PHOTOS), rtol=1e-5, atol=1e-5)
    assert card.get("licence") == ("MIT" if kind == "loaded" else None)
    assert (tmp_path / "out" / "meta_graph" / "labels.txt").read_text() == "a\nb\nc\n"


def test_meta_graph_has_current_weights(loaded, tmp_path, stock_session):
    before = np.asarray(loaded(PHOTOS))
    for variable in loaded.trainable_variables:
        variable.assign(variable * 0.9)
    export(loaded, tmp_path / "out", formats=["meta_graph"])
    card = json.loads((tmp_path / "out" / "meta_graph" / "model.json").read_text())
    session = stock_session(tmp_path / "out" / "meta_graph" / "model")
    found = session.run(card["outputs"]["logits"], {"pixels:0": PHOTOS.astype(np.float32)})
    np.testing.assert_allclose(found, loaded(PHOTOS), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, before, atol=1e-3)


@pytest.mark.slow
def test_int8_needs_images(classifier, tmp_path, image_folder):
    export(classifier, tmp_path / "out", formats=["tflite"])
    models = sorted(path.name for path in (tmp_path / "out" / "tflite").glob("*.tflite"))
    assert models == ["model_float16.tflite", "model_float32.tflite"]
    pixels = np.asarray(classifier.preprocess.resize(PHOTOS))
    found = tflite.load(tmp_path / "out" / "tflite" / "model_float32.tflite")(pixels)
    np.testing.assert_allclose(found, classifier.probabilities_of_resized(pixels), atol=1e-5)
    train, held_out = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    metrics = export(
        classifier, tmp_path / "out", formats=["tflite"], images=held_out, calibration=train
    )
    assert metrics["num_images"] == len(held_out)
    assert [*metrics["exports"]] == ["tflite float32", "tflite float16", "tflite int8"]
    assert "of labelled images:" in (tmp_path / "out" / "tflite" / "README.md").read_text()


def test_format_that_fails_later_keeps_the_earlier_files(classifier, tmp_path, monkeypatch):
    export(classifier, tmp_path / "out", formats=["keras"])
    with monkeypatch.context() as patch:
        patch.setattr(keras_file, "load", lambda _: lambda pixels: np.full((len(pixels), 3), 1 / 3))
        with pytest.raises(ValueError, match="keras gives other results"):
            export(classifier, tmp_path / "out", formats=["keras"])
    assert [*json.loads((tmp_path / "out" / "export.json").read_text())["exports"]] == ["keras"]
    assert [*export(classifier, tmp_path / "out", formats=["keras"])["exports"]] == ["keras"]


@pytest.mark.parametrize("killed_at", ["keras", ".saving-"])  # in place; the earlier one moved
def test_export_that_was_killed_can_be_repeated(classifier, tmp_path, monkeypatch, killed_at):
    def keras_format(context, folder):
        (folder / "model.keras").write_text("model")
        predict = context.classifier.probabilities_of_resized
        yield "keras", folder / "model.keras", lambda pixels: np.asarray(predict(pixels))

    def rename_and_die(path, target):
        rename(path, target)
        if target.name.startswith(killed_at):
            raise KeyboardInterrupt

    monkeypatch.setitem(writing._FORMATS, "keras", keras_format)
    rename = Path.rename
    if killed_at != "keras":
        export(classifier, tmp_path, formats=["keras"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_and_die)
        export(classifier, tmp_path, formats=["keras"])
    assert [*export(classifier, tmp_path, formats=["keras"])["exports"]] == ["keras"]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "export.json", "keras"}
    assert {path.name for path in (tmp_path / "keras").iterdir()} == {"README.md", "model.keras"}


def test_precision_that_cannot_be_converted_fails_alone(classifier, tmp_path, monkeypatch):
    convert = tflite.convert

    def converted(classifier, precision, examples):
        if precision == "float16":
            raise ValueError("no kernel")
        return convert(classifier, precision, examples)

    monkeypatch.setattr(tflite, "convert", converted)
    with pytest.raises(ValueError, match="^tflite float16: no kernel$"):
        export(classifier, tmp_path / "out", formats=["tflite"])
    found = json.loads((tmp_path / "out" / "export.json").read_text())["exports"]
    assert [*found] == ["tflite float32"]


def test_other_head_prevents_meta_graph_only(model, tmp_path):
    classifier = new_classifier(model, keras.layers.Dense(3))
    with pytest.raises(ValueError, match="meta_graph: .*can save a classifier with a Head"):
        export(classifier, tmp_path / "out", formats=["meta_graph", "keras"])
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"export.json", "keras"}


def test_loaded_classifier_is_native_too(loaded, tmp_path):
    metrics = export(loaded, tmp_path / "out", formats=["keras"])
    assert metrics["exports"]["keras"]["max_difference"] < 1e-5


@pytest.mark.slow
def test_network_that_keras_cannot_express_is_refused_with_its_node(tmp_path):
    """The other formats are written."""
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, [None, 16, 16, 3], name="images")
        scale = tf.compat.v1.get_variable("scale", [3], use_resource=False)
        tf.reduce_mean(tf.image.adjust_hue(images, 0.1) * scale, [1, 2], name="fc7")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="caffe")
    save_meta_graph(graph, tmp_path / "hue", {"scale": np.ones(3, np.float32)}, card)
    with pytest.raises(ValueError, match=r"keras: cannot express node '.*AdjustHue'") as refused:
        export(new_classifier(tmp_path / "hue"), tmp_path / "out", formats=["keras", "saved_model"])
    assert "Classifier.save writes" in str(refused.value)
    exported = {path.name for path in (tmp_path / "out").glob("[!.]*")}
    assert exported == {"export.json", "saved_model"}


def test_folder_that_another_process_exports_to_is_left_alone(classifier, tmp_path):
    draft = tmp_path / ".saving-0123456789abcdef" / "labels.txt"
    draft.parent.mkdir()
    draft.write_text("theirs")
    with (
        locked_folder(tmp_path),
        pytest.raises(BlockingIOError, match="another process works in .*; wait for it"),
    ):
        export(classifier, tmp_path, formats=["keras"])
    assert draft.read_text() == "theirs"
    assert not (tmp_path / "export.json").exists()


def test_unknown_format_is_refused_before_writing(classifier, tmp_path):
    for formats in ("onnx,pickle", ["onnx", "pickle"]):
        with pytest.raises(ValueError, match="formats=onnx,pickle: 'pickle' is unknown; choose"):
            export(classifier, tmp_path / "out", formats=formats)
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        export(classifier, tmp_path / "out", num_images=0)
    assert not (tmp_path / "out").exists()
