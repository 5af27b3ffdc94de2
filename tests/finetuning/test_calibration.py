"""The temperature of a trained classifier, from held-out images."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from commands import metrics, saved_values

from transfer import Head, evaluate, fine_tune
from transfer.evaluation.prediction import summarize
from transfer.finetuning.calibration import calibrate
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
        scaled[mine] *= fit_temperature(logits[~mine], labels[~mine])[0]
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


def test_finished_run_is_calibrated(model, splits, tmp_path, caplog):
    options = {"freeze_until": "pool2", "epochs": 2, "cache_dir": tmp_path / "cache"}
    plain = fine_tune(model, *splits, run_dir=tmp_path / "plain", **options)
    whole = fine_tune(model, *splits, run_dir=tmp_path / "whole", calibrate=True, **options)
    (plain.run_dir / run_folder.EVALUATION).write_text("{")  # is not read
    fine_tune(model, *splits, run_dir=tmp_path / "plain", resume=True, **options)
    assert "of the model before" not in caplog.text
    later = fine_tune(
        model, *splits, run_dir=tmp_path / "plain", calibrate=True, resume=True, **options
    )
    assert "evaluation.json and predictions.csv are of the model before" in caplog.text
    values = saved_values(tmp_path / "whole" / "model")
    assert all(
        np.array_equal(values[k], v) for k, v in saved_values(later.run_dir / "model").items()
    )
    found = metrics(whole.run_dir)["calibration"]
    assert metrics(later.run_dir)["calibration"] == found
    assert found["before"]["loss"] == plain.metrics["eval"]["loss"]
    np.testing.assert_allclose(whole.logits, plain.logits * found["temperature"], rtol=1e-4)
    assert whole.metrics["eval"]["loss"] < plain.metrics["eval"]["loss"]
    assert evaluate(whole.classifier, splits[1])["loss"] == whole.metrics["eval"]["loss"]


def test_solved_head_is_calibrated(model, splits, tmp_path):
    options = {"solver": "ridge", "cache_dir": tmp_path / "cache"}
    plain = fine_tune(model, *splits, run_dir=tmp_path / "plain", **options)
    found = fine_tune(model, *splits, run_dir=tmp_path / "run", calibrate=True, **options)
    assert "calibration" not in plain.metrics
    assert found.metrics["eval"]["accuracy"] == plain.metrics["eval"]["accuracy"]
    assert found.metrics["eval"]["loss"] < plain.metrics["eval"]["loss"]
