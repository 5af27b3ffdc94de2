"""The trial of full fine-tuning uses training images only, and costs what it forecasts."""

import numpy as np
import pytest

from transfer import load_meta_graph, open_source
from transfer.finetuning import full_trial
from transfer.finetuning.cost import CutCost
from transfer.finetuning.full_trial import is_affordable, trial_seconds, try_full
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.runs.interruption import Interrupted


class Runs:
    """Stands in for ``run``: a head predicts class 0, full fine-tuning the labels."""

    def __init__(self):
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        labels = request.held_out.labels
        if request.options.freeze_until == "tap":
            labels = np.zeros_like(labels)
        self.logits = np.eye(len(request.held_out.source.class_names))[labels]
        return self


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr(full_trial, "run", runs := Runs())
    return runs


def request(model, image_folder, **options):
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    return RunRequest(load_meta_graph(model), *splits, FineTuneOptions(**options))


def test_both_runs_have_the_same_disjoint_training_images(model, image_folder, runs):
    given = request(
        model,
        image_folder,
        freeze_until="pool4",
        shots_per_class=3,
        l2_sp=0.1,
        head_start="ridge",
        batch_size=1000,
        early_stopping=2,
        track="mlflow",
        track_files=True,
    )
    trial = try_full(given, given.train, "pool5")
    full, head = runs.requests
    assert (full.options.freeze_until, head.options.freeze_until) == ("none", "tap")
    assert (full.options.l2_sp, head.options.l2_sp) == (0.1, 0.0)
    for one in runs.requests:
        assert one.options.tap == "pool5"
        assert one.options.shots_per_class is None
        assert one.options.batch_size == len(one.train)
        assert (one.options.early_stopping, one.options.track) == (None, None)
        one.options.check()
        names = {*one.train.names}, {*one.held_out.names}
        assert names == ({*full.train.names}, {*full.held_out.names})
        assert not names[0] & names[1]
        assert names[0] | names[1] == {*given.train.names}
        assert not one.run_dir.exists()
    share = (full.held_out.labels == 0).mean()
    assert (trial.accuracy, trial.head_accuracy) == (1.0, share)
    assert trial.interval[0] <= trial.gain <= trial.interval[1]


def test_nothing_is_tried_on_classes_of_one_image(model, image_folder, runs):
    given = request(model, image_folder)
    first = np.unique(given.train.labels, return_index=True)[1]
    keep = np.isin(np.arange(len(given.train)), first)
    assert try_full(given, given.train.where(keep), "pool5") is None
    assert not runs.requests


def test_interrupted_trial_cannot_be_resumed(model, image_folder, monkeypatch):
    def interrupted(of_trial):
        raise Interrupted(of_trial.run_dir)

    monkeypatch.setattr(full_trial, "run", interrupted)
    given = request(model, image_folder)
    with pytest.raises(KeyboardInterrupt) as error:
        try_full(given, given.train, "pool5")
    assert not isinstance(error.value, Interrupted)


def test_cost_is_that_of_the_images_seen():
    full = CutCost("none", 3, 0.0, 3000.0, 3100.0, 1.0, 1.0, 1)
    options = FineTuneOptions(epochs=3)
    assert trial_seconds(full, options, 100, 100, 0) == pytest.approx(100 + 3000 * 260 / 300)
    assert trial_seconds(full, options, 1000, 10_000, 1000) == pytest.approx(100 + 3000 * 26 / 310)
    assert is_affordable(309, full, None)
    assert not is_affordable(311, full, None)
    assert is_affordable(311, full, 320.0)
    assert not is_affordable(1, full, 0.0)
