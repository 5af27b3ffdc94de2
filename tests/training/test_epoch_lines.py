"""Log lines of epochs: the first, the last, and not more than one in an interval."""

import logging

import pytest

from transfer.training.epoch_lines import EpochLines


def lines(caplog, seconds_per_epoch, epochs, trained):
    now = 0.0
    with caplog.at_level(logging.INFO, "transfer"):
        callback = EpochLines(epochs, interval_s=5, clock=lambda: now)
        for epoch in range(trained):
            now += seconds_per_epoch
            callback.on_epoch_end(epoch, {"loss": 1 / (epoch + 1), "val_accuracy": 0.5})
        callback.on_train_end()
    return [record.getMessage() for record in caplog.records]


def test_short_epochs_are_logged_once_in_five_seconds(caplog):
    shown = lines(caplog, 0.0625, 200, 200)
    assert [line.split(":")[0] for line in shown] == [
        "epoch 1 of 200", "epoch 81 of 200", "epoch 161 of 200", "epoch 200 of 200",
    ]  # fmt: skip
    assert shown[-1] == "epoch 200 of 200: loss 0.005, val_accuracy 0.5"


def test_every_long_epoch_is_logged_once(caplog):
    assert len(lines(caplog, 60, 3, 3)) == 3


@pytest.mark.parametrize("trained", [1, 7])
def test_the_last_epoch_before_early_stopping_is_logged(caplog, trained):
    assert lines(caplog, 0.0625, 200, trained)[-1].startswith(f"epoch {trained} of 200: ")


def test_no_epoch_logs_nothing(caplog):
    assert lines(caplog, 1, 5, 0) == []
