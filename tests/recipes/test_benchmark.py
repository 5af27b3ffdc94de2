"""The benchmark end to end on a small network, and its metrics."""

import csv
import dataclasses
import json
from html.parser import HTMLParser

import pytest

from recipes import benchmark_job
from recipes.cli import main
from transfer import load_meta_graph


def benchmark(out, model, folder, *flags):
    arguments = ["--model", model, "--image-folder", folder, "--out", out, "--batch-size", 6]
    return main(["benchmark", *map(str, [*arguments, *flags])])


@pytest.mark.slow
def test_benchmark_resumes_and_writes_report(tmp_path, model, image_folder, capfd, monkeypatch):
    out = tmp_path / "b"
    (tmp_path / "work").mkdir()  # working folder, from which no run imports modules
    for name in ("transfer", "recipes", "numpy", "random"):
        (tmp_path / "work" / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path / "work")
    flags = ["--cuts", "fc7,scratch", "--seeds", 2, "--epochs", 2]
    assert benchmark(out, model, image_folder, *flags) == 0
    printed = capfd.readouterr()
    labels = ["fc7", "scratch"]
    assert [line.split("|")[1].strip() for line in printed.out.splitlines()[2:4]] == labels
    assert printed.out.splitlines()[-1] == str(out)

    summary = json.loads((out / "benchmark.json").read_text())
    rows = {row["label"]: row for row in summary["rows"]}
    assert list(rows) == labels
    assert all(row["seeds"] == 2 and row["failed"] == 0 for row in rows.values())
    assert rows["fc7"]["warm_extract_s"] < rows["fc7"]["extract_s"]
    assert rows["fc7"]["disk_mb"] > 0
    assert rows["scratch"]["extract_s"] == rows["scratch"]["disk_mb"] == 0
    assert rows["scratch"]["trainable"] > rows["fc7"]["trainable"] == 2 * (32 + 1)
    with (out / "benchmark.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == labels
    for name in ("accuracy_time.png", "epoch_time.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    HTMLParser().feed(page)
    assert all(label in page for label in labels)
    assert "http" not in page
    assert not list(out.glob("*/seed-*/model.*"))

    # Interrupted runs are repeated, finished ones are not.
    (out / "fc7" / "seed-1" / "metrics.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/metrics.json")}
    assert benchmark(out, model, image_folder, *flags, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((out / "benchmark.json").read_text())
    assert again["rows"][1:] == summary["rows"][1:]
    assert len(again["rows"]) == 2


@pytest.mark.slow
def test_failed_run_is_reported_and_others_continue(
    tmp_path, model, image_folder, capfd, monkeypatch
):
    out = tmp_path / "b"
    start = benchmark_job._start

    def fails_at_pool1(verb, config, *rest):
        if config.freeze_until == "pool1":
            config = dataclasses.replace(config, epochs=0)
        return start(verb, config, *rest)

    monkeypatch.setattr(benchmark_job, "_start", fails_at_pool1)
    flags = ["--cuts", "pool1,none", "--seeds", 1, "--epochs", 1, "--baseline", "keras"]
    assert benchmark(out, model, image_folder, *flags) == 1
    printed = capfd.readouterr().out
    assert "failed: pool1, seed 0: epochs must be at least 1, got 0 (exit status 1, " in printed
    assert "pool1, seed 0" in (out / "report.html").read_text()
    rows = json.loads((out / "benchmark.json").read_text())["rows"]
    found = {row["label"]: (row["failed"], row.get("trainable")) for row in rows}
    head, everything = 2 * (32 + 1), found["none"][1]
    assert found == {
        "pool1": (1, None),
        "none": (0, everything),
        "keras frozen": (0, head),
        "keras full": (0, everything),
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule", "fc7:2"], "benchmark chooses --schedule itself"),
        (["--tap", "auto"], "name it instead of --tap auto"),
        (["--freeze-until", "none"], "--cuts says what to compare"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--cuts", "fc7,absent"], "absent"),
    ],
)
def test_benchmark_rejects_flags_that_it_sets(tmp_path, model, image_folder, capfd, flags, message):
    assert benchmark(tmp_path / "b", model, image_folder, *flags) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "b").exists()


def test_default_cuts_are_tap_and_middle_poolings(model):
    from transfer.graph.cuts import default_cuts

    graph = load_meta_graph(model)
    network = graph.network("fc7:0", "images:0", {}, False)
    assert default_cuts(network, 16) == [network.output, "pool1:0"]
