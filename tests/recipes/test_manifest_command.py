"""Manifests and groups on the command line."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import metrics
from conftest import make_image_folder

from recipes.cli import main


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A manifest of images in groups."""
    root = tmp_path_factory.mktemp("manifest")
    photos = make_image_folder(root / "photos")
    paths = sorted(photos.glob("*/*"))
    lines = [f"photos/{p.parent.name}/{p.name},{p.parent.name},p{p.name[1]}" for p in paths]
    (root / "labels.csv").write_text("path,label,patient\n" + "\n".join(lines))
    return root / "labels.csv"


@pytest.fixture(scope="module")
def run(manifest, model):
    """A finished run on these groups."""
    out = manifest.parent / "run"
    flags = ["--model", model, "--csv", manifest, "--group-by", "patient", "--out", out]
    assert main(["finetune", *map(str, flags), "--epochs", "2", "--batch-size", "6"]) == 0
    return out


def patients(manifest: Path, names: list[str]) -> set[str]:
    rows = [line.split(",") for line in manifest.read_text().splitlines()]
    return {patient for path, _, patient in rows if path in names}


@pytest.mark.slow
def test_run_records_the_manifest_and_evaluate_opens_it_again(manifest, run, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["csv"], config["group_by"]) == (str(manifest), "patient")
    assert not config.keys() & {"dataset", "image_folder"}
    held_out = (run / "held_out.txt").read_text().splitlines()
    everything = [line.split(",")[0] for line in manifest.read_text().splitlines()[1:]]
    trained_on = [name for name in everything if name not in held_out]
    assert not patients(manifest, held_out) & patients(manifest, trained_on)
    before = metrics(run)["eval"]
    assert before["num_groups"] == len(patients(manifest, held_out))

    for flags in ([], ["--csv", str(manifest)]):
        assert main(["evaluate", str(run), *flags]) == 0
        out = capsys.readouterr().out
        assert f"images of {before['num_groups']} groups" in out
        found = json.loads((run / "evaluation.json").read_text())
        assert {name: found[name] for name in before} == before
    assert "groups drawn independently" in " ".join((run / "report.html").read_text().split())


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_evaluation_on_trained_groups_warns(run, capsys):
    assert main(["evaluate", str(run), "--eval-split", "train"]) == 0
    assert "groups that are evaluated on are also trained on" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--against", str(run)]) == 0
    assert "exact randomization test of" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_keeps_the_groups(manifest, run, model, tmp_path):
    out = shutil.copytree(run, tmp_path / "again")
    flags = ["--model", model, "--csv", manifest, "--group-by", "patient", "--out", out]
    flags += ["--epochs", 3, "--batch-size", 6, "--resume"]
    assert main(["finetune", *map(str, flags)]) == 0
    assert (out / "held_out.txt").read_text() == (run / "held_out.txt").read_text()
    assert metrics(out)["eval"]["num_groups"] == metrics(run)["eval"]["num_groups"]


@pytest.mark.slow
def test_logistic_regression_with_groups(manifest, model, tmp_path):
    flags = ["--model", model, "--csv", manifest, "--group-by", "patient", "--solver", "lbfgs"]
    assert main(["finetune", *map(str, flags), "--out", str(tmp_path / "run")]) == 0


def test_check_data_knows_groups(manifest, model, capsys):
    flags = ["--csv", str(manifest), "--model", str(model), "--json"]
    assert main(["check-data", *flags, "--group-by", "patient", "--strict"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert groups["in_both_splits"] == [] and groups["train"] + groups["held_out"] == 10
    splits = ["--train-split", "train[:50%]", "--eval-split", "train[50%:]"]
    assert main(["check-data", *flags, *splits, "--group-by", "patient", "--strict"]) == 1
    assert json.loads(capsys.readouterr().out)["groups"]["in_both_splits"]
    assert main(["check-data", *flags]) == 0
    assert "groups" not in json.loads(capsys.readouterr().out)


def test_errors_name_flags(manifest, tmp_path, capsys):
    cases = {
        ("--csv", str(tmp_path / "no.csv")): "--csv '",
        ("--csv", str(manifest), "--group-by", "camera"): "it has no column 'camera'",
        ("--csv", str(manifest), "--image-folder", str(tmp_path)): "exclude each other",
        ("--dataset", "digits", "--group-by", "x"): "--group-by x needs",
    }
    for flags, message in cases.items():
        assert main(["check-data", *flags]) == 1
        assert message in capsys.readouterr().err
