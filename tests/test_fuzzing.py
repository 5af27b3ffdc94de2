"""Short runs of the fuzzers; ``python tests/fuzzing`` makes the long ones."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzzing")


def fuzz(*options):
    # A machine that runs tests may be busy with others: the long run looks for hangs.
    options = [*options, "--limit", "60"]
    command = [sys.executable, str(FUZZER), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    # The report says what went wrong, and how to try that one input again.
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


@pytest.mark.slow
def test_a_damaged_model_gives_a_result_or_a_clean_error():
    fuzz("--count", "110", "--wild", "none")


@pytest.mark.slow
def test_random_arguments_of_allowed_operations_crash_nothing():
    fuzz("--operations", "225", "--workers", "1")
