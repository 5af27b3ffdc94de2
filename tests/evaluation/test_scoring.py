"""``evaluate`` from Python equals ``fine_tune`` and ``vgg-transfer evaluate``."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.cli import main
from transfer import Classifier, Head, evaluate, fine_tune, open_source
from transfer.core.files import locked_folder
from transfer.data.dataset import whole_eval_split
from transfer.runs import evaluation, run_data, run_folder
from transfer.runs.evaluation import evaluate_model, evaluate_run

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["tap", "pool1", "none"])
def test_metrics_equal_those_of_the_run_and_of_the_command_line(tmp_path, model, image_folder, cut):
    train, held_out = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    out = tmp_path / "run"
    result = fine_tune(
        model, train, held_out, run_dir=out, freeze_until=cut, epochs=2, batch_size=6
    )
    found = evaluate(result.classifier, held_out)
    reported = result.metrics["eval"]
    assert {name: found[name] for name in reported} == reported
    assert main(["evaluate", str(out)]) == 0
    assert found == json.loads((out / "evaluation.json").read_text())
    loaded = Classifier.load(out)
    assert evaluate(loaded, held_out, cut=result.metrics["cut"]) == found
    assert evaluate(loaded, held_out, batch_size=3)["loss"] == pytest.approx(found["loss"])


@pytest.fixture(scope="module")
def run(copy_of_finished_run):
    return copy_of_finished_run


def test_evaluate_run_returns_what_it_writes(run, tmp_path):
    seen = []

    def progress(items, what, unit):
        seen.append((what, unit))
        return items

    found = evaluate_run(run, progress=progress)
    assert found == json.loads((run / "evaluation.json").read_text())
    assert found == json.loads((run / "metrics.json").read_text())["evaluation"]
    assert seen == [("evaluation", "batch")]
    held_out = run_data.held_out(run, run_data.open_data(run))
    path = tmp_path / "p.npy"
    assert evaluate(Classifier.load(run), held_out, cut="fc7", probabilities=path) == found
    assert np.load(path).shape == (len(held_out), 2)
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        evaluate_run(run, probabilities=tmp_path / "p.csv")


def test_report_repeats_training_only_where_a_command_started_it(run, tmp_path):
    """A Python program gives splits that ``config.yaml`` does not record."""
    settings = run_folder.read_config(run)
    (tmp_path / run_folder.METRICS).write_text("{}")
    (tmp_path / "model.json").write_text("{}")
    path = tmp_path / run_folder.CONFIG
    path.write_text(run_folder.to_yaml(settings))
    again = ["vgg-transfer", "finetune", "--config", str(path), "--out", "runs/again"]
    assert evaluation._summary(tmp_path, ["evaluate"]).commands == [again, ["evaluate"]]
    path.write_text(run_folder.to_yaml(settings | {"train_split": None}))
    assert evaluation._summary(tmp_path, ["evaluate"]).commands == [["evaluate"]]


def test_run_that_another_process_continues_is_not_evaluated(run):
    with locked_folder(run), pytest.raises(BlockingIOError, match="another process works in"):
        evaluate_run(run)


@pytest.mark.slow
def test_model_without_a_run_is_evaluated_on_the_images_given(run, tmp_path, capsys):
    model = run / run_folder.MODEL
    folder = run_folder.read_config(run)["image_folder"]
    capsys.readouterr()
    assert main(["evaluate", str(model), "--image-folder", folder]) == 0
    everything = whole_eval_split(open_source(image_folder=folder))
    found = evaluate(Classifier.load(run), everything)
    shown = capsys.readouterr().out
    assert f"accuracy {found['accuracy']:.4f} on {len(everything)} images" in shown
    assert "report.html" not in shown
    assert evaluate_model(model, image_folder=folder) == found
    shutil.copytree(Path(folder) / "red", tmp_path / "red")
    only = evaluate_model(model, image_folder=str(tmp_path))
    assert evaluate_run(run, image_folder=str(tmp_path))["accuracy"] == only["accuracy"]
    assert only["num_examples"] == len(everything) / 2
    with pytest.raises(ValueError, match="there are no held-out images; give the images with"):
        evaluate_model(model)


def test_coverage_adds_prediction_sets(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--coverage", "0.5"]) == 0
    found = json.loads((run / "metrics.json").read_text())["evaluation"]
    sets, curve = found["conformal"], found["risk_coverage"]
    assert sum(sets["calibrated_on"]) == found["num_examples"]
    assert f"label of {sets['measured_coverage']:.4f} of the images" in capsys.readouterr().out
    assert curve["points"][-1]["accuracy"] == pytest.approx(found["accuracy"])
    with pytest.raises(ValueError, match="more than 0 and less than 1, got 1"):
        evaluate_run(run, coverage=1.0)


def test_metrics_file_stays_small_with_many_classes(run, monkeypatch):
    """The metrics per class are then in ``evaluation.json`` only."""
    monkeypatch.setattr(evaluation, "MAX_CLASSES_IN_METRICS", 1)
    found = evaluate_run(run)
    assert json.loads((run / "evaluation.json").read_text()) == found
    kept = json.loads((run / "metrics.json").read_text())["evaluation"]
    assert kept == {name: value for name, value in found.items() if name != "classes"}


def test_class_order_may_differ_but_not_classes(run):
    held_out = run_data.held_out(run, run_data.open_data(run))
    classifier = Classifier.load(run)
    expected = evaluate(classifier, held_out)
    for variable in classifier.head.trainable_variables:
        variable.assign(np.asarray(variable)[..., ::-1])
    classifier.labels = classifier.labels[::-1]
    found = evaluate(classifier, held_out)
    assert found["loss"] == pytest.approx(expected["loss"])
    assert found["classes"][0]["label"] == expected["classes"][1]["label"] == "red"
    assert found["classes"][0]["f1"] == pytest.approx(expected["classes"][1]["f1"])
    classifier.labels = ["red", "green"]
    with pytest.raises(ValueError, match=r"1 are new \(blue\), 1 are missing \(green\)"):
        evaluate(classifier, held_out)


def test_images_may_lack_a_class(run, caplog):
    held_out = run_data.held_out(run, run_data.open_data(run))
    known = Classifier.load(run)
    names = [*known.labels, "green"]
    classifier = Classifier(known.backbone, Head(3), known.preprocess, names)
    classifier.build_from_size()
    found = evaluate(classifier, held_out)
    assert [entry["support"] > 0 for entry in found["classes"]] == [True, True, False]
    assert "no images of 1 of the 3 classes: green" in caplog.text


def test_empty_split_and_empty_batch_are_refused(run):
    held_out = run_data.held_out(run, run_data.open_data(run))
    classifier = Classifier.load(run)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        evaluate(classifier, held_out, batch_size=0)
    with pytest.raises(ValueError, match="no images"):
        evaluate(classifier, held_out.where(np.zeros(len(held_out), bool)))


def test_coverage_and_risk_are_checked_before_any_image_is_computed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.evaluation.scoring.compute", None)
    with pytest.raises(ValueError, match="coverage must be more than 0 and less than 1, got 1.5"):
        evaluate_run(run, coverage=1.5)
    with pytest.raises(ValueError, match="risk must be more than 0 and less than 1, got 0"):
        evaluate_run(run, risk=0.0)
    with pytest.raises(FileNotFoundError, match="is not a folder of images"):
        evaluate_run(run, unknown=tmp_path / "none")
    with pytest.raises(ValueError, match="there are no images in the folder"):
        evaluate_run(run, unknown=tmp_path)


def test_too_few_images_for_coverage_and_risk_are_said(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--coverage", "0.9", "--risk", "0.05"]) == 0
    shown = capsys.readouterr().out
    assert "a coverage of 0.9 cannot be promised with 4 images, it needs 9: the sets" in shown
    assert "at most 0.05 cannot be promised with 4 images: it needs 59 without an error" in shown


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["fc7", "pool1", "none"])
def test_unknown_images_change_no_other_metric(run, cut, image_folder):
    held_out = run_data.held_out(run, run_data.open_data(run))
    classifier = Classifier.load(run)
    found = evaluate(classifier, held_out, cut=cut, unknown=image_folder)
    unknown = found.pop("unknown")
    assert found == evaluate(classifier, held_out, cut=cut)
    assert (unknown["folder"], unknown["num_images"]) == (str(image_folder), 24)
    assert list(unknown["scores"]) == ["feature_distance", "energy", "max_probability"]


def test_unknown_images_are_scored_and_predict_shows_what_was_measured(run, tmp_path, capsys):
    folder = tmp_path / "unknown" / "deep"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(6):
        pixels = generator.integers(0, 256, (20, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"no image")
    words = ["--unknown-score", "feature_distance", "--format", "jsonl"]
    assert main(["evaluate", str(run)]) == 0
    assert main(["predict", str(run), str(folder / "0.png"), *words]) == 1
    assert "--unknown FOLDER first" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--unknown", str(tmp_path / "unknown")]) == 0
    out, err = capsys.readouterr()
    assert "6 unknown images in" in out and "other unknown images may be told apart" in out
    assert "1 images in" in err and "damaged.png" in err
    measured = json.loads((run / "metrics.json").read_text())["evaluation"]["unknown"]["scores"]
    assert main(["predict", str(run), str(folder / "0.png"), *words]) == 0
    out, err = capsys.readouterr()
    assert f"AUROC {measured['feature_distance']['auroc']:.4f} on 6 images" in err
    assert 0 <= json.loads(out)["unknown_score"] <= 2
    assert main(["evaluate", str(run)]) == 0
    assert not (run / "class_means.npy").exists()
    assert main(["predict", str(run), str(folder / "0.png"), "--unknown-score", "energy"]) == 0
    out, err = capsys.readouterr()
    assert "no AUROC was measured for this run" in err and "  unknown: " in out


def test_predict_adds_the_sets_of_the_recorded_threshold(run, image_folder, capsys):
    assert main(["evaluate", str(run)]) == 0
    assert main(["predict", str(run), str(image_folder), "--sets"]) == 1
    assert f"evaluate {run} --coverage 0.9 first" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--coverage", "0.5"]) == 0
    capsys.readouterr()
    threshold = json.loads((run / "metrics.json").read_text())["evaluation"]["conformal"][
        "threshold"
    ]
    words = ["predict", str(run), str(image_folder), "--sets", "--format"]
    assert main([*words, "jsonl"]) == 0
    sets = []
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        sets.append(line["set"])
        probable = [p["label"] for p in line["predictions"] if p["probability"] >= threshold]
        assert line["set"] == probable
    assert main([*words, "csv", "--top-k", "1"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sum(row["in_set"] == "yes" for row in rows) == sum(map(len, sets))
    assert main([*words, "table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  set: ")[1] for line in lines] == [", ".join(s) or "empty" for s in sets]
