"""Measure time and memory of a run; package versions; progress bars."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import psutil

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


class Clock:
    """Wall time per stage: ``with clock("train_s"): ...``; ``seconds["total_s"]`` is the total."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

    @property
    def seconds(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {k: round(v, 3) for k, v in (self._seconds | {"total_s": total}).items()}


def rate(count: float, seconds: float) -> float:
    """Count per second; 0 if ``seconds`` is 0."""
    return round(count / seconds, 1) if seconds else 0.0


def usual(seconds: Sequence[float]) -> float | None:
    """Median duration, without the first one, which includes compilation, unless it is the only
    one."""
    return round(statistics.median(seconds[1:] or seconds), 4) if seconds else None


def sgemm_gflops(size: int = 3072, repeat: int = 3) -> float:
    """Throughput of float32 matrix products in GFLOPS: NumPy's BLAS, best of ``repeat`` runs."""
    import numpy as np

    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    return round(2e-9 * size**3 / best_seconds(lambda: matrix @ matrix, repeat), 1)


def best_seconds(work: Callable[[], Any], repeat: int = 3) -> float:
    """Shortest wall time in seconds, after a first call: noise only adds time."""
    work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_rss_mb() -> float:
    """Peak resident set size of this process, in MB of 1e6 bytes."""
    process = psutil.Process().memory_info()
    if hasattr(process, "peak_wset"):  # Windows
        return round(process.peak_wset / 1e6, 1)
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def reset_peak_rss() -> bool:
    """Start to measure ``peak_rss_mb`` anew, from the memory in use now.

    Returns:
        Whether the system can: Linux does (proc(5), ``clear_refs``).
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def num_cpus() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_mb() -> float:
    """Available memory, in MB of 1e6 bytes."""
    return psutil.virtual_memory().available / 1e6


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    packages = (
        "vgg-transfer",
        "tensorflow",
        "keras",
        "tensorflow-datasets",
        "numpy",
        "scikit-learn",
    )
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def git_revision() -> dict[str, Any] | None:
    """Commit of the Git repository in the working folder, and whether tracked files were changed;
    ``None`` outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        # The folder may be a stranger's: no program that its configuration names is run.
        names = git("config", "--name-only", "--list").splitlines()
        filters = {name.rpartition(".")[0] for name in names if name.startswith("filter.")}
        values = {f"{kind}.{key}": "" for kind in filters for key in ("clean", "process")}
        values |= {f"{kind}.required": "false" for kind in filters} | {"core.fsmonitor": "false"}
        settings = [word for name, value in values.items() for word in ("-c", f"{name}={value}")]
        status = ("status", "--porcelain", "-uno", "--ignore-submodules")
        return {"commit": commit, "changed": bool(git(*settings, *status))}
    except (OSError, subprocess.SubprocessError):
        return None


def progress(batches: Iterable[Any], description: str, unit: str = "batch") -> Iterable[Any]:
    """Iterate over the batches with a progress bar on standard error, or with a log line every
    10 seconds if that is not a terminal (a file, a batch job)."""
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return _logged(batches, description, unit)
    from tqdm.auto import tqdm

    return tqdm(batches, desc=description, unit=unit, file=sys.stderr, mininterval=1.0, leave=False)


def _logged(batches: Iterable[Any], description: str, unit: str) -> Iterator[Any]:
    total = f" of {len(batches):,}" if isinstance(batches, Sized) else ""
    said = time.monotonic()
    for number, batch in enumerate(batches, 1):
        yield batch
        if time.monotonic() - said >= _LOG_INTERVAL_S:
            said = time.monotonic()
            logger.info(f"{description}: {unit} {number:,}{total}")
