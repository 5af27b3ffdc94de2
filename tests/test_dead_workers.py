"""A worker of pytest-xdist is killed, as by the kernel when memory is exhausted, or hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, os, signal, time

def test_before():
    pass

def test_that_ends_its_worker():
    {how}
"""
WAYS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "killed, and a child holds its pipes": """
    if os.fork() == 0:
        time.sleep(300)
        os._exit(0)
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)""",
    "hangs where no signal of Python arrives": "ctypes.PyDLL(None).sleep(300)",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks are Unix")
@pytest.mark.slow_variants
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_run_fails_when_a_worker_dies_or_hangs(tmp_path: Path, how: str) -> None:
    (tmp_path / "test_it.py").write_text(PROGRAM.format(how=how))
    (tmp_path / "test_other.py").write_text("def test_other(): pass")
    log = tmp_path / "log.txt"
    flags = ["-p", "dead_workers", "-n", "2", "--dist", "loadfile", "--max-worker-restart", "0"]
    flags += ["-o", "faulthandler_timeout=5", "-o", "faulthandler_exit_on_timeout=true"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with log.open("w") as output:  # children of the worker may keep a pipe open
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *flags, "--rootdir", tmp_path, tmp_path],
            cwd=tmp_path,
            env={k: v for k, v in environment.items() if not k.startswith("PYTEST_")},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=280,
        )
    assert done.returncode != 0
    assert "test_it.py::test_that_ends_its_worker" in log.read_text()
