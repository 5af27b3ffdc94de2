"""Default batch size and learning rate of a head."""

import math
import types

import keras
import numpy as np
import pytest
import yaml
from commands import finetune, largest_difference

from recipes.cli import main
from transfer import Backbone
from transfer.finetuning import defaults, hyperparameters, inputs
from transfer.finetuning.hyperparameters import (
    choose_solver,
    default_batch_size,
    trains_cached_head,
)
from transfer.finetuning.options import FineTuneOptions, options_from
from transfer.runs import run_folder
from transfer.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


def config(out):
    return yaml.safe_load((out / "config.yaml").read_text())


def finetune_with_defaults(out, model, folder, *flags):
    """``commands.finetune`` without its short defaults."""
    paths = {"--model": model, "--image-folder": folder, "--out": out}
    return main(["finetune", *(str(word) for pair in paths.items() for word in pair), *flags])


@pytest.mark.parametrize(
    "num_images, batch",
    [
        (10, 10),
        (1_438, 32),
        (2_935, 32),
        (25_599, 32),
        (25_600, 64),
        (60_000, 128),
        (1_281_167, 2048),
        (1_638_400, 4096),
        (100_000_000, 4096),
    ],
)
def test_batch_of_a_head_grows_with_the_number_of_images(num_images, batch):
    assert default_batch_size(num_images, is_cached_head=True) == batch
    assert default_batch_size(num_images, is_cached_head=False) == min(32, num_images)


def test_grown_batches_leave_as_many_steps_as_small_datasets_have():
    for num_images in np.geomspace(25_600, 1e8, 50).astype(int):
        batch = default_batch_size(num_images, is_cached_head=True)
        steps = hyperparameters.HEAD_EPOCHS[0] * num_images / batch
        assert steps >= hyperparameters.HEAD_STEPS
        assert steps < 2 * hyperparameters.HEAD_STEPS or batch == 4096


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, True),
        ({"freeze_until": "fc7"}, True),
        ({"schedule": "fc7:3"}, True),
        ({"augment": True, "views": 2}, True),
        ({"mixup": 0.2}, True),
        ({"freeze_until": "pool2"}, False),
        ({"freeze_until": "none"}, False),
        ({"schedule": "fc7:3,pool2:1"}, False),
        ({"augment": True}, False),
        ({"cache": "off"}, False),
        ({"solver": "lbfgs"}, False),
    ],
    ids=str,
)
def test_batch_grows_only_for_a_head_on_cached_features(model, options, expected):
    backbone = Backbone(model, "fc7")
    given = FineTuneOptions(**{"solver": "gradient", **options})
    assert trains_cached_head(given, backbone, 1) is expected
    assert not (options.get("mixup") and trains_cached_head(given, backbone, 2))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "ridge"),
        ({"freeze_until": "fc7"}, "ridge"),
        ({"class_weights": "balanced", "cache": "off"}, "ridge"),
        ({"augment": True, "views": 2}, "ridge"),
        ({"solver": "gradient"}, "gradient"),
        ({"lbfgs_c": 0.1}, "lbfgs"),
        ({"epochs": 3}, "gradient"),
        ({"hidden": (8,)}, "gradient"),
        ({"early_stopping": 2}, "gradient"),
        ({"augment": True}, "gradient"),
        ({"freeze_until": "pool2"}, "gradient"),
        ({"schedule": "fc7:3"}, "gradient"),
    ],
    ids=str,
)
def test_frozen_run_is_solved_unless_an_option_needs_gradient_descent(model, options, expected):
    backbone = Backbone(model, "fc7")
    assert choose_solver(FineTuneOptions(**options), backbone, 100, 32) == expected
    if expected == "ridge":
        assert choose_solver(FineTuneOptions(**options), backbone, 10**6, 512) == "gradient"
        assert choose_solver(FineTuneOptions(**options), backbone, 9000, 9000) == "gradient"


def test_numbers_of_numpy_are_written_to_the_configuration():
    options = options_from({"lbfgs_c": np.float64(0.5), "views": np.int64(3)})
    text = run_folder.to_yaml({"lbfgs_c": options.lbfgs_c, "views": options.views})
    assert yaml.safe_load(text) == {"lbfgs_c": 0.5, "views": 3}


def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="solver must be auto, gradient, ridge or lbfgs, got 'x'"):
        FineTuneOptions(solver="x").check()
    with pytest.raises(ValueError, match="solver=lbfgs does not use hidden"):
        FineTuneOptions(lbfgs_c=1.0, hidden=(8,)).check()
    with pytest.raises(ValueError, match="mixup=0.2 and cutmix=1.0 exclude each other"):
        FineTuneOptions(mixup=0.2, cutmix=1.0).check()
    with pytest.raises(ValueError, match="track must be mlflow or wandb, got 'foo'"):
        FineTuneOptions(track="foo").check()
    for name in ("learning_rate", "lbfgs_c", "cache_limit"):
        for value in (0.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be a number above 0, got {value}"):
                FineTuneOptions(**{name: value}).check()
    with pytest.raises(ValueError, match="expected CUT:EPOCHS"):
        hyperparameters.requested_stages(FineTuneOptions(schedule="fc7:1:0.0"))
    FineTuneOptions(track="mlflow").check()


@pytest.mark.parametrize("solver", ["ridge", "gradient"])
def test_penalty_of_another_solver_is_refused(solver):
    with pytest.raises(ValueError, match=f"lbfgs_c=0.5 is .* and solver={solver} would not use it"):
        FineTuneOptions(lbfgs_c=0.5, solver=solver).check()


@pytest.fixture
def small_defaults(monkeypatch):
    """Defaults with which the batch grows from 4 to 8 on 20 images."""
    monkeypatch.setattr(hyperparameters, "HEAD_STEPS", 10)
    monkeypatch.setattr(hyperparameters, "BATCH", 4)
    monkeypatch.setattr(defaults, "BATCH", 4)


@pytest.mark.slow
def test_grown_batch_is_logged_and_recorded(tmp_path, model, image_folder, small_defaults, capsys):
    gradient = ["--solver", "gradient"]
    assert finetune_with_defaults(tmp_path / "grown", model, image_folder, *gradient) == 0
    assert "batch-size: 8" in capsys.readouterr().err.replace("batch_size", "batch-size")
    flags = ["--batch-size", "4"]  # an option of gradient descent
    assert finetune_with_defaults(tmp_path / "given", model, image_folder, *flags) == 0
    grown, given = config(tmp_path / "grown"), config(tmp_path / "given")
    assert (grown["batch_size"], given["batch_size"]) == (8, 4)
    assert grown["learning_rate"] == given["learning_rate"]
    flags = ["--resume"]
    assert finetune_with_defaults(tmp_path / "grown", model, image_folder, *flags) == 0


@pytest.mark.slow
def test_resumed_run_keeps_its_batch_size(tmp_path, model, image_folder, small_defaults):
    """A run of an earlier version, whose default batch was smaller."""
    out, flags = tmp_path / "run", ["--epochs", "1"]
    assert finetune_with_defaults(out, model, image_folder, "--batch-size", "4", *flags) == 0
    before = config(out)
    assert finetune_with_defaults(out, model, image_folder, "--epochs", "2", "--resume") == 0
    assert config(out) == before | {"epochs": 2}


@pytest.mark.parametrize(
    ("recorded", "options", "expected"),
    [
        ("epochs: 7\n", {}, 7),
        ("epochs: 7\n", {"epochs": 3}, 3),
        ("epochs: 7\n", {"schedule": "fc7:2"}, None),
        ("epochs: 7\n", {"solver": "ridge"}, None),  # recorded whatever the solver
        ("seed: 0\n", {}, None),
    ],
)
def test_resumed_run_keeps_its_epochs(tmp_path, recorded, options, expected):
    (tmp_path / "config.yaml").write_text(recorded)
    options = FineTuneOptions(**{"solver": "gradient", **options})
    request = types.SimpleNamespace(options=options, resume=True, run_dir=tmp_path)
    assert defaults.epochs_of(request, defaults.recorded_options(request)) == expected
    request.resume = False
    assert defaults.epochs_of(request, defaults.recorded_options(request)) == options.epochs


@pytest.mark.slow
def test_large_batches_are_computed_in_parts_if_they_are_not_cached(
    tmp_path, model, image_folder, monkeypatch
):
    frozen, fit = [], Trainer.fit

    def recorded(self, *arguments, **options):
        frozen.append(self.frozen)
        fit(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "fit", recorded)
    monkeypatch.setattr(inputs, "EXTRACTION_BATCH", 4)
    flags = ["--batch-size", 8, "--cache", "memory", "--mixup", 0.2]
    assert finetune(tmp_path / "cached", model, image_folder, *flags) == 0
    monkeypatch.setattr("transfer.core.measurement.available_memory_mb", lambda: 0.0)
    assert finetune(tmp_path / "recomputed", model, image_folder, *flags) == 0
    assert frozen == [None, None]
    assert largest_difference(tmp_path / "cached/model", tmp_path / "recomputed/model") < 1e-5


@pytest.mark.parametrize(("value", "given"), [(None, []), (0.0, []), (0.1, ["label_smoothing"])])
def test_no_label_smoothing_does_not_ask_for_gradient_descent(value, given):
    assert FineTuneOptions(label_smoothing=value).of_gradient_descent == given
