"""Defaults of training more than a head: label smoothing, and the moving average."""

import re

import numpy as np
import pytest
from commands import saved_values

from transfer import fine_tune
from transfer.finetuning import defaults
from transfer.finetuning.label_smoothing import MAX_SMOOTHING
from transfer.runs import run_folder


def smoothing_of(result):
    return run_folder.read_config(result.run_dir).get("label_smoothing")


def ema_of(result):
    return run_folder.read_config(result.run_dir).get("ema")


def test_run_equals_that_with_the_values_given(model, splits, tmp_path):
    options = {"freeze_until": "pool2", "epochs": 2, "cache_dir": tmp_path / "cache"}
    chosen = fine_tune(model, *splits, run_dir=tmp_path / "chosen", **options)
    values = {"label_smoothing": smoothing_of(chosen), "ema": ema_of(chosen)}
    assert values == {"label_smoothing": MAX_SMOOTHING, "ema": 0.999}
    given = fine_tune(model, *splits, run_dir=tmp_path / "given", **values, **options)
    before, after = (saved_values(result.run_dir / "model") for result in (chosen, given))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_run_from_before_the_average_is_resumed_without(model, splits, tmp_path):
    options = {"freeze_until": "none", "cache_dir": tmp_path / "cache", "label_smoothing": 0.0}
    fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=1, ema=0.0, **options)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub("^ema: .*\n", "", config.read_text(), flags=re.M))
    again = fine_tune(model, *splits, run_dir=tmp_path / "run", epochs=2, resume=True, **options)
    assert ema_of(again) == 0


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
    monkeypatch.setattr(defaults, "choose_smoothing", None)
    epochs = {} if options.get("solver") == "ridge" else {"epochs": 1}
    cache_dir = tmp_path / "cache"
    result = fine_tune(
        model, *splits, run_dir=tmp_path / "run", cache_dir=cache_dir, **options, **epochs
    )
    assert not smoothing_of(result)  # a solver records none
    assert (ema_of(result) or 0) == (0 if options["freeze_until"] == "tap" else 0.999)
