"""A short run of the fuzzer on models made here; ``python tests/fuzzing`` is the long one."""

import subprocess
import sys
from pathlib import Path

FUZZER = Path(__file__).with_name("fuzzing")


def test_a_damaged_model_gives_a_result_or_a_clean_error():
    # A machine that runs tests has other things to do, too: hangs are told by the long run.
    options = ["--count", "110", "--wild", "none", "--limit", "60"]
    command = [sys.executable, str(FUZZER), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    # The report says what went wrong, and how to try that one input again.
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
