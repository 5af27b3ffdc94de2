import numpy as np
import pytest

from transfer.evaluation import plots


def block_counts(num_classes, size, seed=0):
    """Confusions mostly within groups of classes that are not neighbours; the group of each."""
    generator = np.random.default_rng(seed)
    group = generator.permutation(num_classes) // size
    counts = generator.poisson(2 * (group[:, None] == group))
    return counts + np.diag(np.full(num_classes, 30)), group


@pytest.mark.parametrize("num_classes", [60, 600], ids=["optimal", "plain"])
def test_similarity_order_puts_confused_classes_side_by_side(num_classes):
    counts, group = block_counts(num_classes, 10)
    order = plots.similarity_order(counts)
    assert sorted(order) == list(range(num_classes))
    assert (np.diff(group[order]) != 0).sum() == num_classes // 10 - 1  # no group is torn apart


def test_similarity_order_of_classes_that_are_never_confused_or_absent():
    for counts in (np.eye(50, dtype=int), np.zeros((50, 50), int)):
        assert sorted(plots.similarity_order(counts)) == list(range(50))


@pytest.mark.parametrize("num_classes", [2, 15, 40, 41, 200, 203, 1000])
def test_matrix_has_legible_names_and_cells(num_classes):
    counts, _ = block_counts(num_classes, 2)
    names = [f"class {number} {'x' * 50}" for number in range(num_classes)]
    title, text, figure = plots.confusion(names, counts)
    axes = figure.axes[0]
    assert title == "Confusion matrix"
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(shown) <= 40 and max(map(len, shown)) <= 24
    cells = axes.images[0].get_array()
    assert len(cells) <= 200
    np.testing.assert_allclose(cells.sum(1), 1)
    assert ("side by side" in text) == (num_classes > 40)
    if num_classes == 1000:
        assert "every 25th class is named. Each row and column are 5 classes." in text


def test_matrix_of_too_many_classes_is_not_plotted(monkeypatch):
    monkeypatch.setattr(plots, "_MAX_CLUSTERED", 50)
    assert plots.confusion(["x"] * 51, np.eye(51, dtype=int)) is None


def test_f1_is_plotted_if_not_all_classes_are():
    rows = [{"label": str(n), "f1": n / 100, "precision": 0.5, "recall": 0.5} for n in range(100)]
    assert plots.f1_of_classes(rows[:40]) is None
    _, text, _ = plots.f1_of_classes(rows)
    assert text == "Median 0.495; a tenth of the classes is below 0.099, a tenth above 0.891."
    title, text, _ = plots.classes(rows)
    assert title == "The 40 weakest classes" and text.startswith("Lowest F1: 0,")
