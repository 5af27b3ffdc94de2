"""Fine-tuning on the features of several taps, from ``finetune`` to the exports."""

import csv
import json

import numpy as np
import pytest
import yaml
from commands import finetune, metrics
from conftest import make_image_folder, save_vgg

from recipes.cli import main
from transfer import (
    Backbone,
    Card,
    Classifier,
    evaluate,
    extract_features,
    fine_tune,
    load_meta_graph,
    open_source,
)

TAPS = "pool1,fc7,pool2"
TENSORS = ["pool1:0", "fc7:0", "pool2:0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taps")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="caffe")
    model = save_vgg(folder / "model" / "tiny", card=card)
    photos = make_image_folder(folder / "photos")
    assert finetune(folder / "run", model, photos, "--tap", TAPS, "--epochs", 20) == 0
    return folder / "run"


def test_card_config_and_metrics_record_the_taps(run):
    card = json.loads((run / "model.json").read_text())
    assert (card["tap"], card["taps"]) == ("features:0", TENSORS)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["tap"], config["freeze_until"]) == (",".join(TENSORS), "features")
    found = metrics(run)
    assert (found["taps"], found["cut"]) == (TENSORS, "features")
    assert found["params"]["trainable"] == (8 + 32 + 16) * 2 + 2


def test_predict_classifies_with_the_head_of_the_run(run, capsys):
    photo = run.parent / "photos" / "red" / "04.jpg"
    assert main(["predict", str(run), str(photo), "--format", "csv"]) == 0
    best, *_ = csv.DictReader(capsys.readouterr().out.splitlines())
    assert best["label"] == "red"


def test_features_are_those_of_the_backbone_pooled_and_concatenated(run):
    graph = load_meta_graph(run.parent / "model" / "tiny")
    train, _ = open_source(image_folder=run.parent / "photos").train_and_eval_splits()
    features = extract_features(Backbone(graph, tap=TAPS.split(",")), train)
    assert features.taps == {"pool1": 8, "fc7": 32, "pool2": 16}
    for name in features.taps:
        one = extract_features(Backbone(graph, tap=name), train)
        np.testing.assert_allclose(features.of(name), one.values, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match="no features of tap 'fc6'; there are pool1, fc7, pool2"):
        features.of("fc6")


@pytest.mark.slow
def test_config_of_the_run_repeats_it(run, tmp_path):
    flags = ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(["finetune", *flags]) == 0
    assert metrics(tmp_path / "again")["eval"] == metrics(run)["eval"]


@pytest.mark.slow
def test_everything_after_a_tensor_before_the_taps_is_trained(run, tmp_path):
    graph = load_meta_graph(run.parent / "model" / "tiny")
    train, held_out = open_source(image_folder=run.parent / "photos").train_and_eval_splits()
    result = fine_tune(
        graph, train, held_out, run_dir=tmp_path / "run", epochs=2,
        tap=["pool1", "fc7"], freeze_until="conv1_1", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert evaluate(result.classifier, held_out)["loss"] == result.metrics["eval"]["loss"]
    with pytest.raises(ValueError, match="cannot cut at 'pool2:0'"):
        fine_tune(
            graph, train, held_out, run_dir=tmp_path / "b", tap=["pool1", "fc7"],
            freeze_until="pool2",
        )  # fmt: skip


@pytest.mark.slow
def test_lbfgs_solves_the_head_on_all_taps(run, tmp_path):
    photos, model = run.parent / "photos", run.parent / "model" / "tiny"
    flags = ["--tap", "pool1,fc7", "--solver", "lbfgs", "--image-folder", str(photos)]
    assert main(["finetune", "--model", str(model), *flags, "--out", str(tmp_path / "run")]) == 0
    assert Classifier.load(tmp_path / "run").backbone.network.output == "features:0"


@pytest.fixture(scope="module")
def run_on_all(run):
    """A run on all activations, with the head in closed form."""
    out = run.parent / "all"
    flags = ["--tap", "all", "--image-folder", str(run.parent / "photos"), "--out", str(out)]
    assert main(["finetune", "--model", str(run.parent / "model" / "tiny"), *flags]) == 0
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_run_on_all_taps_is_solved_and_recorded(run_on_all):
    card = json.loads((run_on_all / "model.json").read_text())
    assert card["tap"] == "features:0"
    assert card["taps"][-1].startswith("fc7")
    config = yaml.safe_load((run_on_all / "config.yaml").read_text())
    assert (config["tap"], config["solver"]) == ("all", "ridge")
    found = metrics(run_on_all)
    assert found["taps"] == card["taps"]
    assert found["eval"]["accuracy"] == 1.0
    assert found["solver"]["cross_validation"]["accuracy"] > 0.9
    assert main(["evaluate", str(run_on_all)]) == 0
    evaluation = json.loads((run_on_all / "evaluation.json").read_text())
    assert {name: evaluation[name] for name in found["eval"]} == found["eval"]
    assert main(["finetune", "--config", str(run_on_all / "config.yaml"), "--resume"]) == 0
    assert metrics(run_on_all)["eval"] == found["eval"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "formats"),
    [("run", "meta_graph,keras"), ("run_on_all", "meta_graph,saved_model,tflite,onnx,keras")],
)
def test_all_exports_agree_with_the_model(fixture, formats, request):
    run = request.getfixturevalue(fixture)
    assert main(["export", str(run), "--format", formats]) == 0
    exports = json.loads((run / "export" / "export.json").read_text())["exports"]
    assert {name.split()[0] for name in exports} == {*formats.split(",")}
    assert all(row["same_label"] == 1.0 for row in exports.values())
