"""Runs with two replicas do what one does with the same batches: two logical CPUs of a process,
and two processes on the loopback interface."""

import time
from pathlib import Path

import numpy as np
import pytest
from commands import finetune, largest_difference, metrics
from conftest import make_image_folder, save_vgg
from replicas import SCRIPT, WAIT_S, Process, start_workers

from recipes.run_folder import read_history
from transfer import Card

CUTS = ("fc7", "pool1", "none")


def flags(root: Path, epochs: int = 3) -> list[str]:
    # No dropout: each replica draws its own. 20 training images in batches of 6: one
    # of the two has nothing of the last batch.
    words = ["--model", root / "tiny", "--image-folder", root / "photos", "--feed", "keep_prob=1"]
    words += ["--batch-size", 6, "--epochs", epochs, "--clip-norm", 0.5, "--optimizer", "sgd"]
    words += ["--class-weights", "balanced", "--learning-rate", 0.01]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, and a run of one replica for each cut in ``one``."""
    root = tmp_path_factory.mktemp("strategies")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
    save_vgg(root / "tiny", card=card)
    make_image_folder(root / "photos", images_per_class=13)
    for cut in CUTS:
        words = flags(root)[4:]
        assert finetune(root / "one" / cut, root / "tiny", root / "photos", *words,
                        "--freeze-until", cut, "--strategy", "none") == 0  # fmt: skip
    return root


def finished(*processes: Process) -> None:
    for process in processes:
        status, says = process.wait()
        assert status == 0, says


def assert_same_runs(one: Path, two: Path) -> None:
    assert largest_difference(one / "model", two / "model") < 1e-5
    expected, found = read_history(one), read_history(two)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
    for part in ("accuracy", "num_examples"):
        assert metrics(two)["eval"][part] == metrics(one)["eval"][part]
    # Each image by one of the two.
    assert metrics(two)["activations"]["computed"] == metrics(one)["activations"]["computed"]


def test_two_devices_do_what_one_does(root):
    out = root / "mirrored"
    finished(Process(SCRIPT, "mirrored", out, ",".join(CUTS), *flags(root), "--cache", "memory"))
    for cut in CUTS:
        assert_same_runs(root / "one" / cut, out / cut)


def test_two_processes_do_what_one_does(root):
    out = root / "workers"
    cache = ["--cache-dir", root / "cache"]
    finished(*start_workers(SCRIPT, "multi_worker", out, ",".join(CUTS), *flags(root), *cache))
    for cut in CUTS:
        assert_same_runs(root / "one" / cut, out / cut)


def test_mixup_pairs_the_same_examples(root):
    words = ["--mixup", "0.4", "--freeze-until", "fc7"]
    assert finetune(root / "one-mixup" / "fc7", root / "tiny", root / "photos", *flags(root)[4:],
                    *words) == 0  # fmt: skip
    out = root / "workers-mixup"
    finished(*start_workers(SCRIPT, "multi_worker", out, "fc7", *flags(root), "--mixup", "0.4"))
    assert largest_difference(root / "one-mixup/fc7/model", out / "fc7/model") < 1e-5


def wait_for_epochs(run: Path, count: int, workers: list[Process]) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(read_history(run).get("epoch", ())) < count:
        if time.monotonic() > deadline or any(w.process.poll() is not None for w in workers):
            pytest.fail(f"no {count} epochs in {run}: {[worker.wait() for worker in workers]}")
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_worker_is_killed_the_other_stops_and_the_run_can_be_resumed(root, victim):
    out = root / f"killed-{victim}"

    def run(epochs: int) -> list[Process]:
        words = [*flags(root, epochs), "--out", out, "--resume", "--cache-dir", root / "cache"]
        return start_workers("-m", "recipes.cli", "finetune", *words)

    workers = run(epochs=5000)
    wait_for_epochs(out, 3, workers)
    workers[victim].process.kill()
    status, says = workers[1 - victim].wait()
    assert status == 1, says
    assert "another worker is gone" in says.splitlines()[-1]
    assert "--resume" in says.splitlines()[-1]
    workers[victim].wait()
    epochs = len(read_history(out)["epoch"]) + 2
    finished(*run(epochs))
    assert metrics(out)["train"]["epochs"] == epochs
    whole = root / f"whole-{victim}"
    words = flags(root, epochs)[4:]
    assert finetune(whole, root / "tiny", root / "photos", *words) == 0
    assert largest_difference(whole / "model", out / "model") < 1e-4


def test_a_signal_to_one_worker_stops_both_at_one_step(root):
    out = root / "stopped"
    words = [*flags(root, 5000), "--out", out]
    workers = start_workers("-m", "recipes.cli", "finetune", *words)
    wait_for_epochs(out, 2, workers)
    workers[1].process.terminate()
    for worker, expected in zip(workers, (130, 143), strict=True):
        status, says = worker.wait()
        assert status == expected, says
        assert "interrupted; go on with: vgg-transfer finetune" in says.splitlines()[-1]
