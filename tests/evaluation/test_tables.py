import csv
import io

import numpy as np
import pytest
import sklearn.metrics

from transfer.core.csv_files import original, write_row
from transfer.evaluation import prediction, tables
from transfer.evaluation.image_scores import score_images


def sample(num_examples, num_classes):
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=(num_examples, num_classes)).astype(np.float32)
    labels = generator.integers(0, num_classes, num_examples)
    names = [f"=photos/{number}, a.png" for number in range(num_examples)]
    return logits, labels, names, [f"-class {number}" for number in range(num_classes)]


def predictions_of(path, logits, labels, names, classes):
    scores = score_images(logits, labels)
    tables.write_predictions(path, names, classes, logits, labels, scores)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("num_classes", [2, 3, tables.MAX_LISTED])
def test_streamed_predictions_equal_those_written_at_once(tmp_path, monkeypatch, num_classes):
    """The file of earlier versions, byte by byte."""
    monkeypatch.setattr(prediction, "_BLOCK", 4 * num_classes)  # 4 images at a time
    logits, labels, names, classes = sample(30, num_classes)
    predictions_of(tmp_path / "p.csv", logits, labels, names, classes)
    expected = io.StringIO(newline="")
    write_row(expected, ["image", "label", "prediction", *(f"p({name})" for name in classes)])
    for name, label, row in zip(names, labels, prediction.probabilities(logits), strict=True):
        cells = [classes[label], classes[row.argmax()], *(f"{p:.6g}" for p in row)]
        write_row(expected, [name, *cells])
    assert (tmp_path / "p.csv").read_bytes() == expected.getvalue().encode()


def test_with_many_classes_predictions_have_the_most_probable(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "_BLOCK", 1000)
    logits, labels, names, classes = sample(60, 200)
    rows = predictions_of(tmp_path / "p.csv", logits, labels, names, classes)
    p = prediction.probabilities(logits)
    order = np.argsort(-p, axis=-1, kind="stable")
    assert [original(row["image"]) for row in rows] == names
    for number, row in enumerate(rows):
        label = labels[number]
        assert original(row["label"]) == classes[label]
        assert row["label probability"] == f"{p[number, label]:.6g}"
        assert order[number, int(row["label rank"]) - 1] == label
        top = [row["prediction"], *(row[f"prediction {place}"] for place in range(2, 6))]
        assert [original(name) for name in top] == [classes[c] for c in order[number, :5]]
        ps = [row["probability"], *(row[f"probability {place}"] for place in range(2, 6))]
        assert ps == [f"{p[number, c]:.6g}" for c in order[number, :5]]
    assert "p(-class 0)" not in rows[0]


def test_confusion_equals_scikit_learn(tmp_path):
    logits, labels, _, classes = sample(500, 30)
    counts = prediction.confusion_matrix(logits, labels)
    tables.write_confusion(tmp_path / "c.csv", classes, counts)
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert [original(name) for name in header[1:]] == classes
    assert [original(row[0]) for row in rows] == classes
    expected = sklearn.metrics.confusion_matrix(labels, logits.argmax(-1))
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], int), expected)


def test_all_probabilities_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "_BLOCK", 700)
    logits, _, _, _ = sample(60, 200)
    tables.write_probabilities(tmp_path / "p.npy", logits)
    found = np.load(tmp_path / "p.npy", allow_pickle=False)
    np.testing.assert_array_equal(found, prediction.probabilities(logits).astype(np.float32))


def test_user_file_named_changes_csv_is_kept(tmp_path):
    path = tmp_path / "changes.csv"
    path.write_text("version,change\n1,mine\n")
    tables.remove_changes(path)
    assert path.read_text() == "version,change\n1,mine\n"
    path.unlink()
    tables.remove_changes(path)
    one, two = np.array([0, 1]), np.array([1, 1])
    tables.write_changes(path, ["a.jpg", "b.jpg"], ["blue", "red"], one, two, one)
    assert path.read_text().splitlines()[1:] == ["a.jpg,blue,blue,red"]
    tables.remove_changes(path)
    assert not path.exists()


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path):
    logits, labels, names, classes = sample(3, 2)
    names[1] = "caf\udce9.jpg"
    rows = predictions_of(tmp_path / "p.csv", logits, labels, names, classes)
    assert rows[1]["image"] == "caf\\udce9.jpg"
