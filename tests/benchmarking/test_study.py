"""A study on a small network: in one process, resumable, the same results as single runs."""

import dataclasses

import numpy as np
import pytest

from transfer import fine_tune, load_meta_graph, open_source
from transfer.benchmarking import study as module
from transfer.benchmarking.study import study
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.runs import run_folder


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
def test_failed_run_is_reported_and_others_continue(tmp_path, request_for_runs):
    result = study(request_for_runs, {"batch_size": [10_000, 6]}, tmp_path / "study")
    ((axes, message),) = result.failures
    assert axes == {"batch_size": 10_000}
    assert "does not fit" in message
    assert [outcome.axes for outcome in result.outcomes] == [{"batch_size": 6}]


def test_invalid_combination_is_refused_before_the_first_run(tmp_path, request_for_runs):
    for axes, message in (
        ({"epochs": [1, 0]}, "epochs must be at least 1"),
        ({"tap": ["pool1"], "freeze_until": ["tap", "pool2"]}, "tap=pool1, freeze_until=pool2"),
        ({"freeze_until": ["absent"]}, "no tensor 'absent'"),
    ):
        with pytest.raises(ValueError, match=message):
            study(request_for_runs, axes, tmp_path / "study")
    assert not (tmp_path / "study").exists()


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
