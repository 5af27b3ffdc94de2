"""The solver of a run, and which images it leaves out together."""

import types

import keras
import numpy as np
import pytest
import yaml

from transfer import fine_tune, load_meta_graph, open_source
from transfer.finetuning import defaults, head_solution, setup
from transfer.finetuning.inputs import ActivationStore
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest


class FourImages:
    def __init__(self, groups):
        self.groups = None if groups is None else np.array(groups)

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    ("name", "groups", "num_views", "expected"),
    [
        ("ridge", None, 1, None),
        ("ridge", None, 2, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("ridge", [5, 5, 6, 7], 2, [5, 5, 6, 7, 5, 5, 6, 7]),
        ("lbfgs", None, 1, None),
        ("lbfgs", None, 2, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("lbfgs", [5, 5, 6, 7], 1, [5, 5, 6, 7]),
    ],
)
def test_views_of_an_image_and_images_of_a_group_belong_together(
    monkeypatch, name, groups, num_views, expected
):
    for function in ("fit_ridge", "fit_logistic_regression"):
        monkeypatch.setattr(
            head_solution, function, lambda *arguments, **options: options["groups"]
        )
    context = types.SimpleNamespace(
        options=FineTuneOptions(solver=name),
        train=FourImages(groups),
        classifier=types.SimpleNamespace(head=types.SimpleNamespace(num_classes=2)),
    )
    labels = np.tile([0, 1, 0, 1], num_views)
    found = head_solution.solve(context, name, np.zeros((len(labels), 3)), labels)
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [("solver: lbfgs\n", "lbfgs"), ("solver: gradient\n", "gradient"), ("seed: 0\n", "gradient")],
    ids=["lbfgs", "gradient", "before there was a choice"],
)
def test_resumed_run_keeps_its_solver(tmp_path, recorded, expected):
    (tmp_path / "config.yaml").write_text(recorded)
    request = types.SimpleNamespace(
        options=FineTuneOptions(), callbacks=(), resume=True, run_dir=tmp_path
    )
    recorded = defaults.recorded_options(request)
    assert defaults.solver_of(request, recorded, None, 100, 32) == expected


def test_callbacks_change_the_solver_with_a_log_line(model, splits, tmp_path, caplog):
    caplog.set_level("INFO", "transfer")
    line = "solver: gradient, as only its epochs call callbacks"
    callbacks, graph = [keras.callbacks.Callback()], load_meta_graph(model)
    for solver in ("auto", "gradient"):
        options = FineTuneOptions(solver=solver, cache_dir=tmp_path / "cache")
        context = setup.prepare(RunRequest(graph, *splits, options, callbacks=callbacks))
        assert context.options.solver == "gradient"
        assert (line in caplog.text) == (solver == "auto")
        caplog.clear()


@pytest.mark.parametrize("options", [{"solver": "ridge"}, {"solver": "lbfgs"}, {"lbfgs_c": 1.0}])
def test_callbacks_without_epochs_are_refused(options):
    callbacks = [keras.callbacks.TerminateOnNaN()]
    request = types.SimpleNamespace(options=FineTuneOptions(**options), callbacks=callbacks)
    with pytest.raises(ValueError, match="has no epochs that would call them"):
        setup._check_callbacks(request)
    setup._check_callbacks(types.SimpleNamespace(options=FineTuneOptions(), callbacks=callbacks))


def test_taps_are_compared_with_a_progress_bar(monkeypatch):
    wrapped = []

    def choose_tap(graph, train, options, feeds, progress):
        wrapped.append(progress)
        return types.SimpleNamespace(best=types.SimpleNamespace(tap="fc7"))

    monkeypatch.setattr(defaults, "choose_tap", choose_tap)
    monkeypatch.setattr(defaults.measurement, "progress", lambda items, title, unit: (title, unit))
    for verbose in (0, 1):
        request = types.SimpleNamespace(
            graph=None, options=None, feeds={}, verbose=verbose, resume=False, run_dir=None
        )
        assert defaults.best_tap(request, {}, None) == "fc7"
    assert [progress([]) for progress in wrapped] == [[], ("features", "tap")]


@pytest.mark.slow
def test_solved_run_records_no_options_of_gradient_descent(
    tmp_path, model, image_folder, monkeypatch
):
    """Runs of earlier versions that recorded them are resumed; views that do not fit in the cache
    are computed again, with the same result."""
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    options = {"views": 2, "cache": "memory", "run_dir": tmp_path / "run"}
    cached = fine_tune(model, *splits, **options)
    path = tmp_path / "run" / "config.yaml"
    recorded = yaml.safe_load(path.read_text())
    assert recorded["solver"] == "ridge"
    assert not {"epochs", "learning_rate", "batch_size", "optimizer", "dropout"} & {*recorded}
    earlier = {"epochs": 45, "learning_rate": 0.01, "batch_size": 6, "dropout": 0.0}
    path.write_text(yaml.safe_dump(recorded | earlier))
    monkeypatch.setattr(ActivationStore, "rows", lambda *_: None)
    again = fine_tune(model, *splits, **options, resume=True)
    np.testing.assert_allclose(again.logits, cached.logits, rtol=1e-4, atol=1e-4)
