"""Runs in experiment trackers. Weights & Biases is a stub of its documented calls, because a real
run starts processes; MLflow is itself, with a local store, where it is installed."""

import json
import sys
import types

import pytest
from commands import finetune, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from transfer.finetuning.tracking import MlflowTracker
from transfer.runs import run_folder


class WandbRun:
    """A run as ``wandb.init`` returns it: ``id``, ``log``, ``log_artifact`` and ``finish``."""

    def __init__(self, arguments):
        self.id = arguments["id"] or "new-id"
        self.arguments, self.logged, self.artifacts, self.exit_code = arguments, [], [], None

    def log(self, values, *, step):
        if step == FAILS_AT.get("step"):
            raise ConnectionError("no\nnetwork")
        self.logged.append((step, values))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self, *, exit_code):
        self.exit_code = exit_code


class Artifact:
    def __init__(self, name, *, type):
        self.name, self.type, self.files = name, type, []

    def add_file(self, path):
        self.files.append(path.rsplit("/")[-1])


FAILS_AT: dict[str, int] = {}


@pytest.fixture
def wandb(monkeypatch):
    """The runs that were begun."""
    FAILS_AT.clear()
    runs = []

    def init(*, id, name, config, resume, reinit):
        assert (resume, reinit) == ("allow", "create_new")
        runs.append(WandbRun({"id": id, "name": name, "config": config}))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init, module.Artifact = init, Artifact
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.mark.slow
def test_wandb_gets_options_epochs_evaluation_and_files(tmp_path, model, image_folder, wandb):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--track", "wandb", "--track-files") == 0
    (run,) = wandb
    config = run.arguments["config"]
    assert (run.arguments["name"], config["epochs"], config["tap"]) == ("run", 3, "fc7:0")
    history = run_folder.read_history(out)
    epochs = [values for _, values in run.logged[:-1]]
    assert [step for step, _ in run.logged] == [1, 2, 3, 3]
    assert [row["val_loss"] for row in epochs] == pytest.approx(history["val_loss"])
    assert run.logged[-1][1]["eval_accuracy"] == metrics(out)["eval"]["accuracy"]
    (artifact,) = run.artifacts
    assert {"config.yaml", "metrics.json", "model.meta", "model.index"} <= {*artifact.files}
    assert not {".lock", "tracking.json"} & {*artifact.files}
    assert run.exit_code == 0


@pytest.mark.slow
def test_a_head_that_is_solved_for_is_logged_without_epochs(tmp_path, model, image_folder, wandb):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--track", "wandb", "--solver", "ridge") == 0
    (run,) = wandb
    assert [step for step, _ in run.logged] == [1, 1]
    assert [run.logged[0][1]["val_loss"]] == run_folder.read_history(out)["val_loss"]


@pytest.mark.slow
def test_a_resumed_run_continues_the_run_of_the_tracker(tmp_path, model, image_folder, wandb):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--track", "wandb") == 0
    more = ["--track", "wandb", "--epochs", 4, "--resume"]
    assert finetune(out, model, image_folder, *more) == 0
    assert [run.arguments["id"] for run in wandb] == [None, "new-id"]
    assert [step for step, _ in wandb[1].logged] == [4, 4]
    assert json.loads((out / "tracking.json").read_text()) == {"wandb": "new-id"}


@pytest.mark.slow
def test_a_tracker_that_fails_is_reported_once_and_the_run_continues(
    tmp_path, model, image_folder, wandb, capsys
):
    FAILS_AT["step"] = 2
    assert finetune(tmp_path / "run", model, image_folder, "--track", "wandb") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    (warning,) = warnings
    assert "wandb failed and is off for the rest of the run: ConnectionError: no network" in warning
    assert metrics(tmp_path / "run")["train"]["epochs"] == 3
    assert [step for step, _ in wandb[0].logged] == [1]
    assert wandb[0].exit_code == 1


def test_a_missing_tracker_is_refused_before_the_run(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert finetune(tmp_path / "run", model, image_folder, "--track", "mlflow") == 1
    assert "pip install 'vgg-transfer[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a store in a folder."""
    module = pytest.importorskip("mlflow", reason="needs vgg-transfer[mlflow]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # needs no database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    return module


def test_mlflow_has_each_epoch_and_the_end_of_a_run_that_is_continued(mlflow):
    tracker, client = MlflowTracker(None, "photos", {"tap": "fc7:0"}), mlflow.MlflowClient()
    for epoch in (1, 2):
        tracker.log({"val_loss": 1 / epoch}, epoch)
    tracker.end(failed=True)
    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("photos", "FAILED")
    assert run.data.params == {"tap": "fc7:0"}
    resumed = MlflowTracker(tracker.run_id, "photos", {"tap": "fc7:0", "epochs": 3})
    resumed.log({"val_loss": 0.25}, 3)
    resumed.end(failed=False)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    points = client.get_metric_history(tracker.run_id, "val_loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 0.5), (3, 0.25)]
    assert mlflow.active_run() is None


@pytest.mark.slow
def test_mlflow_has_the_run_in_its_store(tmp_path, model, image_folder, mlflow):
    out = tmp_path / "run"
    flags = ["--track", "mlflow", "--track-files"]
    assert finetune(out, model, image_folder, *flags) == 0
    run_id = json.loads((out / "tracking.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["tap"] == "fc7:0"
    assert run.data.metrics["eval_accuracy"] == metrics(out)["eval"]["accuracy"]
    assert "epoch" not in run.data.metrics  # MLflow and the others have steps
    logged = [point.value for point in client.get_metric_history(run_id, "val_loss")]
    assert logged == pytest.approx(run_folder.read_history(out)["val_loss"])
    assert "model.meta" in {file.path for file in client.list_artifacts(run_id)}
    assert finetune(out, model, image_folder, *flags, "--epochs", 4, "--resume") == 0
    assert len(client.get_metric_history(run_id, "val_loss")) == 4
    assert mlflow.active_run() is None


def test_tensorboard_has_the_hyperparameters(finished_run):
    events = EventAccumulator(str(finished_run / "events")).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["epochs"].number_value == 3
    assert found["tap"].string_value == "fc7:0"
