"""The default label smoothing, from the margin of a head on frozen activations."""

import types

import keras
import numpy as np
import pytest

from transfer import fine_tune, open_source
from transfer.finetuning import label_smoothing
from transfer.finetuning.options import FineTuneOptions
from transfer.runs import run_folder


def smoothing_of(result):
    return run_folder.read_config(result.run_dir).get("label_smoothing")


def test_smoothing_follows_from_the_margin_and_is_kept(model, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(label_smoothing, "head_margin", lambda *_: 5.0)
    options = {"freeze_until": "none", "cache_dir": tmp_path / "cache"}
    first = fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=1, **options)
    train, _ = splits
    num_classes, odds = len(train.source.class_names), np.exp(5.0) / 2
    expected = num_classes / (odds + num_classes - 1) + 1 / (len(train) + 2)
    assert smoothing_of(first) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(label_smoothing, "head_margin", None)  # a call raises a TypeError
    again = fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=2, resume=True, **options)
    assert smoothing_of(again) == smoothing_of(first)


@pytest.mark.parametrize(("margin", "num_classes"), [(4.0, 2), (5.5, 10), (11.0, 1000)])
def test_loss_is_lowest_below_the_margin(margin, num_classes):
    smoothing = label_smoothing.smoothing_for(margin, num_classes, num_images=10**9)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    target = np.eye(1, num_classes)
    losses = {m: float(loss(target, m * target)) for m in margin + np.linspace(-2, 1, 301)}
    assert min(losses, key=losses.get) == pytest.approx(margin - np.log(2), abs=0.02)


def test_head_may_have_several_taps(model, splits, tmp_path):
    options = {"freeze_until": "none", "epochs": 1, "cache_dir": tmp_path / "cache"}
    result = fine_tune(model, *splits, run_dir=tmp_path / "run", tap="all", **options)
    assert 0 < smoothing_of(result) <= label_smoothing.MAX_SMOOTHING


def test_images_of_very_many_classes_are_few(monkeypatch):
    """Of each class two images are drawn at least."""
    seen = []

    def layer_features(_, few, *__):
        seen.append(few)
        raise ZeroDivisionError

    monkeypatch.setattr(label_smoothing, "layer_features", layer_features)
    monkeypatch.setattr(label_smoothing, "MARGIN_IMAGES", 5)
    monkeypatch.setattr(label_smoothing, "MAX_MARGIN_IMAGES", 10)
    backbone = types.SimpleNamespace(activations=lambda _: None)
    classifier = types.SimpleNamespace(feature_extractor=backbone, preprocess=None)
    source = open_source("digits")
    train = source.split("train")
    with pytest.raises(ZeroDivisionError):
        label_smoothing.head_margin(FineTuneOptions(), train, classifier, "", "none")
    assert 1 < len(np.unique(seen[0].labels)) < 10


def test_classes_of_one_image_have_no_margin(model, splits, tmp_path):
    train, held_out = splits
    first = np.unique(train.labels, return_index=True)[1]
    few = train.where(np.isin(np.arange(len(train)), first))
    result = fine_tune(
        model,
        few,
        held_out,
        run_dir=tmp_path / "run",
        freeze_until="pool2",
        epochs=1,
        cache_dir=tmp_path / "cache",
    )
    assert smoothing_of(result) == 0.0


def test_activations_of_samples_obey_the_cache_limit(model, splits, tmp_path, monkeypatch):
    seen, layer_features = [], label_smoothing.layer_features

    def spied(*arguments):
        seen.append(arguments[-1].limit_gb)
        return layer_features(*arguments)

    monkeypatch.setattr(label_smoothing, "layer_features", spied)
    options = {"freeze_until": "none", "epochs": 1, "cache_dir": tmp_path / "cache"}
    fine_tune(model, *splits, run_dir=tmp_path / "run", cache_limit=0.5, **options)
    assert seen == [0.5]
