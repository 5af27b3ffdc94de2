"""Kill runs at random moments, resume them, and check that the results are bit-identical.

    python benchmarks/kill_and_resume.py --kills 20

Frozen, partial and full fine-tuning of the embedded model on the embedded digits alternate. Each
run has its own cache, so that runs are also killed during extraction. A run is killed with SIGKILL,
up to three times, and then resumed with the same command. Its weights, history and metrics must
equal those of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from commands import saved_values

CUTS = {"fc7": 40, "pool4": 4, "none": 3}  # epochs
COMMON = ("--dataset", "digits", "--early-stopping", "30", "--dropout", "0.2")


def command(out: Path, cut: str) -> list[str]:
    flags = ["--freeze-until", cut, "--epochs", str(CUTS[cut]), "--cache-dir", f"{out}-cache"]
    return [sys.executable, "-m", "recipes", "finetune", *COMMON, *flags, "--resume",
            "--out", str(out)]  # fmt: skip


def differences(whole: Path, other: Path) -> list[str]:
    """Names of variables, files and metrics that differ between two runs."""
    names = []
    before, after = saved_values(whole / "model"), saved_values(other / "model")
    names += [name for name in before if not np.array_equal(before[name], after[name])]
    if (whole / "history.csv").read_bytes() != (other / "history.csv").read_bytes():
        names.append("history.csv")
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (whole, other))
    first["train"].pop("epoch_s"), second["train"].pop("epoch_s")
    names += [part for part in ("eval", "train", "params") if first[part] != second[part]]
    return names


def state(out: Path) -> str:
    """The progress of a run when it was killed."""
    if not (out / "config.yaml").is_file():
        return "starting"
    history = out / "history.csv"
    epochs = len(history.read_text().splitlines()) - 1 if history.is_file() else -1
    if (out / "model.meta").is_file():
        return "evaluating"
    return "extracting or before" if epochs < 0 else f"after {epochs} epochs"


def kill_once(out: Path, cut: str, after_s: float) -> bool:
    """Start a run and kill it after some seconds; returns whether it was still running."""
    process = subprocess.Popen(
        command(out, cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    seconds = {}
    for cut in CUTS:
        start = time.perf_counter()
        subprocess.run(command(folder / f"whole-{cut}", cut), check=True, capture_output=True)
        seconds[cut] = time.perf_counter() - start
    rows, kills, trial = [], 0, 0
    while kills < options.kills:
        cut = list(CUTS)[trial % len(CUTS)]
        out = folder / f"{trial}-{cut}"
        moments = []
        for _ in range(generator.randint(1, 3)):
            after_s = generator.uniform(0, seconds[cut])
            if kill_once(out, cut, after_s):
                moments.append(f"{after_s:.1f} s ({state(out)})")
        kills += len(moments)
        done = subprocess.run(command(out, cut), capture_output=True, text=True, check=False)
        wrong = differences(folder / f"whole-{cut}", out) if done.returncode == 0 else [done.stderr]
        rows.append([cut, ", ".join(moments), "identical" if not wrong else f"differs: {wrong}"])
        print(*rows[-1], sep=" | ", flush=True)
        trial += 1
    print(tabulate(rows, ["cut", "killed after", "result"], tablefmt="github"))
    failed = sum(row[-1] != "identical" for row in rows)
    print(f"{kills} kills in {len(rows)} runs, {failed} of which gave different results")
    shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
