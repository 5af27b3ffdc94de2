"""The benchmark end to end on a small network."""

import json
import os
import shlex
import signal

import pytest
from PIL import Image

from recipes import benchmark_job
from recipes.benchmark_flags import BenchmarkConfig
from recipes.cli import main
from transfer.benchmarking import study as study_module
from transfer.benchmarking.comparison import Run
from transfer.benchmarking.study_results import Outcome, Study
from transfer.core import measurement
from transfer.finetuning.options import FineTuneOptions
from transfer.runs.interruption import Interrupted


def benchmark(out, model, folder, *flags):
    arguments = ["--model", model, "--image-folder", folder, "--out", out, "--batch-size", 6]
    return main(["benchmark", *map(str, [*arguments, *flags])])


@pytest.mark.slow
def test_each_run_is_a_process(tmp_path, model, image_folder, capfd, monkeypatch):
    out = tmp_path / "b"
    (tmp_path / "work").mkdir()  # working folder, from which no run imports modules
    for name in ("transfer", "recipes", "numpy", "random"):
        (tmp_path / "work" / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(measurement, "sgemm_gflops", lambda: 1.0)  # but not in the processes
    flags = ["--cuts", "fc7", "--seeds", 1, "--epochs", 1]
    assert benchmark(out, model, image_folder, *flags) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines()[2].split("|")[1].strip() == "fc7"
    assert printed.out.splitlines()[-1] == str(out)
    assert "1 of 1: fc7, seed 0" in printed.err
    assert json.loads((out / "benchmark.json").read_text())["rows"][0]["peak_rss_mb"] > 0
    limits = json.loads((out / "limits.json").read_text())
    assert limits["sgemm_gflops"] > 1 and limits["int8_gops"] > 0


@pytest.mark.slow
def test_error_of_a_process_is_its_last_line(tmp_path, model, image_folder):
    options = FineTuneOptions(epochs=0)
    config = BenchmarkConfig(model=str(model), image_folder=str(image_folder))
    error = benchmark_job._start(Run("fc7", "finetune", options, tmp_path / "run"), config)
    assert error == (
        f"epochs must be at least 1, got 0 (exit status 1, see {tmp_path / 'run.log'})"
    )


def test_terminated_benchmark_says_how_to_resume(tmp_path, model, image_folder, capfd, monkeypatch):
    def compare(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(benchmark_job, "compare", compare)
    out = tmp_path / "my runs"
    assert benchmark(out, model, image_folder, "--cuts", "fc7") == 143
    command = f"vgg-transfer benchmark --config '{out}/config.yaml' --out '{out}' --resume"
    assert f"interrupted; resume with: {command}" in capfd.readouterr().err


def test_interrupted_study_is_resumed_by_the_command_that_it_prints(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    seen = []

    def interrupted(request, axes, out, *, keep_models, on_result):
        seen.append((request.options, axes, keep_models))
        with study_module._opened(out, request, axes, keep_models=keep_models):
            raise Interrupted(out, 2)

    monkeypatch.setattr(benchmark_job, "study", interrupted)
    flags = ["--grid", "shots_per_class=2,3", "--keep-models", "--learning-rate", "0.01"]
    assert benchmark(tmp_path / "b", model, image_folder, *flags) == 130
    command = capsys.readouterr().err.split("resume with: ")[1]
    assert main(shlex.split(command)[1:]) == 130
    assert seen[0] == seen[1]
    assert seen[1][1:] == ({"shots_per_class": [2, 3], "seed": [0, 1, 2]}, True)


def test_tables_of_an_interrupted_study_are_written(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    written = []

    def study(request, axes, out, *, keep_models, on_result):
        out.mkdir()
        point, labels = {"seed": 0}, request.held_out.labels
        outcome = Outcome(point, "name", 0.5, 1.0, 0.1, 2.0, 0.5, 1.0, None, labels)
        on_result(Study(axes, [outcome], [], labels, None))
        written.extend(path.name for path in out.iterdir())
        raise Interrupted(out, 2)

    monkeypatch.setattr(benchmark_job, "study", study)
    assert benchmark(tmp_path / "b", model, image_folder, "--grid", "seed=0,1") == 130
    assert written == ["runs.csv"]  # a process that is killed later has left it
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"runs.csv", "tests.csv", "summary.csv", "summary.md", "summary.tex"}


def test_failed_runs_but_not_skipped_ones_are_an_error(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    results = {"failures": [], "skipped": [({"seed": 1}, "excluded")]}

    def study(request, axes, out, *, keep_models, on_result):
        out.mkdir(exist_ok=True)
        labels = request.held_out.labels
        outcome = Outcome({"seed": 0}, "name", 0.5, 1.0, 0.1, 2.0, 0.5, 1.0, None, labels)
        return Study(axes, [outcome], labels=labels, groups=None, **results)

    monkeypatch.setattr(benchmark_job, "study", study)
    assert benchmark(tmp_path / "b", model, image_folder, "--grid", "seed=0,1") == 0
    assert "excluded" in capsys.readouterr().out
    results["failures"] = [({"seed": 1}, "no memory")]
    assert benchmark(tmp_path / "b", model, image_folder, "--grid", "seed=0,1") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--grid", "seed=0,1", "--seed", 3], "seed is an axis of --grid; leave out --seed"),
        (["--grid", "seed=0,1", "--seeds", 5], "seed is an axis of --grid; leave out --seeds"),
        (["--grid", "epochs=1,2", "--epochs", 3], "epochs is an axis of --grid; leave out --epoch"),
        (["--grid", "seed=0,1", "--resume"], "holds no study to resume"),
    ],
)
def test_study_rejects_flags_that_its_grid_overrides(
    tmp_path, model, image_folder, capsys, flags, message
):
    assert benchmark(tmp_path / "b", model, image_folder, *flags) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_comparison_is_not_resumed_with_what_a_run_may_change(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark_job, "compare", lambda *_: ("", 0))
    flags = ["--cuts", "fc7", "--epochs"]
    assert benchmark(tmp_path / "b", model, image_folder, *flags, 2) == 0
    assert benchmark(tmp_path / "b", model, image_folder, *flags, 2, "--resume") == 0
    assert benchmark(tmp_path / "b", model, image_folder, *flags, 3, "--resume") == 1
    assert "--epochs 2, now 3" in capsys.readouterr().err
    assert benchmark(tmp_path / "b", model, image_folder, *flags, 2, "--calibrate", "--resume") == 1
    assert "--calibrate" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--cuts", "fc7"], ["--grid", "seed=0"]])
def test_benchmark_is_not_continued_with_other_images_of_the_same_names(
    tmp_path, model, own_image_folder, monkeypatch, capsys, flags
):
    monkeypatch.setattr(benchmark_job, "compare", lambda *_: ("", 0))
    flags = [*flags, "--epochs", 1]
    resume = ["--resume"] if "--cuts" in flags else []
    assert benchmark(tmp_path / "b", model, own_image_folder, *flags) == 0
    assert benchmark(tmp_path / "b", model, own_image_folder, *flags, *resume) == 0
    path = next(own_image_folder.rglob("*.png"))
    Image.effect_noise((32, 32), 50).convert("RGB").save(path)
    assert benchmark(tmp_path / "b", model, own_image_folder, *flags, *resume) == 1
    assert "other images (files_sha256=" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule", "fc7:2"], "benchmark chooses --schedule itself"),
        (["--tap", "auto"], "name it instead of --tap auto"),
        (["--freeze-until", "none"], "--cuts says what to compare"),
        (["--baseline", "keras", "--lr-schedule", "cosine"], "does not use --lr-schedule cosine"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--cuts", "fc7,absent"], "absent"),
    ],
)
def test_benchmark_rejects_flags_that_it_sets(tmp_path, model, image_folder, capfd, flags, message):
    assert benchmark(tmp_path / "b", model, image_folder, *flags) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "b").exists()
