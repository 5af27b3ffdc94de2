"""Runs in int8, by LiteRT, and in mixed precision."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import yaml
from commands import finetune, metrics

from recipes.cli import main
from transfer import evaluate, fine_tune, open_source
from transfer.finetuning import precision
from transfer.layers.classifier import Classifier
from transfer.quantization import agreement, engines
from transfer.runs.interruption import Interrupted


@pytest.fixture(autouse=True)
def only_litert(monkeypatch):
    """As where OpenVINO is not installed, and with a limit that fits a network of random weights,
    whose features hardly differ between images."""
    monkeypatch.setattr(engines.openvino, "is_installed", lambda: False)
    monkeypatch.setattr(agreement, "MAX_ERROR", 2.0)


@pytest.fixture
def run(tmp_path, model, image_folder):
    """Fine-tunes with a cache of this test; returns the metrics."""

    def run(name, *flags):
        flags = ("--cache-dir", tmp_path / "cache", *flags)
        assert finetune(tmp_path / name, model, image_folder, *flags) == 0
        return metrics(tmp_path / name)

    return run


def keys(tmp_path):
    return [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/key.json")]


def config(out):
    return yaml.safe_load((out / "config.yaml").read_text())


@pytest.mark.slow
def test_int8_run_is_recorded_and_has_its_own_activations(tmp_path, run, image_folder, capsys):
    float32 = run("float32")
    assert float32["precision"] == config(tmp_path / "float32")["precision"] == "float32"
    assert not any("precision" in key for key in keys(tmp_path))
    int8 = run("int8", "--precision", "int8")
    assert "int8 by litert: features differ from float32 by " in capsys.readouterr().err
    assert (int8["precision"], int8["int8_engine"]) == ("int8", "litert")
    assert config(tmp_path / "int8")["int8_engine"] == "litert"
    assert int8["eval"]["precision"] == "int8"
    assert int8["activations"] == float32["activations"]  # all computed, none found
    own = [key for key in keys(tmp_path) if key.get("precision") == "int8"]
    assert len(own) == len(keys(tmp_path)) / 2 > 0
    assert own[0]["engine"].keys() == {"ai-edge-litert"}
    # The second run finds the rows, and does not calibrate.
    again = run("again", "--precision", "int8")
    assert again["activations"]["computed"] == 0
    assert "calibrating" not in capsys.readouterr().err
    assert again["eval"] == int8["eval"]
    # The classifier in the files is that of float32.
    _, held_out = open_source(image_folder=image_folder).train_and_eval_splits()
    evaluated = evaluate(Classifier.load(tmp_path / "int8"), held_out)
    assert evaluated["loss"] == pytest.approx(int8["eval"]["loss"], abs=0.1)


@pytest.mark.slow
def test_interrupted_auto_run_resumes_in_its_precision(tmp_path, run, monkeypatch):
    """Even where a new measurement would decide otherwise."""
    monkeypatch.setattr(precision, "MIN_IMAGES", 1)
    monkeypatch.setattr(precision, "MAX_TIME_RATIO", float("inf"))
    assert run("whole", "--precision", "auto", "--epochs", 3)["precision"] == "int8"
    run("part", "--precision", "auto", "--epochs", 1)
    monkeypatch.setattr(precision, "MAX_TIME_RATIO", 0.0)
    flags = ["--precision", "auto", "--epochs", 3]
    resumed = run("part", *flags, "--resume")
    assert resumed["precision"] == "int8"
    assert resumed["eval"] == metrics(tmp_path / "whole")["eval"]
    assert run("new", *flags)["precision"] == "float32"


@pytest.mark.slow
def test_auto_keeps_float32_for_few_images(run, capsys):
    assert run("few", "--precision", "auto")["precision"] == "float32"
    assert "precision: float32, as 24 images are too few" in capsys.readouterr().err


@pytest.mark.slow
def test_auto_keeps_float32_where_int8_disagrees(run, monkeypatch, capsys):
    monkeypatch.setattr(precision, "MIN_IMAGES", 1)
    monkeypatch.setattr(agreement, "MAX_ERROR", 1e-6)
    assert run("auto", "--precision", "auto")["precision"] == "float32"
    assert "precision: float32; the int8 features differ" in capsys.readouterr().err


@pytest.mark.slow
def test_int8_is_refused_where_it_disagrees(tmp_path, model, image_folder, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "MAX_ERROR", 1e-6)
    out = tmp_path / "out"
    assert finetune(out, model, image_folder, "--precision", "int8", "--cache", "memory") == 1
    assert "of their standard deviation; expected at most 1e-06" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_int8_run_may_end_in_training_everything(tmp_path, run):
    """The last stage has no frozen part, so that its metrics are those of float32."""
    found = run("all", "--precision", "int8", "--schedule", "pool2:1,none:1")
    assert (found["precision"], found["cut"]) == ("int8", "none")
    assert "precision" not in found["eval"]
    assert main(["evaluate", str(tmp_path / "all")]) == 0
    assert metrics(tmp_path / "all")["evaluation"]["loss"] == found["eval"]["loss"]


@pytest.mark.slow
def test_uncached_activations_are_computed_in_int8(run):
    flags = ["--precision", "int8", "--freeze-until", "pool2", "--epochs", 1]
    cached, off = run("cached", *flags), run("off", *flags, "--cache", "off")
    assert off["activations"] == {"computed": 0, "found": 0}
    assert off["eval"]["loss"] == pytest.approx(cached["eval"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_until": "none"}, "nothing is frozen"),
        ({"int8_engine": "openvino"}, r"pip install 'vgg-transfer\[openvino\]'"),
        ({"precision": "int4"}, "auto, got 'int4'"),
    ],
    ids=["nothing frozen", "not installed", "unknown"],
)
def test_impossible_int8_is_refused(model, image_folder, tmp_path, options, message):
    splits = open_source(image_folder=image_folder).train_and_eval_splits()
    options = {"precision": "int8", "epochs": 1, "run_dir": tmp_path / "out"} | options
    with pytest.raises(ValueError, match=message):
        fine_tune(model, *splits, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_run_from_before_int8_is_resumed(tmp_path, run):
    run("old", "--epochs", 1)
    path = tmp_path / "old" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(("precision", "int8"))))
    assert np.isfinite(run("old", "--resume")["eval"]["loss"])


@pytest.mark.slow
def test_run_in_mixed_precision_agrees_and_resumes_exactly(tmp_path, model, image_folder, caplog):
    splits = open_source(image_folder=image_folder).train_and_eval_splits()
    options = {"freeze_until": "pool1", "epochs": 2, "cache_dir": tmp_path / "cache"}

    def run(name, **more):
        return fine_tune(model, *splits, run_dir=tmp_path / name, **options, **more)

    float32 = run("float32").metrics["eval"]
    for mixed in ("mixed_bfloat16", "mixed_float16"):
        whole = run(mixed, precision=mixed)
        assert f"precision={mixed} without a GPU" in caplog.text
        assert whole.metrics["precision"] == whole.metrics["eval"]["precision"] == mixed
        assert whole.metrics["activations"]["found"] == 0  # those of others are not taken
        assert [key.get("precision") for key in keys(tmp_path)].count(mixed) == 2
        assert whole.metrics["eval"]["loss"] == pytest.approx(float32["loss"], rel=0.2)
        assert whole.metrics["eval"]["loss"] != float32["loss"]

    def stop(epoch, logs):
        raise KeyboardInterrupt

    # With the loss scale of float16, which bfloat16 does not need.
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=stop)]
    with pytest.raises(Interrupted):
        run("part", precision="mixed_float16", callbacks=callbacks)
    resumed = run("part", precision="mixed_float16", resume=True)
    np.testing.assert_array_equal(resumed.logits, whole.logits)


def test_mixed_precision_is_refused_for_a_network_without_products(tmp_path, model, image_folder):
    """Anything else would silently be float32."""
    splits = open_source(image_folder=image_folder).train_and_eval_splits()
    with pytest.raises(ValueError, match="the network has none in float32"):
        fine_tune(
            model, *splits, tap="images", precision="mixed_bfloat16", run_dir=tmp_path / "out"
        )
