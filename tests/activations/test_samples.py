import numpy as np
import pytest

from transfer import Backbone, Preprocess, load_meta_graph, open_source
from transfer.activations import samples


@pytest.fixture
def setting(model, image_folder):
    graph = load_meta_graph(model)
    train, _ = open_source(image_folder=image_folder).train_and_eval_splits()
    return Backbone(graph), train, Preprocess(graph.card.preprocess, graph.card.image_size)


def test_samples_are_computed_once(setting, tmp_path, monkeypatch):
    backbone, split, preprocess = setting
    computed = samples.sample_features(backbone, split, preprocess)
    images, _ = next(iter(split.batches(preprocess, 4)))
    np.testing.assert_array_equal(computed, backbone(images))
    options = {"on_disk": True, "cache_dir": tmp_path / "cache"}
    stored = samples.sample_features(backbone, split, preprocess, **options)
    monkeypatch.setattr(type(split), "batches", None)
    found = samples.sample_features(backbone, split, preprocess, **options)
    np.testing.assert_array_equal(stored, computed)
    np.testing.assert_array_equal(found, computed)
    assert found.dtype == np.float32
    # Other weights have other features.
    backbone.randomize(1)
    with pytest.raises(TypeError):
        samples.sample_features(backbone, split, preprocess, **options)


def test_cache_that_cannot_be_written_is_not_used(setting, tmp_path):
    (tmp_path / "file").write_text("")
    found = samples.sample_features(*setting, on_disk=True, cache_dir=tmp_path / "file")
    np.testing.assert_array_equal(found, samples.sample_features(*setting))
