import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import NUM_CLASSES, TINY, save_vgg

from transfer import Card, save_meta_graph, vgg

tf1 = tf.compat.v1


def test_save_and_stock_restore(tmp_path, stock_session, images):
    values = vgg.random_weights(TINY, NUM_CLASSES)
    save_meta_graph(vgg.build_graph(TINY, NUM_CLASSES), tmp_path / "m", values)
    stock = stock_session(tmp_path / "m")
    np.testing.assert_array_equal(stock.run("fc7/weights:0"), values["fc7/weights"])
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint", "m.data-00000-of-00001", "m.index", "m.meta",
    ]  # fmt: skip


def test_save_records_the_hashes(tmp_path):
    import hashlib

    save_vgg(tmp_path / "m", card=Card(preprocess="unit"))
    card = json.loads((tmp_path / "m.json").read_text())
    assert card["preprocess"] == "unit"
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert len(card["sha256"]) == 3


def test_save_refuses_values_that_do_not_fit(tmp_path):
    values = vgg.random_weights(TINY, NUM_CLASSES)
    del values["fc6/biases"]
    values["fc7/biases"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"no value for fc6/biases; .* fc7/biases \(graph \(32,\)"):
        save_meta_graph(vgg.build_graph(TINY, NUM_CLASSES), tmp_path / "m", values)
    assert not list(tmp_path.iterdir())
