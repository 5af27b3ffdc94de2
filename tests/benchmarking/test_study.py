"""A study on a small network: in one process, resumable, the same results as single runs."""

import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from transfer import fine_tune, load_meta_graph, open_source
from transfer.benchmarking import study as module
from transfer.benchmarking.study import study
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.runs import run_folder
from transfer.runs.interruption import Interrupted


@pytest.fixture
def request_for_runs(model, image_folder, tmp_path):
    train, held_out = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    options = FineTuneOptions(epochs=2, batch_size=6, cache_dir=tmp_path / "cache")
    return RunRequest(load_meta_graph(model), train, held_out, options)


@pytest.mark.slow
def test_runs_of_a_study_equal_single_runs_and_are_not_repeated(
    tmp_path, request_for_runs, monkeypatch
):
    wanted, out = request_for_runs, tmp_path / "study"
    axes = {"freeze_until": ["tap", "pool1"], "seed": [1]}
    first = study(wanted, axes, out)
    assert [tuple(o.axes.values()) for o in first.outcomes] == [("tap", 1), ("pool1", 1)]
    assert not first.failures
    assert not list(out.glob("runs/*/model.*"))

    last = first.outcomes[-1]
    options = vars(wanted.options) | last.axes
    single = fine_tune(
        wanted.graph, wanted.train, wanted.held_out, run_dir=tmp_path / "single", **options
    )
    recorded = run_folder.read_json(out / "runs" / last.run / "metrics.json")
    assert recorded["eval"] == single.metrics["eval"]
    np.testing.assert_array_equal(last.predictions, single.logits.argmax(-1))

    # One run is lost, and the grid has grown: only these are done.
    (out / "runs" / first.outcomes[0].run / module.PREDICTIONS).unlink()
    done = []
    run = module.run
    monkeypatch.setattr(module, "run", lambda it: done.append(it.options) or run(it))
    again = study(wanted, {"freeze_until": ["tap", "pool1"], "seed": [0, 1]}, out)
    points = [("tap", 0), ("tap", 1), ("pool1", 0), ("pool1", 1)]
    assert [tuple(o.axes.values()) for o in again.outcomes] == points
    del points[3]
    assert [(options.freeze_until, options.seed) for options in done] == points
    for old, new in zip(first.outcomes, again.outcomes[1::2], strict=True):
        assert old.accuracy == new.accuracy
        np.testing.assert_array_equal(old.predictions, new.predictions)

    with pytest.raises(ValueError, match="batch_size=6, now 3"):
        options = dataclasses.replace(wanted.options, batch_size=3)
        study(dataclasses.replace(wanted, options=options), axes, out)


@pytest.mark.slow
def test_memory_of_a_run_is_released(tmp_path, request_for_runs):
    """Graphs that stay alive hold 45 MB each time."""
    alive = []

    def count(results):
        gc.collect()
        alive.append(sum(isinstance(it, tf.Graph) for it in gc.get_objects()))

    wanted = dataclasses.replace(
        request_for_runs, options=FineTuneOptions(epochs=1, freeze_until="pool1", cache="off")
    )
    study(wanted, {"seed": [0, 1, 2]}, tmp_path / "study", on_result=count)
    assert alive[1] == alive[2]


@pytest.fixture
def run_made_up(monkeypatch):
    """Runs write their files without training; values of ``failing`` are raised by batch size."""
    failing: dict[int, BaseException] = {}
    done = []

    def do(request, keep_models):
        done.append(request.options)
        if error := failing.get(request.options.batch_size):
            raise error
        folder = request.run_dir
        folder.mkdir(parents=True)
        images = {"training": {"images": 12}, "held_out": {"images": 4, "sha256": "0"}}
        run_folder.write_json(folder / "provenance.json", {"dataset": images})
        seconds = {"total_s": 9.0, "extract_s": 1.0, "train_s": 2.0}
        metrics = {"eval": {"accuracy": 0.5, "loss": 1.0}, "time": seconds}
        metrics["study"] = {"calibration_error": 0.1, "peak_mb": 900.0}
        if request.options.calibrate:
            scores = {"loss": 1.25, "calibration_error": 0.2}
            metrics["calibration"] = {"temperature": 2.0, "cross_fitted": scores}
        run_folder.write_json(folder / "metrics.json", metrics)
        run_folder.write_text(folder / "config.yaml", "epochs: 2\nlearning_rate: 0.006\n")
        np.save(folder / module.PREDICTIONS, np.zeros(len(request.held_out), np.int32))

    monkeypatch.setattr(module, "_do", do)
    return SimpleNamespace(failing=failing, done=done)


@pytest.mark.parametrize(
    "error, message",
    [
        (
            tf.errors.ResourceExhaustedError(None, None, "{{node a}} OOM\nhint"),
            "ResourceExhaustedError: OOM",
        ),
        (MemoryError(), "MemoryError"),
        (ValueError("diverged"), "diverged"),
    ],
)
def test_failed_run_is_reported_and_others_continue(
    tmp_path, request_for_runs, run_made_up, error, message
):
    run_made_up.failing[4] = error
    seen = []
    result = study(
        request_for_runs,
        {"batch_size": [3, 4, 6]},
        tmp_path / "study",
        on_result=lambda it: seen.append((len(it.outcomes), len(it.failures))),
    )
    assert result.failures == [({"batch_size": 4}, message)]
    assert [outcome.axes["batch_size"] for outcome in result.outcomes] == [3, 6]
    assert seen == [(1, 0), (1, 1), (2, 1)]


def test_interruption_ends_a_study(tmp_path, request_for_runs, run_made_up):
    run_made_up.failing[4] = Interrupted(tmp_path / "run", 15)
    with pytest.raises(Interrupted) as raised:
        study(request_for_runs, {"batch_size": [3, 4, 6]}, tmp_path / "study")
    assert (raised.value.run_dir, raised.value.status) == (tmp_path / "study", 143)
    assert [options.batch_size for options in run_made_up.done] == [3, 4]


def test_time_left_is_that_of_the_remaining_runs():
    assert module._time_left([], 5) == ""
    assert module._time_left([10.0, 20.0], 5) == " (about 45 s left)"
    assert module._time_left([600.0], 7) == " (about 60 min left)"


def test_finished_runs_are_found_when_axes_are_added_or_reordered(
    tmp_path, request_for_runs, run_made_up
):
    first = study(request_for_runs, {"batch_size": [3, 4], "seed": [0]}, tmp_path / "study")
    axes = {"seed": [0], "epochs": [2, 3], "batch_size": [3, 4]}
    again = study(request_for_runs, axes, tmp_path / "study")
    assert [options.epochs for options in run_made_up.done] == [2, 2, 3, 3]
    assert [outcome.run for outcome in again.outcomes[:2]] == [it.run for it in first.outcomes]


def test_results_are_those_that_the_run_used(tmp_path, request_for_runs, run_made_up):
    result = study(request_for_runs, {"calibrate": [False, True]}, tmp_path / "study")
    plain, calibrated = result.outcomes
    assert (plain.log_loss, plain.calibration_error) == (1.0, 0.1)
    # Not those of images that the temperature was fitted to.
    assert (calibrated.log_loss, calibrated.calibration_error) == (1.25, 0.2)
    assert plain.used == dict.fromkeys(module.USED) | {"epochs": 2, "learning_rate": 0.006}
    num_classes = len(request_for_runs.train.source.class_names)
    assert plain.images_per_class == 12 / num_classes


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"epochs": [1, 0], "seed": [5]}, "epochs 0, seed 5: epochs must be at least 1"),
        ({"freeze_until": ["tap", "absent"]}, "freeze_until absent: .* has no tensor 'absent'"),
        ({"seed": [0, -1]}, "seed -1: seed must be 0 to"),
        ({"shots_per_class": [2, 500]}, "shots_per_class 500: class 'blue' has 10 training"),
        ({"batch_size": [6, 10_000]}, "batch_size=10000 does not fit .. training images"),
        # No combination is possible.
        ({"tap": ["pool1"], "freeze_until": ["pool2"]}, "tap=pool1, freeze_until=pool2"),
        (
            {"solver": ["ridge", "lbfgs"], "freeze_until": ["pool2"]},
            "solver ridge, freeze_until pool2: solver=ridge fits a head",
        ),
    ],
)
def test_wrong_value_is_refused_before_the_first_run(tmp_path, request_for_runs, axes, message):
    options = FineTuneOptions(cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        study(dataclasses.replace(request_for_runs, options=options), axes, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "axes, skipped, reason",
    [
        (
            {"tap": ["fc7", "pool1"], "freeze_until": ["tap", "pool2"]},
            ("pool1", "pool2"),
            "tap=pool1, freeze_until=pool2",
        ),
        (
            {"solver": ["ridge", "gradient"], "freeze_until": ["tap", "pool2"]},
            ("ridge", "pool2"),
            "solver=ridge fits a head on frozen features",
        ),
        ({"solver": ["ridge", "lbfgs"], "lbfgs_c": [1.0, None]}, ("ridge", 1.0), "lbfgs_c=1.0"),
        ({"l2_sp": [0.0, 0.1], "freeze_until": ["tap", "pool2"]}, (0.1, "tap"), "l2_sp=0.1"),
        ({"shots_per_class": [1, 2], "batch_size": [2, 4]}, (1, 4), "does not fit 2 training"),
    ],
)
def test_options_that_exclude_each_other_are_skipped(
    tmp_path, request_for_runs, run_made_up, axes, skipped, reason
):
    options = FineTuneOptions(cache_dir=tmp_path / "cache")
    wanted = dataclasses.replace(request_for_runs, options=options)
    result = study(wanted, axes, tmp_path / "study")
    ((point, why),) = result.skipped
    assert tuple(point.values()) == skipped
    assert reason in why
    assert len(result.outcomes) == 3
    assert not result.failures


def test_study_with_another_model_or_other_images_is_not_continued(
    tmp_path, request_for_runs, own_model, saved_vgg, tiny_card
):
    """Their results would stand in one table."""
    axes = {"seed": [0]}
    wanted = dataclasses.replace(request_for_runs, graph=load_meta_graph(own_model))

    def begin(request):
        with module._opened(tmp_path / "study", request, axes):
            pass

    begin(wanted)
    begin(wanted)
    train = wanted.train
    fewer = {"train": train.where(np.arange(len(train)) > 0)}
    others = {
        "images_sha256": fewer,
        "feed": {"feeds": {"keep_prob:0": 0.5}},
        "epochs": {"options": dataclasses.replace(wanted.options, epochs=3)},
        "calibrate": {"options": dataclasses.replace(wanted.options, calibrate=True)},
    }
    for name, changed in others.items():
        with pytest.raises(ValueError, match=f"{name}="):
            begin(dataclasses.replace(wanted, **changed))
    # Studies of earlier versions recorded the hashes among the options, or not at all.
    content, config = (tmp_path / "study" / name for name in ("study.json", "config.yaml"))
    hashes = run_folder.read_json(content)
    content.unlink()
    config.write_text(config.read_text() + run_folder.to_yaml(hashes))
    with pytest.raises(ValueError, match="images_sha256="):
        begin(dataclasses.replace(wanted, **fewer))
    begin(wanted)
    assert "_sha256" not in config.read_text()
    assert run_folder.read_json(content) == hashes
    assert hashes.keys() == {"model_sha256", "images_sha256", "files_sha256"}
    content.unlink()
    begin(wanted)
    saved_vgg(wanted.graph.prefix, card=tiny_card, num_classes=7)
    with pytest.raises(ValueError, match="model_sha256="):
        begin(wanted)
