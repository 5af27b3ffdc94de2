"""The scikit-learn estimators, in scikit-learn's own tools."""

import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from transfer import Backbone, Preprocess, load_meta_graph
from transfer.data.image_arrays import ImageArrays
from transfer.sklearn import VGGClassifier, VGGFeatures

DIGITS = {"image_shape": (8, 8, 1), "scale": 255 / 16}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:160], y[:160]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_features_equal_those_of_the_backbone(digits, cache_dir):
    features = VGGFeatures(**DIGITS, cache_dir=cache_dir).fit_transform(digits[0])
    graph = load_meta_graph("embedded")
    steps = Preprocess(graph.card.preprocess, graph.card.image_size)
    images = digits[0].reshape(-1, 8, 8, 1).astype(np.float32) * np.float32(255 / 16)
    expected = Backbone(graph)(steps(images)).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())


def test_arrays_rows_and_files_give_the_same_features(tmp_path, cache_dir):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 20, 30, 3), np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    estimator = VGGFeatures(cache_dir=cache_dir)
    expected = estimator.fit_transform(images)
    for same in (list(images), paths, np.array(list(map(str, paths)))):
        np.testing.assert_allclose(clone(estimator).fit_transform(same), expected, atol=1e-5)
    rows = VGGFeatures(image_shape=(20, 30, 3), cache_dir=cache_dir)
    np.testing.assert_allclose(rows.fit_transform(images.reshape(3, -1)), expected, atol=1e-5)


def test_features_are_computed_once_for_all_clones(digits, cache_dir, monkeypatch):
    VGGFeatures(**DIGITS, cache_dir=cache_dir).fit_transform(digits[0])
    monkeypatch.setattr(
        "transfer.sklearn._Extractor.__call__", lambda *_: pytest.fail("computed again")
    )
    features = VGGFeatures(**DIGITS, cache_dir=cache_dir).fit(digits[0])
    assert features.transform(digits[0][::-1]).shape == (160, 512)
    assert features.get_feature_names_out()[-1] == "fc7_511"


def test_several_taps_are_concatenated(digits, cache_dir):
    both = VGGFeatures(tap=["pool4", "fc7"], **DIGITS, cache_dir=cache_dir).fit(digits[0][:8])
    columns = both.transform(digits[0][:8])
    names = both.get_feature_names_out()
    one = VGGFeatures(tap="fc7", **DIGITS, cache_dir=cache_dir).fit_transform(digits[0][:8])
    is_fc7 = np.char.startswith(names.astype(str), "fc7")
    np.testing.assert_allclose(columns[:, is_fc7], one, atol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 5)), "rows of pixels with image_shape"),
        (np.full((2, 4, 4, 3), np.nan), "NaN or infinity"),
        (np.zeros((0, 4, 4, 3)), "found 0 images"),
        (np.array([["a", "b"]], object), "shape"),
        (np.array([["a", "b"]]), "shape"),
        (np.ones((8, 8, 3)), r"for one image, give images\[None\]"),
        (np.ones((2, 3, 8, 8)), r"\[3, 8, 8\].* channels, which come last"),
        ([np.ones((8, 8, 2))], r"expected 1 \(gray\), 3 \(RGB\) or 4"),
        ([np.full((8, 8), "a")], "have dtype <U1"),
        (np.full((2, 8, 8), 65535, np.uint16), "up to 65535.*give scale=255/65535"),
        ([np.ones((8, 8)), np.full((8, 8), 1e4)], "up to 10000"),
        ([np.full((8, 8), np.nan)], "up to nan"),
        (np.ones((2, 8, 8), bool), "booleans"),
        ([np.ones((8, 8), bool)], "if True is white, give scale=255"),
    ],
)
def test_what_is_not_an_image_is_refused(images, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        VGGFeatures().fit(images)


@pytest.mark.parametrize("argument", [{"validation_fraction": 20}, {"batch_size": 0}])
def test_arguments_out_of_range_are_refused(digits, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        VGGClassifier(**DIGITS, **argument).fit(*digits)


def test_features_need_fit(digits):
    with pytest.raises(NotFittedError):
        VGGFeatures(**DIGITS).transform(digits[0])


class Labelled(list):
    """Like a pandas Series after a shuffle: an index is a label, not a position."""

    def __getitem__(self, label):
        return super().__getitem__(len(self) - 1 - label)


def test_images_of_a_series_are_taken_by_position(cache_dir):
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    estimator = VGGFeatures(cache_dir=cache_dir).fit(images)
    np.testing.assert_array_equal(
        estimator.transform(Labelled(images)), estimator.transform(images)
    )


def test_damaged_cached_features_are_computed_again(digits, tmp_path):
    X = digits[0][:40]
    features = VGGFeatures(**DIGITS, cache_dir=tmp_path)
    expected = features.fit_transform(X)
    (rows,) = tmp_path.rglob("rows-*.bin")
    data = bytearray(rows.read_bytes())
    data[100] ^= 255
    rows.write_bytes(data)
    np.testing.assert_allclose(features.transform(X), expected, atol=1e-5)


def test_retrained_model_is_loaded_again(tmp_path, cache_dir):
    import shutil

    from transfer import Classifier, Head
    from transfer.exports.meta_graph import save_classifier

    graph = load_meta_graph("embedded")
    for part in graph.prefix.parent.glob(f"{graph.prefix.name}*"):
        shutil.copy(part, tmp_path / part.name.replace(graph.prefix.name, "model"))
    estimator = VGGFeatures(tmp_path / "model", cache_dir=cache_dir)
    images = np.full((2, 16, 16, 3), 99, np.uint8)
    before = estimator.fit_transform(images)
    backbone = Backbone(graph)
    backbone.graph_variables[0].assign(backbone.graph_variables[0] * 0.5)
    preprocess = Preprocess(graph.card.preprocess, graph.card.image_size)
    classifier = Classifier(backbone, Head(2), preprocess, ["a", "b"])
    classifier.build_from_size()
    save_classifier(classifier, tmp_path / "model", graph.card)
    assert np.abs(estimator.fit_transform(images) - before).max() > 0.01


@pytest.mark.parametrize("container", [np.array, list])
def test_pixels_up_to_1_are_warned_of(caplog, container):
    with caplog.at_level("WARNING", "transfer"):
        VGGFeatures().fit(container(np.ones((2, 8, 8, 3), np.float32) / 2))
    assert "pixels are at most 0.5; expected 0 to 255: if white is 1, give scale=255" in caplog.text


class Table(list):
    """Like a DataFrame: iterating gives the names of the columns."""

    shape = (1, 1)

    def __array__(self, dtype=None, copy=None):
        return np.array(self[:], dtype)

    def __iter__(self):
        return iter(["path"])


def test_images_of_pillow_and_columns_of_paths_are_read_like_files(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    images = [palette, Image.new("1", (4, 4), 1)]
    np.testing.assert_array_equal(ImageArrays(images)[0][0, 0], [10, 20, 30])
    np.testing.assert_array_equal(ImageArrays(images)[1][0, 0], [255, 255, 255])
    palette.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    for column in (np.array([[path]]), np.array([[path]], object), Table([[path]])):
        (image,) = ImageArrays(column)
        np.testing.assert_array_equal(image[0, 0], [10, 20, 30])


@pytest.mark.slow
def test_classifier_is_trained_pickled_and_copied(digits, cache_dir, monkeypatch):
    X, y = digits

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    words = np.array(["zero", "one", "two", *"3456789"])[y]
    state = np.random.get_state()[1].copy()
    classifier = VGGClassifier(C=0.01, **DIGITS, cache_dir=cache_dir).fit(X[:120], words[:120])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # splitters draw from it
    assert classifier.score(X[120:], words[120:]) > 0.7
    probabilities = classifier.predict_proba(X[120:])
    assert classifier.classes_.tolist() == sorted(set(words))
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transfer.sklearn.fine_tune", interrupted)
        classifier.fit(X[:120], y[:120])
    assert classifier.classes_.tolist() == sorted(set(words))  # those of the fitted network
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_allclose(again.predict_proba(X[120:]), probabilities, atol=1e-6)
    assert clone(classifier).get_params() == classifier.get_params()


@pytest.mark.slow
def test_classifier_in_cross_validation(digits, cache_dir):
    classifier = VGGClassifier(C=0.01, **DIGITS, cache_dir=cache_dir)
    assert cross_val_score(classifier, *digits, cv=3).mean() > 0.8


@pytest.mark.slow
def test_features_pass_the_checks_of_scikit_learn(cache_dir):
    estimator = VGGFeatures(image_shape=(1, -1, 1), cache_dir=cache_dir)
    check_estimator(estimator, on_skip=None)
