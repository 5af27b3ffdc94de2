"""The head before the first step of gradient descent: random, or solved for."""

import keras
import numpy as np
import pytest
from commands import finetune, largest_difference, metrics, saved_values

from transfer.finetuning import head_start
from transfer.finetuning.hyperparameters import head_learning_rate, requested_stages
from transfer.finetuning.options import FineTuneOptions
from transfer.training.trainer import Trainer

HEAD = ("head/weights", "head/biases")


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


@pytest.mark.slow
def test_training_starts_from_the_head_of_a_frozen_run(tmp_path, model, image_folder):
    assert finetune(tmp_path / "frozen", model, image_folder, "--solver", "ridge") == 0
    solved = saved_values(tmp_path / "frozen" / "model", HEAD)
    for flags in (["--freeze-until", "pool2"], ["--freeze-until", "none", "--augment"]):
        out = tmp_path / flags[1]
        flags = ["--head-start", "ridge", "--learning-rate", 1e-30, "--epochs", 1, *flags]
        assert finetune(out, model, image_folder, *flags) == 0
        for name, value in saved_values(out / "model", HEAD).items():
            # The features may have been computed in other batches.
            np.testing.assert_allclose(value, solved[name], rtol=1e-3, atol=1e-4, err_msg=name)
        assert metrics(out)["time"]["head_start_s"] > 0  # not a part of train_s


@pytest.mark.slow
def test_resumed_run_does_not_solve_again(tmp_path, model, image_folder, monkeypatch):
    flags = ["--head-start", "ridge", "--freeze-until", "pool2", "--ema", 0.5, "--l2-sp", 0.1]
    assert finetune(tmp_path / "whole", model, image_folder, *flags) == 0
    train_epoch, solve, solutions = Trainer.train_epoch, head_start.solve, []

    def interrupted(trainer, *args, **options):
        if trainer.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(trainer, *args, **options)

    def counted(*args):
        solutions.append(solve(*args))
        return solutions[-1]

    monkeypatch.setattr(head_start, "solve", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        assert finetune(tmp_path / "parts", model, image_folder, *flags) == 130
    assert finetune(tmp_path / "parts", model, image_folder, *flags, "--resume") == 0
    assert len(solutions) == 1
    assert largest_difference(tmp_path / "whole" / "model", tmp_path / "parts" / "model") == 0
    assert finetune(tmp_path / "parts", model, image_folder, *flags, "--resume") == 0
    assert largest_difference(tmp_path / "whole" / "model", tmp_path / "parts" / "model") == 0


def test_hidden_layers_have_no_solution():
    with pytest.raises(ValueError, match=r"solves for a linear head, and hidden=8,4 puts layers"):
        FineTuneOptions(head_start="ridge", hidden=(8, 4)).check()


def test_rate_of_a_solved_head_is_low():
    features = np.ones((4, 2048), np.float32)
    assert head_learning_rate(features) == 0.0015
    assert head_learning_rate(features, is_solved=True) == 2.5e-5


def test_only_the_first_stage_starts_from_a_solution():
    options = FineTuneOptions(schedule="pool4:1,none:1", head_start="ridge")
    assert [request.is_head_solved for request in requested_stages(options)] == [True, False]
