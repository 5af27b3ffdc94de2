"""Precisions of a network compared; LiteRT computes in int8."""

import json
from dataclasses import replace

import numpy as np
import pytest

from transfer import load_meta_graph, open_source
from transfer.benchmarking import precisions, product_rates
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.runs import run_folder


@pytest.fixture
def request_of(model, image_folder, tmp_path):
    splits = open_source(image_folder=image_folder).train_and_eval_splits()
    options = FineTuneOptions(int8_engine="litert", cache="off")
    return RunRequest(load_meta_graph(model), *splits, options, run_dir=tmp_path / "out")


def test_precisions_are_compared_with_float32(request_of, monkeypatch):
    limits = {"float32": 100.0, "int8": 400.0, "mixed_bfloat16": 50.0}
    monkeypatch.setattr(precisions, "product_gflops", lambda name, engine: limits[name])
    results = precisions.compare_precisions(request_of, ["mixed_bfloat16", "int8"])
    assert [item.precision for item in results] == ["float32", "mixed_bfloat16", "int8"]
    float32, bfloat16, int8 = results
    assert (float32.ratio, float32.largest_difference, float32.error) == (1, 0, 0)
    assert 0 < bfloat16.largest_difference < 0.1
    assert 0 < int8.error < 2
    for item in results:
        assert item.of_limit == pytest.approx(item.gflops / limits[item.precision])
    written = json.loads((request_of.run_dir / precisions.RESULTS).read_text())
    assert written["precisions"][0]["precision"] == "float32"
    assert (request_of.run_dir / run_folder.CONFIG).is_file()
    table = precisions.describe(results)
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:5]]
    assert rows == [item.precision for item in results]


def test_images_that_are_all_alike_are_refused_before_the_measurement(request_of, monkeypatch):
    monkeypatch.setattr(precisions, "product_gflops", lambda *_: pytest.fail("measured"))
    one = replace(request_of, train=request_of.train.where(np.arange(len(request_of.train)) == 0))
    with pytest.raises(ValueError, match=r"training images \(1\) do not differ.* at least two"):
        precisions.compare_precisions(one, [])


def test_unknown_precision_is_refused(request_of):
    with pytest.raises(ValueError, match="must be among float32, int8, mixed_bfloat16, .* int4"):
        precisions.compare_precisions(request_of, ["int4"])


@pytest.mark.parametrize("precision", ["float32", "int8", "mixed_bfloat16"])
def test_rate_of_products_is_measured_in_each_precision(precision, monkeypatch):
    monkeypatch.setattr(product_rates, "_SIDE", 8)
    monkeypatch.setattr(product_rates, "_CHANNELS", 32)
    assert product_rates.product_gflops(precision, "litert") > 0
