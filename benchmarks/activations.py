"""Time and memory of reading cached activations: opening them, and gathering one shuffled epoch.

    python benchmarks/activations.py [--rows 10000 100000 1000000] [--width 512] [--folder DIR]

Writes random rows to a cache, and reads them in a new process for each number of rows, in shuffled
batches. Files are in the page cache. Memory is the peak of the anonymous memory of the process,
minus that before the cache is opened; pages of memory-mapped files are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

from transfer.activations.cache import Cache

BATCH = 256
INTERVAL_S = 0.01
_AT_ONCE = 10_000


def ids(num_rows: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(0).bytes(16 * num_rows), "S16")


def memory_mb(field: str) -> float:
    """A field of this process's status on Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if field in line]
    return int(line.split()[1]) * 1024 / 1e6


def measure(folder: Path, num_rows: int, width: int) -> list[float]:
    """Seconds and CPU seconds to open, the same for each of two epochs, and peak memory in MB."""
    names, order = ids(num_rows), np.random.default_rng(1).permutation(num_rows)
    before = memory_mb("RssAnon")
    peak = [before]

    def sample() -> None:
        while True:
            peak[0] = max(peak[0], memory_mb("RssAnon"))
            time.sleep(INTERVAL_S)

    threading.Thread(target=sample, daemon=True).start()
    start, cpu = time.perf_counter(), time.process_time()
    entry = Cache(folder, 10**12).entry({"cut": "fc7"}, [width], "float32")
    absent = entry.missing(names)
    if absent.any():
        raise RuntimeError(f"{absent.sum()} rows are missing")
    rows = entry.read(names)
    opened, opened_cpu = time.perf_counter() - start, time.process_time() - cpu
    seconds = [opened, opened_cpu]
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        for first in range(0, num_rows, BATCH):
            rows[order[first : first + BATCH]]
        seconds += [time.perf_counter() - start, time.process_time() - cpu]
    return [*seconds, peak[0] - before]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--folder", type=Path, help="where the cache is written; deleted at the end"
    )
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.folder, options.measure, options.width)))
        return 0
    table = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            entry = Cache(Path(folder), 10**12).entry({"cut": "fc7"}, [options.width], "float32")
            names = ids(num_rows)
            for first in range(0, num_rows, _AT_ONCE):
                chunk = names[first : first + _AT_ONCE]
                generator = np.random.default_rng(first)
                entry.append(chunk, generator.random((len(chunk), options.width), np.float32))
            command = [sys.executable, __file__, "--folder", folder, "--measure", str(num_rows)]
            command += ["--width", str(options.width)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
        *seconds, memory = json.loads(result.stdout)
        table.append([f"{num_rows:,}", *(f"{value:.2f}" for value in seconds), f"{memory:,.0f}"])
    headers = ["rows", "open, s", "CPU s", "first epoch, s", "CPU s"]
    headers += ["second epoch, s", "CPU s", "peak memory, MB"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
