"""A forecast agrees with the run that follows it."""

from dataclasses import replace

import numpy as np
import pytest

from transfer import fine_tune, load_meta_graph, open_source
from transfer.finetuning import cost as cost_module
from transfer.finetuning import forecast as forecast_module
from transfer.finetuning.cost import CutCost
from transfer.finetuning.forecast import describe_trial, forecast, with_trial
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest


@pytest.mark.slow
def test_forecast_agrees_with_the_runs(model, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_module, "_TIMED_S", 0.01)
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    options = FineTuneOptions(cache_dir=tmp_path / "cache", tap="auto", epochs=1)
    graph = load_meta_graph(model)
    request = RunRequest(graph, *splits, options)
    result = with_trial(forecast(request), request, minutes=60)
    assert result.trial is not None
    assert result.trial.num_train + result.trial.num_test == len(splits[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    costs = {cost.cut: cost for cost in result.costs}
    assert list(costs)[-1] == "none"
    assert all(isinstance(cost, CutCost) and cost.epochs == 1 for cost in costs.values())
    times = np.array([[c.extract_s, c.train_s, c.total_s] for c in costs.values()])
    assert (times >= 0).all() and (times[:, 2] > times[:, 0] + times[:, 1]).all()
    assert costs["none"].extract_s == 0

    head, *_, whole = costs.values()
    for cost, cut in ((head, "tap"), (whole, "none")):
        run = fine_tune(
            graph, *splits, run_dir=tmp_path / cut, **vars(options) | {"freeze_until": cut}
        )
        assert run.metrics["params"]["trainable"] == cost.trained
        assert run.metrics["cut"] == cost.cut
        found = run.metrics["activations"]["found"]
        assert found == (result.choice.num_images if cut == "tap" else 0)
    again = {cost.cut: cost.extract_s for cost in forecast(request).costs}
    assert again.pop(head.cut) == again.pop("none") == 0  # all activations are cached
    assert all(again.values())


def test_full_fine_tuning_is_tried_if_it_is_affordable(
    model, image_folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(cost_module, "_TIMED_S", 0.01)
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    options = FineTuneOptions(cache_dir=tmp_path / "cache", tap="fc7")
    request = RunRequest(load_meta_graph(model), *splits, options)
    result = forecast(request)
    assert result.trial_s > result.costs[-1].total_s / 10
    assert with_trial(result, request) is with_trial(result, request, 0) is result

    def fails(*_):
        raise ValueError("for this reason")

    monkeypatch.setattr(forecast_module, "try_full", fails)
    assert with_trial(result, request, 60).trial is None
    assert "full fine-tuning could not be tried: for this reason" in caplog.text
    monkeypatch.setattr(forecast_module, "try_full", lambda *_: None)  # no folds
    assert not [*describe_trial(with_trial(result, request, 60))]
    costs = [*result.costs[:-1], replace(result.costs[-1], memory_mb=1e9)]
    assert not [*describe_trial(with_trial(replace(result, costs=costs), request, 60))]
    assert "it takes 1,000,000,000 MB, and" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "fc7:1"}, "leave out schedule"),
        ({"solver": "lbfgs"}, "solver=lbfgs"),
        ({"lbfgs_c": 1.0}, "lbfgs_c=C"),
    ],
)
def test_what_a_forecast_does_not_cover_is_refused(model, image_folder, options, message):
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    with pytest.raises(ValueError, match=message):
        forecast(RunRequest(load_meta_graph(model), *splits, FineTuneOptions(**options)))
