"""Inputs after the graph's own data source: parts of a batch, decoded files."""

import numpy as np
import pytest
import strangers
import tensorflow as tf
from commands import finetune
from conftest import StockSession, make_image_folder
from stock import assert_close, images

from transfer import Backbone, load_meta_graph
from transfer.models.meta_graph import SharedBatchError

tf1 = tf.compat.v1


@pytest.mark.parametrize(
    ("program", "inputs"),
    [
        ("towers_of_a_split", ["split:0", "split:1"]),
        ("towers_of_slices", [f"tower_{i}/net/strided_slice:0" for i in range(3)]),
    ],
)
def test_each_tower_equals_plain_tensorflow_session(tmp_path, program, inputs):
    prefix = strangers.save(strangers.ALL[program], tmp_path / "m")
    graph, x = load_meta_graph(prefix), images(5, 16, 16, 3)
    stock = StockSession(prefix)
    whole = np.concatenate([x] * len(inputs))
    for number, name in enumerate(inputs):
        tap = f"tower_{number}/net/fc7/relu"
        with pytest.raises(SharedBatchError, match=f"gives 1/{len(inputs)} of a row") as error:
            Backbone(graph, tap)
        assert error.value.inputs == (name,)
        layer = Backbone(graph, tap, input=name)
        assert_close(layer(x), stock.run(f"{tap}:0", {name: x}))
        # This tower computes each part of the batch.
        assert_close(layer(x), stock.run(f"{tap}:0", {"images:0": whole}))


@pytest.mark.slow
def test_concatenated_towers_accept_any_batch_size(tmp_path):
    prefix = strangers.save(strangers.towers_of_a_split, tmp_path / "m")
    layer, x = Backbone(load_meta_graph(prefix), "concat"), images(5, 16, 16, 3)
    expected = StockSession(prefix).run("concat:0", {"images:0": np.concatenate([x, x[:1]])})
    assert_close(layer(x), expected[:5])


def test_finetune_rejects_towers_with_alternative(tmp_path, capsys):
    prefix = strangers.save(strangers.towers_of_a_split, tmp_path / "m")
    photos = make_image_folder(tmp_path / "photos", 6)
    flags = ("--tap", "tower_1/net/fc7/relu", "--preprocess", "unit")
    assert finetune(tmp_path / "run", prefix, photos, *flags) == 1
    error = capsys.readouterr().err
    assert "split between towers" in error
    assert "split:1" in error
    assert not (tmp_path / "run").exists()


def test_input_after_decoder_equals_plain_tensorflow_session(tmp_path):
    prefix = strangers.save(strangers.jpeg_files, tmp_path / "m")
    pixels = images(3, 16, 16, 3) * 50 + 128
    layer = Backbone(load_meta_graph(prefix), "fc7/relu", input="ResizeBilinear")
    stock = StockSession(prefix)
    for one, features in zip(pixels, layer(pixels), strict=True):
        assert_close(features[None], stock.run("fc7/relu:0", {"ResizeBilinear:0": one[None]}))


def test_fixed_batch_of_transposed_convolution_is_removed(tmp_path):
    prefix = strangers.save(strangers.a_batch_in_a_transposed_convolution, tmp_path / "m")
    layer = Backbone(load_meta_graph(prefix), "fc7/relu")
    assert layer.network.batch_size is None
    x = images(20, 16, 16, 3)
    expected = StockSession(prefix).run("fc7/relu:0", {"images:0": x})
    assert_close(layer(x), expected)
    assert_close(layer(x[:3]), expected[:3])
