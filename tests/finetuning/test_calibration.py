"""The temperature of a trained classifier, from held-out images."""

import shutil

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from commands import metrics, saved_values

from transfer import Head, evaluate, fine_tune, open_source
from transfer.evaluation.prediction import summarize
from transfer.finetuning.calibration import calibrate, report
from transfer.runs import run_folder
from transfer.training.ridge import fit_temperature


def drawn(factor, num_images=4000, num_classes=5):
    """Logits, and labels drawn from the probabilities of ``factor`` times these logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, [num_images, num_classes]).astype(np.float32)
    gumbel = rng.gumbel(size=logits.shape)
    return logits, (factor * logits + gumbel).argmax(-1)


def new_head(num_classes=5):
    head = Head(num_classes, seed=0)
    head.build((None, 3))
    return head


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_temperature_is_that_of_the_lowest_loss(factor):
    logits, labels = drawn(factor)
    head = new_head()
    before = head.classifier.kernel.numpy()
    found = calibrate(head, logits, labels)

    def loss(t):
        of_labels = scipy.special.log_softmax(t * logits, -1)[np.arange(len(labels)), labels]
        return -of_labels.mean()

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    assert found["temperature"] == pytest.approx(best, rel=0.02)
    assert found["temperature"] == pytest.approx(factor, rel=0.1)
    np.testing.assert_allclose(
        head.classifier.kernel.numpy(), before * found["temperature"], rtol=1e-6
    )
    assert found["before"]["loss"] == pytest.approx(loss(1.0), rel=1e-5)
    after = found["cross_fitted"]
    assert after["loss"] == pytest.approx(loss(best), rel=0.01)
    assert after["calibration_error"] < 0.03


def test_images_of_a_group_are_left_out_together():
    """The logits of one group are too large, those of the other too small."""
    logits, labels = drawn(1.0, num_images=400)
    groups = np.arange(400) % 2
    logits[groups == 0] *= 4
    logits[groups == 1] /= 4
    scaled = logits.copy()
    for group in (0, 1):
        mine = groups == group
        scaled[mine] *= fit_temperature(logits[~mine], labels[~mine], smoothing=0.0)[0]
    found = calibrate(new_head(), logits, labels, groups)["cross_fitted"]
    assert found["loss"] == pytest.approx(summarize(scaled, labels)["loss"], rel=1e-5)
    mixed = calibrate(new_head(), logits, labels)["cross_fitted"]
    assert found["loss"] > 2 * mixed["loss"]
    assert "cross_fitted" not in calibrate(new_head(), logits, labels, np.zeros(400))


def test_logits_must_be_finite():
    logits, labels = drawn(1.0, num_images=10)
    logits[3, 2] = np.inf
    with pytest.raises(ValueError, match="logits of held-out images are not finite"):
        calibrate(new_head(), logits, labels)


@pytest.fixture(scope="module")
def digits():
    return open_source("digits").train_and_eval_splits("train[:100]", "test[:100]")


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """A run that is too uncertain, and the options that it was given."""
    folder = tmp_path_factory.mktemp("plain")
    options = {"epochs": 10, "label_smoothing": 0.5, "cache_dir": folder / "cache"}
    return fine_tune("embedded", *digits, run_dir=folder / "run", **options), options


def test_finished_run_is_calibrated(plain, digits, tmp_path, caplog):
    plain, options = plain
    whole = fine_tune("embedded", *digits, run_dir=tmp_path / "whole", calibrate=True, **options)
    again = shutil.copytree(plain.run_dir, tmp_path / "again")
    (again / run_folder.EVALUATION).write_text("{")  # is not read
    (again / "export").mkdir()
    fine_tune("embedded", *digits, run_dir=again, resume=True, **options)
    assert "of the model before" not in caplog.text
    later = fine_tune("embedded", *digits, run_dir=again, calibrate=True, resume=True, **options)
    assert "predictions.csv and the models in export are of the model before" in caplog.text
    values = saved_values(tmp_path / "whole" / "model")
    assert all(
        np.array_equal(values[k], v) for k, v in saved_values(later.run_dir / "model").items()
    )
    found = metrics(whole.run_dir)["calibration"]
    assert metrics(later.run_dir)["calibration"] == found
    assert found["before"]["loss"] == plain.metrics["eval"]["loss"]
    np.testing.assert_allclose(
        whole.logits, plain.logits * found["temperature"], rtol=1e-4, atol=1e-5
    )
    assert whole.metrics["eval"]["loss"] < plain.metrics["eval"]["loss"]
    assert evaluate(whole.classifier, digits[1])["loss"] == whole.metrics["eval"]["loss"]
    # The temperature stays until it is removed explicitly.
    kept = fine_tune("embedded", *digits, run_dir=again, resume=True, **options)
    assert kept.metrics["calibration"] == found
    assert run_folder.read_config(again)["calibrate"] is True
    removed = fine_tune("embedded", *digits, run_dir=again, calibrate=False, resume=True, **options)
    assert "calibration" not in removed.metrics
    np.testing.assert_array_equal(removed.logits, plain.logits)


def test_solved_head_is_calibrated(digits, tmp_path):
    options = {"solver": "lbfgs", "lbfgs_c": 100.0, "cache_dir": tmp_path / "cache"}
    plain = fine_tune("embedded", *digits, run_dir=tmp_path / "plain", **options)
    found = fine_tune("embedded", *digits, run_dir=tmp_path / "run", calibrate=True, **options)
    assert "calibration" not in plain.metrics
    assert found.metrics["eval"]["accuracy"] == plain.metrics["eval"]["accuracy"]
    assert found.metrics["eval"]["loss"] < plain.metrics["eval"]["loss"]


def test_accurate_classifier_gets_the_minimum_of_its_loss():
    """Smoothed labels would make it less certain than its few errors ask for."""
    logits, labels = drawn(1.0, num_images=1000)
    logits *= 16
    rows = np.arange(len(labels))
    labels = logits.argmax(-1)
    labels[:10] = np.argsort(logits[:10], -1)[:, -2]  # 1 % of errors
    found = calibrate(new_head(), logits, labels)
    factors = found["temperature"] * np.linspace(0.9, 1.1, 21)
    losses = [
        -scipy.special.log_softmax(factor * logits.astype(np.float64), -1)[rows, labels].mean()
        for factor in factors
    ]
    assert np.argmin(losses) == 10
    assert found["fitted"] == found["temperature"]


@pytest.mark.parametrize("num_images", [2, 50])
def test_correct_predictions_stay_as_they_are(num_images, caplog):
    logits = np.full([num_images, 5], -2, np.float32)
    labels = np.arange(num_images) % 5
    logits[np.arange(num_images), labels] = 3
    head = new_head()
    before = head.classifier.kernel.numpy()
    found = calibrate(head, logits, labels)
    assert found["temperature"] == found["fitted"] == 1
    assert found["cross_fitted"] == found["before"]
    np.testing.assert_array_equal(head.classifier.kernel.numpy(), before)
    report(found, num_images)
    assert "all of them are classified correctly" in caplog.text


def test_temperature_that_does_not_help_other_images_is_not_applied(caplog):
    """One of two predictions is wrong: each image would get the temperature of the other."""
    logits = np.array([[2, 0], [1, 0]], np.float32)
    head = new_head(2)
    before = head.classifier.kernel.numpy()
    found = calibrate(head, logits, np.array([0, 1]))
    assert found["cross_fitted"]["loss"] >= found["before"]["loss"]
    assert found["temperature"] == 1 != found["fitted"]
    np.testing.assert_array_equal(head.classifier.kernel.numpy(), before)
    report(found, 2)
    assert "does not lower the log loss of others" in caplog.text
