"""A benchmark of cuts on a small network; its runs are in this process, to be quick."""

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from transfer import load_meta_graph, open_source
from transfer.benchmarking import comparison as comparisons
from transfer.benchmarking import limits
from transfer.benchmarking.comparison import Comparison, Run, compare, labels_of
from transfer.benchmarking.keras_baseline import keras_baseline
from transfer.core import measurement
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.run import run
from transfer.graph.cuts import default_cuts
from transfer.runs import run_folder

WORK = {"finetune": run, "keras-baseline": keras_baseline, "benchmark-limits": limits.measure}


@pytest.fixture(autouse=True)
def _products_are_not_timed(monkeypatch):
    """They take seconds before and after each run; test_benchmark times them in its processes."""
    monkeypatch.setattr(measurement, "sgemm_gflops", lambda: 1.0)
    monkeypatch.setattr(limits, "product_gflops", lambda precision, engine: 2.0)


@pytest.fixture
def graph(model):
    return load_meta_graph(model)


@pytest.fixture
def comparison(graph):
    """Makes a comparison of the named cuts."""

    def make(cuts, **arguments):
        options = FineTuneOptions(epochs=1, batch_size=6)
        labels, cuts = labels_of(graph, options, cuts)
        return Comparison(options, labels, cuts, **arguments)

    return make


@pytest.fixture
def start(graph, image_folder):
    train, held_out = open_source(image_folder=str(image_folder)).train_and_eval_splits()

    def in_this_process(item):
        try:
            WORK[item.work](RunRequest(graph, train, held_out, item.options, run_dir=item.folder))
        except ValueError as error:
            return str(error)

    return in_this_process


@pytest.mark.slow
def test_benchmark_resumes_and_writes_report(tmp_path, comparison, start):
    wanted = comparison("fc7,scratch", seeds=2)
    table, num_failed = compare(wanted, tmp_path, start)
    labels = ["fc7", "scratch"]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == labels
    assert num_failed == 0

    summary = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {row["label"]: row for row in summary["rows"]}
    assert list(rows) == labels
    assert all(row["seeds"] == 2 and row["failed"] == 0 for row in rows.values())
    assert rows["fc7"]["warm_extract_s"] < rows["fc7"]["extract_s"]
    assert rows["fc7"]["disk_mb"] > 0
    assert rows["scratch"]["extract_s"] == rows["scratch"]["disk_mb"] == 0
    assert rows["scratch"]["trainable"] > rows["fc7"]["trainable"] == 2 * (32 + 1)
    with (tmp_path / "benchmark.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == labels
    for name in ("accuracy_time.png", "epoch_time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    HTMLParser().feed(page)
    assert all(label in page for label in labels)
    assert "http" not in page
    assert not list(tmp_path.glob("*/seed-*/model.*"))

    # Interrupted runs are repeated, finished ones are not.
    (tmp_path / "fc7" / "seed-1" / "metrics.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-*/metrics.json")}
    assert compare(wanted, tmp_path, start)[1] == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((tmp_path / "benchmark.json").read_text())
    assert again["rows"][1:] == summary["rows"][1:]
    assert len(again["rows"]) == 2


def test_run_that_ended_after_its_benchmark_was_killed_is_completed(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.core.measurement.sgemm_gflops", lambda: 5.0)
    run_folder.write_json(tmp_path / run_folder.METRICS, {"eval": {"accuracy": 1.0}})
    (tmp_path / "model.index").write_text("weights")
    item = Run("fc7", "finetune", FineTuneOptions(seed=3), tmp_path)
    record = comparisons._record(item, lambda _: pytest.fail("repeated"), keep_models=False)
    assert record == {
        "label": "fc7",
        "seed": 3,
        "eval": {"accuracy": 1.0},
        "sgemm_gflops": 5.0,
        "disk_mb": 0.0,
    }
    assert comparisons._record(item, lambda _: None, keep_models=False) == record
    assert not (tmp_path / "model.index").exists()


@pytest.mark.slow
def test_failed_run_is_reported_and_others_continue(tmp_path, comparison, start):
    def fails_at_pool1(item):
        if item.options.freeze_until == "pool1":
            item = replace(item, options=replace(item.options, epochs=0))
        return start(item)

    wanted = comparison("pool1,none", seeds=1, baselines=["keras"])
    assert compare(wanted, tmp_path, fails_at_pool1)[1] == 1
    page = (tmp_path / "report.html").read_text()
    assert "pool1, seed 0" in page
    assert "epochs must be at least 1, got 0" in page
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    found = {row["label"]: (row["failed"], row.get("trainable")) for row in rows}
    head, everything = 2 * (32 + 1), found["none"][1]
    assert found == {
        "pool1": (1, None),
        "none": (0, everything),
        "keras frozen": (0, head),
        "keras full": (0, everything),
    }


def test_rows_of_the_tap_train_a_head_only(comparison, tmp_path):
    """Penalties on the backbone's weights are for the rows that train it."""
    wanted = comparison("fc7,pool1", seeds=1)
    wanted = replace(wanted, options=replace(wanted.options, l2_sp=0.01))
    assert [run.options.l2_sp for run in wanted.runs(tmp_path)] == [0, 0.01]


def test_short_name_of_the_tap_is_a_row_of_a_head(tmp_path):
    graph = load_meta_graph("embedded")
    options = FineTuneOptions(tap="fc6_dropout/SelectV2:0", l2_sp=0.01)
    labels, cuts = labels_of(graph, options, "tap,fc6_dropout,pool4")
    assert labels == {
        "tap": "fc6_dropout/SelectV2:0",
        "fc6_dropout": "fc6_dropout/SelectV2:0",
        "pool4": "pool4:0",
    }
    runs = Comparison(options, labels, cuts, seeds=1).runs(tmp_path)
    assert [run.options.l2_sp for run in runs] == [0, 0, 0.01]


def test_default_cuts_are_tap_and_middle_poolings(graph):
    network = graph.network("fc7:0", "images:0", {}, False)
    assert default_cuts(network, 16) == [network.output, "pool1:0"]
