"""Statistics and files of a study, from synthetic runs."""

import csv
import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from transfer.benchmarking import study_report, study_tests
from transfer.benchmarking.learning_curve import MAX_LINES, learning_curve
from transfer.benchmarking.study_results import Outcome, Study, summarized
from transfer.evaluation.metrics import compare


def outcome(shots, tap, seed, predictions, labels, **values):
    accuracy = float((predictions == labels).mean())
    axes = {"shots_per_class": shots, "tap": tap, "seed": seed}
    made = Outcome(axes, "name", accuracy, 1.0, 0.1, 2.0, 0.5, 1.0, None, predictions)
    return dataclasses.replace(made, **values)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
    tests = study_tests.pairs(made_up)
    labels = [(test["first"], test["second"]) for test in tests]
    names = "shots_per_class={0} tap=fc7", "shots_per_class={0} tap=pool4,pool5"
    assert labels == [tuple(name.format(shots) for name in names) for shots in (5, 20)]
    first, second = made_up.outcomes[:3], made_up.outcomes[3:6]
    expected = stats.ttest_rel([o.accuracy for o in first], [o.accuracy for o in second])
    assert tests[0]["p"] == pytest.approx(expected.pvalue)
    right = [o.predictions == made_up.labels for o in (first[2], second[2])]
    only_first, only_second = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    mcnemar = stats.binomtest(only_first, only_first + only_second).pvalue
    assert tests[0]["mcnemar"][2] == pytest.approx(mcnemar)


def test_t_test_without_variance_is_not_significant():
    assert study_tests.paired_t_test([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert study_tests.paired_t_test([0.5, 0.6], [0.6, 0.7]) is None
    assert study_tests.paired_t_test([0.5], [0.6]) is None


def test_holm_by_hand():
    assert study_tests.holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]


def test_pairs_are_adjusted_within_the_same_number_of_images(made_up):
    labels, taps = made_up.labels, ("fc7", "pool4", "pool5")
    generator = np.random.default_rng(1)
    outcomes = [
        outcome(shots, tap, seed, np.where(generator.random(60) < 0.7, labels, 3), labels)
        for shots in (5, 20)
        for tap in taps
        for seed in range(3)
    ]
    axes = {"shots_per_class": [5, 20], "tap": [*taps], "seed": [0, 1, 2]}
    tests = study_tests.pairs(Study(axes, outcomes, [], labels, None))
    assert len(tests) == 6
    for same in (tests[:3], tests[3:]):
        assert study_tests.holm([test["p"] for test in same]) == [it["p_holm"] for it in same]


def test_mcnemar_of_groups_equals_that_of_evaluate_and_is_limited(made_up, monkeypatch, tmp_path):
    groups = np.arange(60) // 3
    grouped = dataclasses.replace(made_up, groups=groups)
    test = study_tests.pairs(grouped)[0]
    first, second = made_up.outcomes[0], made_up.outcomes[3]
    expected = compare(first.predictions, second.predictions, made_up.labels, groups)["p_value"]
    assert test["mcnemar"][0] == pytest.approx(expected)
    monkeypatch.setattr(study_tests, "MAX_GROUP_TESTS", 5)
    assert study_tests.pairs(grouped)[0]["mcnemar"] == {}
    assert "McNemar's tests are left out" in study_report.write(tmp_path, grouped)
    assert study_tests.pairs(made_up)[0]["mcnemar"] != {}


def test_files_hold_a_row_per_run_and_a_row_per_combination(made_up, tmp_path):
    printed = study_report.write(tmp_path, made_up)
    assert "failed: shots_per_class 5, tap fc7, seed 3: no memory" in printed
    runs = rows_of(tmp_path / "runs.csv")
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


def test_best_row_is_that_with_the_same_number_of_images(made_up, tmp_path):
    printed = study_report.write(tmp_path, made_up)
    p_values = [row.strip("|").split("|")[-1].strip() for row in printed.splitlines()[2:6]]
    assert p_values.count("best") == 2
    assert {"best"} < {*p_values[:2]} and {"best"} < {*p_values[2:]}


def test_runs_without_results_are_in_all_tables(made_up, tmp_path):
    """A combination that failed, or that is not applicable, is not left out."""
    outcomes = [run for run in made_up.outcomes if run.axes["tap"] == "fc7"][:3]
    failures = [({"shots_per_class": 20, "tap": "fc7", "seed": 0}, "no memory")]
    skipped = [
        ({"shots_per_class": shots, "tap": "pool4,pool5", "seed": seed}, "excluded")
        for shots in (5, 20)
        for seed in (0, 1)
    ]
    wanted = dataclasses.replace(made_up, outcomes=outcomes, failures=failures, skipped=skipped)
    printed = study_report.write(tmp_path, wanted)
    text = (tmp_path / "summary.md").read_text()
    assert text.splitlines()[0].split()[1:4] == ["shots_per_class", "|", "tap"]
    for written in (printed, text, (tmp_path / "summary.tex").read_text()):
        assert "failed: shots_per_class 20, tap fc7, seed 0: no memory" in written
        assert written.count("not applicable: shots_per_class 5, tap pool4,pool5: excluded") == 1
    cells = [[it.strip() for it in row.strip("|").split("|")] for row in text.splitlines()[2:6]]
    assert [(row[2], row[-1]) for row in cells] == [
        ("3", ""),
        ("0", "not applicable"),
        ("0", "failed"),
        ("0", "not applicable"),
    ]
    errors = [row["error"] for row in rows_of(tmp_path / "runs.csv")]
    assert errors == ["", "", "", "no memory", *["not applicable: excluded"] * 4]
    assert [row["n"] for row in rows_of(tmp_path / "summary.csv")] == ["3", "0", "0", "0"]


def test_summary_csv_has_means_and_accuracies_per_seed(made_up, tmp_path):
    outcomes = [dataclasses.replace(it, peak_mb=900.0 + n) for n, it in enumerate(made_up.outcomes)]
    study_report.write(tmp_path, dataclasses.replace(made_up, outcomes=outcomes))
    rows = rows_of(tmp_path / "summary.csv")
    assert [(row["shots_per_class"], row["tap"]) for row in rows[:2]] == [
        ("5", "fc7"),
        ("5", "pool4,pool5"),
    ]
    accuracies = [run.accuracy for run in outcomes[:3]]
    assert [float(rows[0][f"accuracy_seed_{seed}"]) for seed in range(3)] == accuracies
    assert float(rows[0]["accuracy_sd"]) == pytest.approx(np.std(accuracies, ddof=1))
    assert (float(rows[0]["peak_mb_mean"]), float(rows[0]["peak_mb_sd"])) == (901.0, 1.0)


def test_csv_files_have_columns_of_axes_and_of_used_options(made_up, tmp_path):
    used = {"learning_rate": 0.006, "epochs": 12}
    outcomes = [dataclasses.replace(it, used=used) for it in made_up.outcomes]
    study_report.write(tmp_path, dataclasses.replace(made_up, outcomes=outcomes))
    run = rows_of(tmp_path / "runs.csv")[0]
    assert (run["used_learning_rate"], run["used_epochs"]) == ("0.006", "12")
    test = rows_of(tmp_path / "tests.csv")[1]
    assert (test["a_tap"], test["b_tap"]) == ("fc7", "pool4,pool5")
    assert (test["a_shots_per_class"], test["b_shots_per_class"]) == ("20", "20")


def test_huge_and_unknown_losses_are_readable(made_up, tmp_path):
    outcomes = [
        dataclasses.replace(it, log_loss=None if it.axes["tap"] == "fc7" else 1e32)
        for it in made_up.outcomes
    ]
    printed = study_report.write(tmp_path, dataclasses.replace(made_up, outcomes=outcomes))
    losses = [row.strip("|").split("|")[5].strip() for row in printed.splitlines()[2:6]]
    assert losses == ["", "1e+32", "", "1e+32"]


def test_stale_learning_curve_is_deleted(made_up, tmp_path):
    study_report.write(tmp_path, made_up)
    assert (tmp_path / "learning_curve.pdf").is_file()
    (tmp_path / "mine.png").touch()
    fewer = dataclasses.replace(made_up, outcomes=made_up.outcomes[:6], failures=[])
    study_report.write(tmp_path, fewer)
    assert [path.name for path in tmp_path.glob("*.p??")] == ["mine.png"]


def test_learning_curve_has_a_line_per_other_combination(made_up):
    rows = summarized(made_up)
    figure = learning_curve(rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tap fc7", "tap pool4,pool5"]
    assert figure.axes[0].get_title() == "mean and standard deviation over 3 seeds"
    assert learning_curve(rows[:2]) is None


def test_runs_on_all_images_are_at_their_mean_number_per_class(made_up):
    outcomes = [
        dataclasses.replace(it, axes={**it.axes, "shots_per_class": None}, images_per_class=37.5)
        if it.axes["shots_per_class"] == 20
        else it
        for it in made_up.outcomes
    ]
    axes = made_up.axes | {"shots_per_class": [5, None]}
    wanted = dataclasses.replace(made_up, axes=axes, outcomes=outcomes)
    (curve,) = learning_curve(summarized(wanted)).axes
    assert [label.get_text() for label in curve.get_xticklabels()] == ["all (38)", "5"]
    assert sorted(curve.lines[0].get_xdata()) == [5, 37.5]
    # Of a run whose number of images is unknown, as one of an earlier version.
    unknown = [dataclasses.replace(it, images_per_class=None) for it in outcomes[6:9]]
    later = [*made_up.outcomes, *unknown]
    axes["shots_per_class"] = [5, 20, None]
    wanted = dataclasses.replace(made_up, axes=axes, outcomes=later)
    (curve,) = learning_curve(summarized(wanted)).axes
    assert curve.get_title().endswith("; without runs on all images")


@pytest.mark.filterwarnings("error")
def test_learning_curve_of_many_lines_shows_the_best(made_up, tmp_path):
    labels = made_up.labels
    outcomes = [
        outcome(shots, f"t{tap}", 0, np.where(np.arange(60) < tap, labels, 3), labels)
        for tap in range(60)
        for shots in (5, 20)
    ]
    axes = {"shots_per_class": [5, 20], "tap": [f"t{tap}" for tap in range(60)], "seed": [0]}
    figure = learning_curve(summarized(Study(axes, outcomes, [], labels, None)))
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "curve.png")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"tap t{tap}" for tap in range(60 - MAX_LINES, 60)]
    assert figure.axes[0].get_title() == "one seed; the 12 best of 60 lines"
    lines = [bars.lines[0] for bars in figure.axes[0].containers]
    styles = {(line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(styles) == MAX_LINES
