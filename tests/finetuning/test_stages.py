"""Schedules, solvers and the flags of training, from the command line."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from commands import finetune, largest_difference, metrics, saved_values
from conftest import make_image_folder

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph, save_meta_graph
from transfer.activations.extraction import Compiled
from transfer.finetuning.hyperparameters import (
    StageRequest,
    head_learning_rate,
    requested_stages,
)
from transfer.finetuning.options import FineTuneOptions
from transfer.training.trainer import ParameterGroup, Trainer

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


def history(out):
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def changed(model, out):
    before, after = saved_values(model), saved_values(out / "model")
    return {n.split("/")[0] for n in before if n in after and (before[n] != after[n]).any()}


@pytest.mark.slow
def test_schedule_unfreezes_stage_by_stage(tmp_path, model, image_folder):
    out = tmp_path / "run"
    flags = ["--schedule", "fc7:2,pool2:1:0.001,none:2:0.0005", "--label-smoothing", 0]
    assert finetune(out, model, image_folder, *flags, "--cache-dir", tmp_path / "cache") == 0
    assert [int(row["epoch"]) for row in history(out)] == [0, 1, 2, 3, 4]
    found = metrics(out)
    assert (found["train"]["epochs"], found["train"]["steps"], found["cut"]) == (5, 20, "none")
    assert found["activations"]["computed"] == 48  # at fc7 and at pool2
    assert changed(model, out) == {"conv1_1", "conv2_1", "conv2_2", "fc6", "fc7"}
    first, *others = yaml.safe_load((out / "config.yaml").read_text())["schedule"].split(",")
    assert first.startswith("fc7:2:0.")  # the default rate
    assert others == ["pool2:1:0.001", "none:2:0.0005"]


def test_cutmix_is_refused_where_activations_have_no_height_and_width(
    tmp_path, model, image_folder, capsys
):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--cutmix", 1) == 1
    assert "the activations at fc7 have no height and width; use --mixup N, or" in (
        capsys.readouterr().err
    )
    assert finetune(out, model, image_folder, "--cutmix", 1, "--freeze-until", "pool2") == 0


@pytest.mark.slow
def test_stage_does_not_change_frozen_weights(tmp_path, model, image_folder):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--schedule", "fc7:1,pool2:2:0.001") == 0
    assert changed(model, out) == {"fc6", "fc7"}


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_interrupted_schedule_is_resumed(tmp_path, model, image_folder, run_of, monkeypatch, epoch):
    flags = ["--schedule", "fc7:2,pool1:2:0.001", "--mixup", 0.2]
    whole = run_of(*flags)
    train_epoch = Trainer.train_epoch

    def interrupted(trainer, *args, **options):
        if trainer.epoch == epoch:
            raise KeyboardInterrupt
        return train_epoch(trainer, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        assert finetune(tmp_path / "parts", model, image_folder, *flags) == 130
    assert finetune(tmp_path / "parts", model, image_folder, *flags, "--resume") == 0
    assert largest_difference(whole / "model", tmp_path / "parts" / "model") == 0
    assert [row["loss"] for row in history(whole)] == [
        row["loss"] for row in history(tmp_path / "parts")
    ]


@pytest.mark.parametrize(
    "text, stages",
    [
        ("fc7:5,pool4:3,none:2", [("fc7", 5, None), ("pool4", 3, None), ("none", 2, None)]),
        ("fc7:0:5:0.1", [("fc7", 5, 0.1)]),
        ("a/b:0:2, none:1:1e-4", [("a/b", 2, None), ("none", 1, 1e-4)]),
    ],
)
def test_schedule_is_parsed(text, stages):
    assert requested_stages(FineTuneOptions(schedule=text)) == [
        StageRequest(*stage, 1.0) for stage in stages
    ]


@pytest.mark.parametrize("text", ["fc7", "fc7:0", "fc7:x", ":3", "fc7:1:2:3", "", "fc7:1,,none:1"])
def test_invalid_schedule_is_refused(text):
    with pytest.raises(ValueError, match="expected CUT:EPOCHS or CUT:EPOCHS:RATE"):
        requested_stages(FineTuneOptions(schedule=text))


@pytest.mark.slow
def test_cut_equals_full_training_with_zero_rate_before_it(tmp_path, model, image_folder):
    # Dropout is active in the trained part only.
    flags = ["--learning-rate", 0.02, "--lr-schedule", "constant", "--feed", "keep_prob=1.0"]
    assert finetune(tmp_path / "cut", model, image_folder, *flags) == 0
    flags += ["--freeze-until", "none", "--backbone-lr-scale", 0]
    flags += ["--label-smoothing", 0, "--ema", 0]  # as of a head
    assert finetune(tmp_path / "full", model, image_folder, *flags) == 0
    assert changed(model, tmp_path / "full") == set()
    assert largest_difference(tmp_path / "cut" / "model", tmp_path / "full" / "model") < 1e-5


@pytest.mark.slow
def test_inner_cut_equals_full_training_with_zero_rate_before_it(model):
    """Training on cached activations of pool1 equals training on images with zero rates before."""
    images = np.random.default_rng(0).random((24, 16, 16, 3), np.float32)
    labels = np.arange(24) % 2

    def new_classifier():
        backbone = Backbone(load_meta_graph(model), "fc7", feeds={"keep_prob:0": 1.0})
        head = Head(2, seed=0)
        classifier = Classifier(backbone, head, Preprocess("unit", 16), ["a", "b"])
        classifier.build_from_size()
        return classifier

    def train(trained, inputs, groups):
        trainer = Trainer(trained, groups)
        for _ in range(3):
            for start in range(0, 24, 6):
                at = slice(start, start + 6)
                trainer.train_step(inputs[at], labels[at])

    cut = new_classifier()
    prefix, suffix = cut.split("pool1")
    kept = np.asarray(Compiled(prefix)(images))
    train(suffix, kept, [ParameterGroup(keras.optimizers.Adam(0.01), suffix.trainable_variables)])

    full = new_classifier()
    first = full.split("pool1")[0].variables
    first = [v for v in full.trainable_variables if any(v is w for w in first)]
    rest = [v for v in full.trainable_variables if not any(v is w for w in first)]
    assert first and rest
    groups = [(rest, 0.01), (first, 0.0)]
    groups = [ParameterGroup(keras.optimizers.Adam(rate), found) for found, rate in groups]
    train(full.split(None)[1], images, groups)
    for one, other in zip(cut.trainable_variables, full.trainable_variables, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=one.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, head, backbone",
    [
        # A new head needs a higher rate than the backbone. The features are small.
        ([], (0.006, 1), 1e-4),
        (["--learning-rate", 0.01], (0.01, 0.01), 0.01),
        (["--learning-rate", 0.01, "--backbone-lr-scale", 0.1], (0.01, 0.01), 1e-3),
        (["--backbone-lr-scale", 0.1], (1e-4, 1e-4), 1e-5),
    ],
)
def test_learning_rates_of_head_and_backbone(tmp_path, model, image_folder, flags, head, backbone):
    flags = ["--freeze-until", "pool2", "--epochs", 1, "--batch-size", 20, *flags]
    flags += ["--lr-schedule", "constant"]
    assert finetune(tmp_path / "run", model, image_folder, *flags) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert head[0] <= config["learning_rate"] <= head[1]
    assert config["learning_rate"] * config["backbone_lr_scale"] == pytest.approx(backbone)
    before, after = saved_values(model), saved_values(tmp_path / "run" / "model")
    # The first step of Adam changes a weight by the learning rate, if it has a gradient.
    step = max(np.abs(after[name] - before[name]).max() for name in before if name in after)
    assert step == pytest.approx(backbone, rel=0.01)


@pytest.mark.parametrize(
    "width, scale, rate",
    [(512, 1, 0.006), (8, 1, 0.006), (512, 0.1, 0.06), (4096, 1, 0.00075), (4096, 0, 0.00075)],
)
def test_head_learning_rate_falls_with_width_and_rms(width, scale, rate):
    assert head_learning_rate(np.full((4, width), scale, np.float32)) == rate


@pytest.mark.slow
def test_block_learning_rates_decay_away_from_head(tmp_path, model, image_folder):
    flags = ["--freeze-until", "none", "--learning-rate", 0.01, "--epochs", 1]
    flags += ["--lr-schedule", "constant", "--block-lr-decay", 0.1, "--batch-size", 20]
    assert finetune(tmp_path / "run", model, image_folder, *flags) == 0
    before, after = saved_values(model), saved_values(tmp_path / "run" / "model")
    # The first step of Adam changes a weight by the learning rate, if it has a gradient.
    step = {name: np.abs(after[name] - before[name]).max() for name in before if name in after}
    names = {layer: next(n for n in step if n.startswith(layer) and "bias" not in n) for layer in
             ("conv1_1", "conv2_1", "conv2_2", "fc6", "fc7")}  # fmt: skip
    rates = {layer: step[name] for layer, name in names.items()}
    expected = {"fc7": 0.01, "fc6": 0.001, "conv2_2": 1e-4, "conv2_1": 1e-4, "conv1_1": 1e-5}
    found = {layer: float(f"{rate:.1g}") for layer, rate in rates.items()}
    assert found == expected


def test_cut_bypassed_by_branch_is_refused(tmp_path, image_folder, capsys):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        w = tf1.get_variable("w", [3, 4], initializer=tf.zeros_initializer())
        flat = tf.reduce_mean(x, [1, 2])
        inner = tf.nn.relu(flat @ w, name="inner")
        tf.concat([inner, flat], 1, name="tap")
    save_meta_graph(graph, tmp_path / "branched" / "m", {"w": np.eye(3, 4, dtype=np.float32)})
    flags = ["--tap", "tap", "--preprocess", "unit", "--freeze-until", "inner"]
    assert finetune(tmp_path / "run", tmp_path / "branched", image_folder, *flags) == 1
    error = capsys.readouterr().err
    assert "inner" in error and "Mean" in error
    assert error.count("error: ") == 1


@pytest.mark.slow
def test_lbfgs_finds_the_same_head(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--solver", "lbfgs") == 0
    found = metrics(out)
    assert found["train"]["epochs"] == 1
    assert found["eval"]["accuracy"] == 1.0  # the classes differ by colour
    assert changed(model, out) == set()
    assert "lbfgs: C " in capsys.readouterr().err
    assert len(history(out)) == 1


@pytest.mark.slow
def test_early_stopping_restores_best_epoch(tmp_path, model, image_folder):
    out = tmp_path / "run"
    flags = ["--early-stopping", 2, "--epochs", 40, "--learning-rate", 3.0]
    assert finetune(out, model, image_folder, *flags) == 0
    rows = history(out)
    assert len(rows) < 40
    best = min(float(row["val_loss"]) for row in rows)
    assert metrics(out)["eval"]["loss"] == pytest.approx(best, rel=1e-6)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, model):
    """Images of classes of different sizes, and a run on them."""
    place = tmp_path_factory.mktemp("uneven")
    photos = make_image_folder(place / "photos")
    for name in ("08.jpg", "10.jpg"):
        (photos / "red" / name).unlink()
    assert finetune(place / "run", model, photos) == 0
    return photos, place / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup", 0.3],
        ["--class-weights", "balanced"],
        ["--clip-norm", 0.01],
        ["--accumulate", 2],
        ["--weight-decay", 0.5],
        ["--label-smoothing", 0.2],
        ["--dropout", 0.5],
        ["--lr-schedule", "cosine"],
        ["--optimizer", "sgd"],
        ["--ema", 0.9],
    ],
    ids=lambda flags: flags[0],
)
def test_each_option_changes_the_result(tmp_path, model, uneven, flags):
    photos, plain = uneven
    assert finetune(tmp_path / "run", model, photos, *flags) == 0
    assert largest_difference(plain / "model", tmp_path / "run" / "model") > 1e-5
    assert np.isfinite(metrics(tmp_path / "run")["eval"]["loss"])


@pytest.mark.slow
def test_accumulated_steps_equal_large_batches(tmp_path, model, image_folder):
    """With batches of equal size, the mean of the batch means is the mean over all examples."""
    flags = ["--learning-rate", 0.02, "--epochs", 2]
    assert finetune(tmp_path / "large", model, image_folder, *flags, "--batch-size", 20) == 0
    flags += ["--batch-size", 10, "--accumulate", 2]
    assert finetune(tmp_path / "small", model, image_folder, *flags) == 0
    assert largest_difference(tmp_path / "large" / "model", tmp_path / "small" / "model") < 1e-5


@pytest.mark.slow
def test_metrics_have_epoch_time(finished_run):
    assert 0 < metrics(finished_run)["train"]["epoch_s"] < 60
