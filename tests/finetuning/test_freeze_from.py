"""Training the first layers, or a range of layers, with everything after it frozen."""

import keras
import numpy as np
import pytest
from commands import finetune, saved_values

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph
from transfer.finetuning.hyperparameters import StageRequest, requested_stages, resolve
from transfer.finetuning.options import FineTuneOptions


@pytest.fixture
def classifier(model):
    """With dropout in training, which the graph has before fc7."""
    keras.backend.clear_session()
    backbone = Backbone(load_meta_graph(model), "fc7")
    classifier = Classifier(backbone, Head(2, seed=0), Preprocess("unit", 16), ["a", "b"])
    classifier.build_from_size()
    return classifier


def test_layers_after_the_range_are_in_inference_mode(classifier):
    images = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)
    prefix, whole = classifier.split("pool1")
    same_prefix, ranged = classifier.split("pool1", freeze_from="pool2")
    activations = prefix(images)
    np.testing.assert_array_equal(activations, same_prefix(images))
    expected = whole(activations, training=False)
    assert np.abs(whole(activations, training=True) - expected).max() > 1e-3  # dropout
    np.testing.assert_allclose(ranged(activations, training=True), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, trained",
    [
        (["--freeze-from", "pool1"], {"conv1_1"}),
        (["--freeze-until", "pool1", "--freeze-from", "pool2"], {"conv2_1", "conv2_2"}),
    ],
    ids=["first layers", "range"],
)
def test_only_layers_before_freeze_from_are_trained(tmp_path, model, image_folder, flags, trained):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, *flags, "--epochs", 1) == 0
    before, after = saved_values(model), saved_values(out / "model")
    changed = {n.split("/")[0] for n in before if n in after and (before[n] != after[n]).any()}
    assert changed == trained


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"cut": "none", "freeze_from": "conv9"}, "freeze_from=conv9: .*; the cuts are .*pool1"),
        (
            {"cut": "pool2", "freeze_from": "pool1"},
            "the cuts after freeze_until=.*pool2.* are .*fc6",
        ),
        ({"cut": "pool1", "freeze_from": "pool1"}, "freeze_from=.*pool1"),
    ],
    ids=["unknown", "before the cut", "nothing between"],
)
def test_impossible_range_is_refused_with_the_cuts(classifier, part, message):
    with pytest.raises(ValueError, match=message):
        resolve(StageRequest(**part, epochs=1, learning_rate=None), classifier, np.ones((2, 8)), 4)


def test_freeze_from_alone_trains_from_the_input_on():
    (stage,) = requested_stages(FineTuneOptions(freeze_from="pool2"))
    assert (stage.cut, stage.freeze_from) == ("none", "pool2")
    with pytest.raises(ValueError, match="one cut"):
        FineTuneOptions(freeze_from="pool2", schedule="fc7:1").check()
