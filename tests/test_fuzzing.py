"""Short runs of the fuzzers; ``python tests/fuzzing`` is for long runs."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzzing")


def fuzz(*options):
    # The machine may be busy with other tests, so the time limit is high; long runs detect hangs.
    options = [*options, "--limit", "60"]
    command = [sys.executable, str(FUZZER), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    # The report names the failures, and the command that repeats an input.
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


@pytest.mark.slow
def test_damaged_models_give_result_or_clean_error():
    fuzz("--count", "45", "--wild", "none", "--workers", "1")


@pytest.mark.slow
def test_random_operation_arguments_do_not_crash():
    fuzz("--operations", "125", "--workers", "1")
