"""The warning about overfitting."""

import numpy as np

from transfer.finetuning.advice import describe_overfitting


def test_a_rise_of_the_held_out_loss_is_named_with_its_epochs_and_remedies():
    losses = [0.9, 0.5, 0.39, *np.linspace(0.4, 1.07, 40)]
    (line,) = describe_overfitting({"val_loss": losses}, head_only=True)
    assert "lowest after epoch 3 (0.39) and is 1.07 after epoch 43" in line
    assert "early_stopping=3, epochs=3 or solver=ridge" in line
    (line,) = describe_overfitting({"val_loss": losses}, head_only=False)
    assert "ridge" not in line


def test_one_bad_epoch_and_noise_are_not_overfitting():
    generator = np.random.default_rng(0)
    noisy = 0.1 * generator.lognormal(0, 0.2, 45)
    assert describe_overfitting({"val_loss": noisy.tolist()}, head_only=True) == []
    falling = [*np.linspace(1, 0.2, 30), 0.3]
    assert describe_overfitting({"val_loss": falling}, head_only=True) == []
    assert describe_overfitting({}, head_only=True) == []
    assert describe_overfitting({"val_loss": [0.4]}, head_only=True) == []
