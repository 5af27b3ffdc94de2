"""Taps compared by cross-validation, with an estimate that the choice does not flatter."""

import types

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from transfer import load_meta_graph
from transfer.finetuning import defaults, tap_choice
from transfer.finetuning.model_plan import plan_model
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.tap_choice import candidate_taps, score_taps
from transfer.training.ridge import fit_ridge


def test_informative_tap_is_chosen_by_its_accuracy_in_stratified_folds():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    informative = generator.normal(size=(60, 6)) + 2 * np.eye(6)[labels]
    features = {"noise": generator.normal(size=(60, 6)), "good": informative}
    choice = score_taps(features, labels, seed=3)
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    for score in choice.scores:
        expected = np.empty(60, bool)
        for train, test in folds.split(features[score.tap], labels):
            x, y = features[score.tap], labels
            head = fit_ridge(x[train], y[train], 3, penalties=tap_choice._PENALTIES)
            expected[test] = (x[test] @ head.kernel + head.bias).argmax(-1) == y[test]
        assert score.accuracy == expected.mean()
        assert score.interval[0] < score.accuracy < score.interval[1]
    assert choice.best.tap == "good"
    assert choice.nested == choice.best.accuracy  # it is chosen in each fold


def test_nested_accuracy_of_noise_is_that_of_chance():
    nested, best = [], []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        features = {str(n): generator.normal(size=(40, 4)) for n in range(6)}
        choice = score_taps(features, np.repeat([0, 1], 20), seed=seed)
        nested.append(choice.nested)
        best.append(choice.best.accuracy)
    assert abs(np.mean(nested) - 0.5) < 3 * 0.5 / (4 * 40) ** 0.5 + 0.02
    assert np.mean(best) > np.mean(nested) + 0.05  # the best of six looks better than chance


def test_intervals_cover_the_accuracy_of_a_run():
    """Of a head on all training images, measured on other images, in nine of ten draws or more."""
    covered = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        labels = generator.permutation(np.resize(np.arange(3), 230))
        values = generator.normal(size=(230, 8)) + 1.5 * np.eye(8)[labels]
        known = np.arange(230) < 30
        choice = score_taps({"tap": values[known]}, labels[known], seed=seed, num_held_out=200)
        head = fit_ridge(values[known], labels[known], 3, penalties=tap_choice._PENALTIES)
        right = (values[~known] @ head.kernel + head.bias).argmax(-1) == labels[~known]
        low, high = choice.nested_interval
        covered.append(low <= right.mean() <= high)
    assert np.mean(covered) >= 0.9


def test_more_training_images_raise_the_upper_end_of_the_interval():
    generator = np.random.default_rng(0)
    labels = np.resize(np.arange(5), 50)
    features = {"tap": generator.normal(size=(50, 20)) + 2 * np.eye(20)[labels]}
    few, many = (score_taps(features, labels, num_train=n) for n in (50, 400))
    assert many.nested == few.nested
    assert many.nested_interval[0] == few.nested_interval[0]
    assert many.nested_interval[1] > few.nested_interval[1]


def test_images_of_a_group_are_in_one_fold():
    generator = np.random.default_rng(0)
    labels, groups = np.repeat([0, 1], 20), np.repeat(np.arange(10), 4)
    # Features that identify the group: useless for the class of another group.
    features = {"tap": np.eye(10)[groups] + 0.01 * generator.normal(size=(40, 10))}
    assert score_taps(features, labels, groups).nested < 0.7
    assert score_taps(features, labels).nested > 0.9


def test_class_with_one_image_cannot_be_cross_validated():
    with pytest.raises(ValueError, match="at least two training images"):
        score_taps({"tap": np.zeros((3, 2))}, np.array([0, 0, 1]))


def test_candidates_begin_with_the_default_and_are_different_layers(model):
    graph = load_meta_graph(model)
    taps = list(candidate_taps(graph, FineTuneOptions()))
    assert taps[0] == "fc7"
    assert 2 <= len(taps) <= tap_choice.MAX_TAPS
    assert not any("fc7_dropout" in tap for tap in taps)  # the same features as fc7
    assert next(iter(candidate_taps(graph, FineTuneOptions(tap="pool1")))) == "pool1"
    with pytest.raises(ValueError, match="tensor 'absent'"):
        candidate_taps(graph, FineTuneOptions(tap="fc7", input="absent"))


def test_candidates_can_be_cut_where_the_run_is(model):
    graph = load_meta_graph(model)
    for options in ({"freeze_until": "pool2"}, {"schedule": "tap:1,pool2:1"}):
        taps = candidate_taps(graph, FineTuneOptions(tap="auto", **options))
        assert "fc7" in taps and "all" not in taps
    with pytest.raises(ValueError, match="tensor 'absent'"):
        candidate_taps(graph, FineTuneOptions(tap="auto", freeze_until="absent"))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("fc6_dropout/GreaterEqual", "is of bool; features are floating-point"),
        ("all,fc7", "all in a list of tensors; it stands alone"),
        ("auto,fc7", "auto in a list of tensors"),
        (" ", "names no tensor"),
    ],
)
def test_tap_that_gives_no_features_is_refused(model, tap, message):
    with pytest.raises(ValueError, match=message):
        plan_model(load_meta_graph(model), FineTuneOptions(tap=tap))


def test_resumed_run_keeps_its_tap(tmp_path):
    (tmp_path / "config.yaml").write_text("tap: pool1:0\n")
    request = types.SimpleNamespace(resume=True, run_dir=tmp_path)
    recorded = defaults.recorded_options(request)
    assert defaults.best_tap(request, recorded, None) == "pool1:0"


def test_images_are_drawn_from_all_classes(smooth_folder):
    from transfer import open_source

    split = open_source(image_folder=str(smooth_folder)).split("train")
    drawn = tap_choice.drawn(split, 20, seed=0)
    assert np.bincount(drawn.labels).tolist() == [10, 10]
    assert tap_choice.drawn(split, 60, seed=0) is split


def test_rare_class_is_not_missed(smooth_folder):
    from transfer import open_source

    split = open_source(image_folder=str(smooth_folder)).split("train")
    is_second = np.cumsum(split.labels == 1)
    split = split.where((split.labels == 0) | (is_second <= 2))  # 30 images and 2
    drawn = tap_choice.drawn(split, 6, seed=0)
    assert np.bincount(drawn.labels).tolist() == [5, 2]


def test_whole_batches_are_drawn_where_they_have_all_classes(smooth_folder, monkeypatch):
    from transfer import open_source

    monkeypatch.setattr(tap_choice, "EXTRACTION_BATCH", 6)
    split = open_source(image_folder=str(smooth_folder)).split("train")
    drawn = tap_choice.drawn(split, 24, seed=0)
    positions = np.flatnonzero(np.isin(split.ids, drawn.ids))
    assert positions.tolist() == [*range(6), *range(18, 24), *range(36, 42), *range(54, 60)]
