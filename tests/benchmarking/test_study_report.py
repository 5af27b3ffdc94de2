"""Statistics and files of a study, from synthetic runs."""

import csv

import numpy as np
import pytest
from scipy import stats

from transfer.benchmarking import study_report
from transfer.benchmarking.study import Outcome, Study


def outcome(shots, tap, seed, predictions, labels):
    accuracy = float((predictions == labels).mean())
    axes = {"shots_per_class": shots, "tap": tap, "seed": seed}
    return Outcome(axes, "name", accuracy, 1.0, 0.1, 2.0, 0.5, 1.0, None, predictions)


@pytest.fixture
def made_up():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    outcomes = []
    for shots, share in ((5, 0.5), (20, 0.8)):
        for tap in ("fc7", "pool4,pool5"):
            for seed in range(3):
                right = generator.random(60) < share + 0.1 * (tap != "fc7")
                outcomes.append(outcome(shots, tap, seed, np.where(right, labels, 3), labels))
    axes = {"shots_per_class": [5, 20], "tap": ["fc7", "pool4,pool5"], "seed": [0, 1, 2]}
    failures = [({"shots_per_class": 5, "tap": "fc7", "seed": 3}, "no memory")]
    return Study(axes, outcomes, failures, labels, None)


def test_pairs_equal_scipys_tests(made_up):
    tests = study_report.pairs(made_up)
    assert len(tests) == 6
    first, second = made_up.outcomes[:3], made_up.outcomes[3:6]
    expected = stats.ttest_rel([o.accuracy for o in first], [o.accuracy for o in second])
    assert tests[0]["p"] == pytest.approx(expected.pvalue)
    assert tests[0]["second"] == "shots_per_class=5 tap=pool4,pool5"
    right = [o.predictions == made_up.labels for o in (first[2], second[2])]
    only_first, only_second = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    mcnemar = stats.binomtest(only_first, only_first + only_second).pvalue
    assert tests[0]["mcnemar"][2] == pytest.approx(mcnemar)


def test_t_test_without_variance_is_not_significant():
    assert study_report.paired_t_test([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert study_report.paired_t_test([0.5, 0.6], [0.6, 0.7]) is None
    assert study_report.paired_t_test([0.5], [0.6]) is None


def test_holm_by_hand():
    assert study_report.holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]


def test_files_hold_a_row_per_run_and_a_row_per_combination(made_up, tmp_path):
    printed = study_report.write(tmp_path, made_up)
    assert "failed: shots_per_class 5, tap fc7, seed 3: no memory" in printed
    with (tmp_path / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 13
    assert runs[-1]["error"] == "no memory"
    assert float(runs[0]["accuracy"]) == made_up.outcomes[0].accuracy
    rows = printed.splitlines()[2:6]
    means = [np.mean([o.accuracy for o in made_up.outcomes[i : i + 3]]) for i in (0, 3, 6, 9)]
    deviations = [np.std([o.accuracy for o in made_up.outcomes[i : i + 3]], ddof=1) for i in (0, 9)]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[3] for row in cells] == [f"{mean:.4f}" for mean in means]
    assert [cells[0][4], cells[3][4]] == [f"{deviation:.4f}" for deviation in deviations]
    assert "pool4,pool5" in (tmp_path / "summary.tex").read_text()
    assert (tmp_path / "summary.md").read_text().startswith("| shots_per_class")
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_learning_curve_has_a_line_per_other_combination(made_up):
    rows = study_report.summarized(made_up)
    (axes,) = study_report.learning_curve(rows).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "tap fc7",
        "tap pool4,pool5",
    ]
    assert study_report.learning_curve(rows[:2]) is None
