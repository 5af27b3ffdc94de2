"""The temperature of a trained classifier, from held-out images."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from commands import metrics, saved_values

from transfer import Head, evaluate, fine_tune, open_source
from transfer.finetuning.calibration import calibrate
from transfer.runs import run_folder


@pytest.fixture
def splits(smooth_folder):
    return open_source(image_folder=str(smooth_folder)).train_and_eval_splits()


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
    logits, labels = drawn(2.0, num_images=60)
    groups = np.arange(60) // 20
    groups[labels == labels[0]] = 0
    found = calibrate(new_head(), logits, labels, groups)
    assert found["cross_fitted"] != calibrate(new_head(), logits, labels)["cross_fitted"]
    assert "cross_fitted" not in calibrate(new_head(), logits, labels, np.zeros(60))


def test_finished_run_is_calibrated(model, splits, tmp_path, caplog):
    options = {"freeze_until": "pool2", "epochs": 2, "cache_dir": tmp_path / "cache"}
    plain = fine_tune(model, *splits, run_dir=tmp_path / "plain", **options)
    whole = fine_tune(model, *splits, run_dir=tmp_path / "whole", calibrate=True, **options)
    run_folder.write_json(plain.run_dir / run_folder.EVALUATION, plain.metrics["eval"])
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
