"""Runs with two replicas equal runs with one on the same batches: two logical CPUs of one process,
and two processes on the loopback interface."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from commands import largest_difference, metrics
from conftest import make_image_folder, save_vgg
from replicas import SCRIPT, WAIT_S, Process, start_workers

from recipes.cli import main
from transfer import Card
from transfer.runs.run_folder import read_history

SGD = ("--optimizer", "sgd", "--learning-rate", "0.01", "--clip-norm", "0.5")
RUNS = {
    "fc7": ("--freeze-until", "fc7", *SGD, "--class-weights", "balanced", "--views", "2"),
    # Before pool1: one worker caches activations with mixup, two workers do not.
    "schedule": ("--schedule", "fc7:1:0.01,pool1:3:0.001", "--early-stopping", "1"),
    "pool1": ("--freeze-until", "pool1", *SGD, "--weight-decay", "0.1", "--mixup", "0.4"),
    "none": ("--freeze-until", "none", *SGD, "--augment"),
    "lbfgs": ("--solver", "lbfgs", "--lbfgs-c", "1", "--calibrate"),
}
TOLERANCE = {"schedule": 1e-3, "lbfgs": 1e-3}  # Adam and lbfgs amplify rounding errors


def flags(root: Path, name: str, *more: object) -> list[str]:
    """Flags of a run. No dropout, which each replica draws itself. 160 training images in batches
    of 7, so that the replicas have different numbers of examples of a batch, and each of them has
    activations to cache, which are extracted 32 images at a time."""
    words = ["--model", root / "tiny", "--image-folder", root / "photos", "--feed", "keep_prob=1"]
    words += ["--batch-size", 7, *RUNS[name], *more]
    if "--epochs" not in words and "--schedule" not in words:
        words += ["--epochs", 1]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, and runs with one replica in ``one``."""
    root = tmp_path_factory.mktemp("strategies")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
    save_vgg(root / "tiny", card=card)
    make_image_folder(root / "photos", images_per_class=100)
    for name in RUNS:
        words = flags(root, name, "--out", root / "one" / name, "--strategy", "none")
        assert main(["finetune", *words]) == 0
    return root


def finished(*processes: Process) -> None:
    for process in processes:
        status, says = process.wait()
        assert status == 0, says


def as_json(root: Path, out: Path, *more: object, names: Iterable[str] = RUNS) -> str:
    return json.dumps([flags(root, name, "--out", out / name, *more) for name in names])


def assert_same_runs(root: Path, out: Path, names: Iterable[str] = RUNS) -> None:
    for name in names:
        one, two = root / "one" / name, out / name
        tolerance = TOLERANCE.get(name, 1e-5)
        assert largest_difference(one / "model", two / "model") < tolerance, name
        expected, found = read_history(one), read_history(two)
        assert expected.keys() == found.keys()
        for column in expected:
            np.testing.assert_allclose(
                found[column], expected[column], atol=tolerance, err_msg=f"{name} {column}"
            )
        for part in ("accuracy", "num_examples"):
            assert metrics(two)["eval"][part] == metrics(one)["eval"][part], name


@pytest.mark.slow
def test_two_devices_equal_one(root):
    out, names = root / "mirrored", ("pool1", "none", "lbfgs")  # from the cache, and without
    finished(Process(SCRIPT, "mirrored", as_json(root, out, "--cache", "memory", names=names)))
    assert_same_runs(root, out, names)


@pytest.mark.slow
def test_two_processes_equal_one(root):
    out = root / "workers"
    runs = as_json(root, out, "--cache-dir", root / "cache")
    finished(*start_workers(SCRIPT, "multi_worker", runs))
    assert_same_runs(root, out)
    # Each image is computed by one of the two.
    for name in ("fc7", "schedule"):
        found = metrics(out / name)["activations"]
        assert found == metrics(root / "one" / name)["activations"]


@pytest.mark.slow
def test_worker_stops_if_chief_fails(root):
    words = flags(root, "fc7", "--out", root / "one" / "fc7")
    chief, other = start_workers("-m", "recipes", "finetune", *words)
    status, says = chief.wait()
    assert status == 1
    assert "is not empty" in says.splitlines()[-1]
    status, says = other.wait()
    assert status == 1
    assert "another worker is gone" in says.splitlines()[-1]


def wait_for_epochs(run: Path, count: int, workers: list[Process]) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(read_history(run).get("epoch", ())) < count:
        if time.monotonic() > deadline or any(w.process.poll() is not None for w in workers):
            pytest.fail(f"no {count} epochs in {run}: {[worker.wait() for worker in workers]}")
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_worker_stops_if_other_is_killed_and_run_is_resumable(root, victim):
    out = root / f"killed-{victim}"

    def run(epochs: int) -> list[Process]:
        words = ["--epochs", epochs, "--out", out, "--resume", "--cache-dir", root / "cache"]
        return start_workers("-m", "recipes", "finetune", *flags(root, "fc7", *words))

    workers = run(epochs=5000)
    wait_for_epochs(out, 3, workers)
    workers[victim].process.kill()
    status, says = workers[1 - victim].wait()
    assert status == 1, says
    assert "another worker is gone" in says.splitlines()[-1]
    assert "--resume" in says.splitlines()[-1]
    workers[victim].wait()
    if victim == 1:  # the chief, which writes the folder, ended in order: the easier case
        return
    epochs = len(read_history(out)["epoch"]) + 2
    finished(*run(epochs))
    assert metrics(out)["train"]["epochs"] == epochs
    whole = root / "whole"
    assert main(["finetune", *flags(root, "fc7", "--epochs", epochs, "--out", whole)]) == 0
    assert largest_difference(whole / "model", out / "model") < 1e-4


@pytest.mark.slow
def test_signal_to_one_worker_stops_all_at_same_step(root):
    out = root / "stopped"
    words = flags(root, "fc7", "--epochs", 5000, "--out", out)
    workers = start_workers("-m", "recipes", "finetune", *words)
    wait_for_epochs(out, 2, workers)
    workers[1].process.terminate()
    for worker, expected in zip(workers, (130, 143), strict=True):
        status, says = worker.wait()
        assert status == expected, says
        assert "interrupted; resume with: vgg-transfer finetune" in says.splitlines()[-1]
