"""Defaults of training more than a head: label smoothing, and the moving average."""

import re
import types

import keras
import numpy as np
import pytest
from commands import saved_values

from transfer import fine_tune, open_source
from transfer.finetuning import defaults
from transfer.finetuning.options import FineTuneOptions
from transfer.runs import run_folder


@pytest.fixture
def splits(smooth_folder):
    """Images of random colours, half of which a head gets wrong."""
    return open_source(image_folder=str(smooth_folder)).train_and_eval_splits()


def smoothing_of(result):
    return run_folder.read_config(result.run_dir).get("label_smoothing")


def ema_of(result):
    return run_folder.read_config(result.run_dir).get("ema")


def test_run_equals_that_with_the_values_given(model, splits, tmp_path):
    options = {"freeze_until": "pool2", "epochs": 2, "cache_dir": tmp_path / "cache"}
    chosen = fine_tune(model, *splits, run_dir=tmp_path / "chosen", **options)
    values = {"label_smoothing": smoothing_of(chosen), "ema": ema_of(chosen)}
    assert values == {"label_smoothing": defaults.MAX_SMOOTHING, "ema": 0.999}
    given = fine_tune(model, *splits, run_dir=tmp_path / "given", **values, **options)
    before, after = (saved_values(result.run_dir / "model") for result in (chosen, given))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_smoothing_follows_from_the_margin_and_is_kept(model, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "head_margin", lambda *_: 5.0)
    options = {"freeze_until": "none", "cache_dir": tmp_path / "cache"}
    first = fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=1, **options)
    train, _ = splits
    num_classes, odds = len(train.source.class_names), np.exp(5.0) / 2
    expected = num_classes / (odds + num_classes - 1) + 1 / (len(train) + 2)
    assert smoothing_of(first) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(defaults, "head_margin", None)  # a call raises a TypeError
    again = fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=2, resume=True, **options)
    assert smoothing_of(again) == smoothing_of(first)


@pytest.mark.parametrize(("margin", "num_classes"), [(4.0, 2), (5.5, 10), (11.0, 1000)])
def test_loss_is_lowest_below_the_margin(margin, num_classes):
    smoothing = defaults._smoothing_for(margin, num_classes, num_images=10**9)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    target = np.eye(1, num_classes)
    losses = {m: float(loss(target, m * target)) for m in margin + np.linspace(-2, 1, 301)}
    assert min(losses, key=losses.get) == pytest.approx(margin - np.log(2), abs=0.02)


def test_run_from_before_the_average_is_resumed_without(model, splits, tmp_path):
    options = {"freeze_until": "none", "cache_dir": tmp_path / "cache", "label_smoothing": 0.0}
    fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=1, ema=0.0, **options)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub("^ema: .*\n", "", config.read_text(), flags=re.M))
    again = fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=2, resume=True, **options)
    assert ema_of(again) == 0


def test_head_may_have_several_taps(model, splits, tmp_path):
    options = {"freeze_until": "none", "epochs": 1, "cache_dir": tmp_path / "cache"}
    result = fine_tune(model, *splits, run_dir=tmp_path / "run", tap="all", **options)
    assert 0 < smoothing_of(result) <= defaults.MAX_SMOOTHING


def test_images_of_very_many_classes_are_few(monkeypatch):
    """Of each class two images are drawn at least."""
    seen = []
    monkeypatch.setattr(defaults, "layer_features", lambda _, few, *__: seen.append(few) or 1 / 0)
    monkeypatch.setattr(defaults, "MARGIN_IMAGES", 5)
    monkeypatch.setattr(defaults, "MAX_MARGIN_IMAGES", 10)
    backbone = types.SimpleNamespace(activations=lambda _: None)
    classifier = types.SimpleNamespace(feature_extractor=backbone, preprocess=None)
    source = open_source("digits")
    with pytest.raises(ZeroDivisionError):
        defaults.head_margin(FineTuneOptions(), source.split("train"), classifier, "", "none")
    assert 1 < len(np.unique(seen[0].labels)) < 10


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_until": "tap", "solver": "gradient"},
        {"freeze_until": "tap", "solver": "ridge"},
        {"freeze_until": "none", "label_smoothing": 0.0},
        {"freeze_until": "none", "mixup": 0.2},
        {"freeze_until": "none", "cutmix": 1.0},
    ],
)
def test_nothing_is_smoothed_where_it_is_not_needed(model, splits, tmp_path, monkeypatch, options):
    monkeypatch.setattr(defaults, "head_margin", None)
    epochs = {} if options.get("solver") == "ridge" else {"epochs": 1}
    cache_dir = tmp_path / "cache"
    result = fine_tune(
        model, *splits, run_dir=tmp_path / "run", cache_dir=cache_dir, **options, **epochs
    )
    assert not smoothing_of(result)  # a solver records none
    assert (ema_of(result) or 0) == (0 if options["freeze_until"] == "tap" else 0.999)


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
