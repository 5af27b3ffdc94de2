"""What is said about a finished run: overfitting, rare classes, images in both splits."""

import numpy as np
import pytest

from transfer.finetuning.advice import (
    describe_leaks,
    describe_old_evaluation,
    describe_overfitting,
    describe_rare_classes,
)
from transfer.finetuning.options import FineTuneOptions


def test_a_rise_of_the_held_out_loss_is_named_with_its_epochs_and_remedies():
    losses = [0.9, 0.5, 0.39, *np.linspace(0.4, 1.07, 40)]
    (line,) = describe_overfitting({"val_loss": losses}, FineTuneOptions(), head_only=True)
    assert "lowest after epoch 3 (0.39) and is 1.07 after epoch 43" in line
    assert "early_stopping=3, epochs=3 or solver=ridge" in line
    (line,) = describe_overfitting({"val_loss": losses}, FineTuneOptions(), head_only=False)
    assert "early_stopping=3, epochs=3 or mixup=0.2" in line
    assert "so that its probabilities are too high" in line
    options = FineTuneOptions(calibrate=True)
    (line,) = describe_overfitting({"val_loss": losses}, options, head_only=True)
    assert line.endswith("before the temperature; early_stopping=3, epochs=3 or solver=ridge helps")


@pytest.mark.parametrize(
    ("options", "head_only", "remedies"),
    [
        ({"hidden": (64,)}, True, "early_stopping=3 or epochs=2 helps"),
        ({"schedule": "fc7:2,pool4:2"}, False, "early_stopping=3 or mixup=0.2 helps"),
        ({"mixup": 0.1}, False, "early_stopping=3 or epochs=2 helps"),
        ({"schedule": "fc7:2,pool4:2", "cutmix": 1.0}, False, "early_stopping=3 helps"),
    ],
)
def test_remedies_are_options_that_the_run_can_have(options, head_only, remedies):
    (line,) = describe_overfitting(
        {"val_loss": [0.5, 0.4, 0.9]}, FineTuneOptions(**options), head_only=head_only
    )
    assert f"; {remedies}; calibrate=True corrects only" in line


def test_one_bad_epoch_and_noise_are_not_overfitting():
    generator = np.random.default_rng(0)
    noisy = 0.1 * generator.lognormal(0, 0.2, 45)
    assert (
        describe_overfitting({"val_loss": noisy.tolist()}, FineTuneOptions(), head_only=True) == []
    )
    falling = [*np.linspace(1, 0.2, 30), 0.3]
    assert describe_overfitting({"val_loss": falling}, FineTuneOptions(), head_only=True) == []
    assert describe_overfitting({}, FineTuneOptions(), head_only=True) == []
    assert describe_overfitting({"val_loss": [0.4]}, FineTuneOptions(), head_only=True) == []


def test_classes_with_fewer_than_five_training_images_are_named_rarest_first():
    labels = np.repeat([0, 1, 2, 4], [9, 4, 2, 5])
    (line,) = describe_rare_classes(["a", "b", "c", "absent", "e"], labels)
    assert line.startswith("2 classes have fewer than 5 training images (c: 2, b: 4);")
    assert describe_rare_classes(["a"], np.zeros(5, int)) == []


def test_held_out_images_that_are_trained_on_are_counted():
    assert describe_leaks(0) == []
    assert describe_leaks(3)[0].startswith("3 of the held-out images are also trained on")


def test_files_of_an_evaluation_of_another_model_are_named():
    (line,) = describe_old_evaluation("runs/a", 0.5443, 0.5047)
    assert "predictions.csv are of the model before, with a loss of 0.5443" in line
    assert line.endswith("vgg-transfer evaluate runs/a")
    assert describe_old_evaluation("runs/a", 0.5443, 0.5443) == []
    assert describe_old_evaluation("runs/a", None, 0.5443) == []
    only = {"is_evaluated": False}
    assert describe_old_evaluation("runs/a", 0.5443, 0.5047, **only) == []
    (line,) = describe_old_evaluation("runs/a", 0.5443, 0.5047, is_exported=True, **only)
    assert line.startswith("the models in export are of the model before")
    assert line.endswith("write them again: vgg-transfer export runs/a")
    (line,) = describe_old_evaluation("runs/a", 0.5443, 0.5047, is_exported=True)
    assert "predictions.csv and the models in export are of the model before" in line
