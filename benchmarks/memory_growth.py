"""Peak memory of a run as a function of the number of training images; it should be constant.

    python benchmarks/memory_growth.py --data-dir DIR [--images 1000] [--plot docs/memory.svg]

For each cut, fine-tunes on ``--images`` images of ``tiny_imagenet`` and on 4 and 16 times as many,
and samples the memory of the process. The result is anonymous memory. Memory-mapped files, such as
cached activations, are resident until the system evicts them; resident memory is shown in brackets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from tabulate import tabulate

CUTS = ("fc7", "pool4", "none")
TIMES = (1, 4, 16)
INTERVAL_S = 0.05


def peak_mb(out: Path, cut: str, data_dir: Path, num_images: int) -> tuple[float, float]:
    """Peak anonymous and peak resident memory of a run, in MB of 1e6 bytes."""
    words = ["finetune", "--dataset", "tiny_imagenet", "--data-dir", data_dir, "--epochs", "1"]
    words += ["--train-split", f"train[:{num_images}]", "--eval-split", "validation[:500]"]
    words += ["--freeze-until", cut, "--out", out, "--cache-dir", out.with_suffix(".cache")]
    with (out.with_suffix(".log")).open("w") as log:
        process = psutil.Popen(
            [sys.executable, "-m", "recipes", *map(str, words)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        anonymous = resident = 0
        while process.poll() is None:
            memory = process.memory_info()
            anonymous = max(anonymous, memory.rss - memory.shared)
            resident = max(resident, memory.rss)
            try:
                process.wait(INTERVAL_S)
            except psutil.TimeoutExpired:
                continue
    if process.returncode:
        raise RuntimeError(out.with_suffix(".log").read_text()[-2000:])
    return anonymous / 1e6, resident / 1e6


def plot(path: Path, sizes: list[int], peaks: dict[str, list[tuple[float, float]]]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for cut, colour in zip(peaks, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        anonymous, resident = zip(*peaks[cut], strict=True)
        axes.plot(sizes, anonymous, "o-", color=colour, label=f"frozen until {cut}")
        axes.plot(sizes, resident, "o:", color=colour, linewidth=1, markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, None)
    axes.set_xlabel("training images")
    axes.set_ylabel("peak memory, MB\n(dotted: with memory-mapped files)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    sizes = [times * options.images for times in TIMES]
    peaks: dict[str, list[tuple[float, float]]] = {cut: [] for cut in CUTS}
    with tempfile.TemporaryDirectory() as folder:
        for cut in CUTS:
            for size in sizes:
                out = Path(folder, f"{cut}-{size}")
                peaks[cut].append(peak_mb(out, cut, options.data_dir, size))
                print(cut, size, *peaks[cut][-1], file=sys.stderr)
    rows = [
        [cut, *(f"{anonymous:,.0f} ({resident:,.0f})" for anonymous, resident in peaks[cut])]
        for cut in CUTS
    ]
    headers = ["frozen until", *(f"{size:,} images" for size in sizes)]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    if options.plot is not None:
        plot(options.plot, sizes, peaks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
