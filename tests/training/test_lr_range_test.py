"""The learning-rate range test, on a small model and from the command line."""

import csv

import keras
import numpy as np
import pytest

from recipes.cli import main
from transfer.training.lr_range_test import range_test
from transfer.training.trainer import ParameterGroup, Trainer

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.random((64, 8), np.float32)
LABELS = (INPUTS.sum(-1) > 4).astype(np.int64)


def new_trainer(*rates):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(16, "relu")])
    model.add(keras.layers.Dense(2))
    variables, n = model.trainable_variables, len(rates)
    return Trainer(
        model,
        [
            ParameterGroup(keras.optimizers.SGD(rate), variables[index::n])
            for index, rate in enumerate(rates)
        ],
    )


def batches():
    while True:
        yield INPUTS, LABELS


def test_range_test_stops_at_divergence_and_suggests_lower_rate():
    found = range_test(new_trainer(1.0), batches(), lowest=1e-4, highest=1e4, steps=80)
    assert len(found.rates) < 80
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    np.testing.assert_allclose(found.rates[1:] / found.rates[:-1], 10 ** (8 / 79), rtol=1e-6)
    lowest = found.rates[np.argmin(found.smoothed)]
    assert lowest / 20 < found.suggestion < lowest / 5
    # Training works with the suggested rate.
    trainer = new_trainer(found.suggestion)
    losses = [trainer.train_step(INPUTS, LABELS)[0] for _ in range(50)]
    assert losses[-1] < 0.9 * losses[0]


def test_parameter_groups_keep_rate_ratios():
    trainer = new_trainer(1.0, 0.1)
    found = range_test(trainer, batches(), lowest=1e-4, highest=1e-2, steps=12)
    first, second = (float(group.optimizer.learning_rate) for group in trainer.groups)
    assert first == pytest.approx(found.rates[-1]) == pytest.approx(1e-2)
    assert second == pytest.approx(1e-3)


def test_range_test_accepts_fewer_batches_than_steps():
    for count in (15, 5):
        few = [(INPUTS, LABELS)] * count
        assert len(range_test(new_trainer(1.0), few, steps=100).rates) == count
    with pytest.raises(ValueError, match="there are no batches"):
        range_test(new_trainer(1.0), [])


@pytest.mark.parametrize("limits", [(0, 1, 10), (1, 1, 10), (1, 2, 1)])
def test_empty_range_is_refused(limits):
    lowest, highest, steps = limits
    with pytest.raises(ValueError, match="expected 0 < lowest < highest"):
        range_test(new_trainer(1.0), batches(), lowest=lowest, highest=highest, steps=steps)


def test_immediate_divergence_is_refused():
    with pytest.raises(ValueError, match="diverged after .* begin lower than 100000"):
        range_test(new_trainer(1.0), batches(), lowest=1e5, highest=1e9, steps=50)


@pytest.mark.slow
def test_lr_find_writes_table_and_plot(tmp_path, model, image_folder, capsys):
    out = tmp_path / "trial"
    flags = ["--model", model, "--image-folder", image_folder, "--out", out, "--steps", 40]
    assert main(["lr-find", *map(str, flags)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("--learning-rate ")
    assert 1e-6 < float(first.split()[1]) < 1
    assert second == str(out)
    with (out / "lr_find.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["learning_rate"]) for row in rows]
    assert 10 <= len(rates) <= 40 and rates == sorted(rates) and rates[0] == pytest.approx(1e-7)
    assert (out / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "model.meta").exists()
    assert main(["lr-find", *map(str, flags), "--schedule", "fc7:1"]) == 1
    assert "leave out --schedule" in capsys.readouterr().err
