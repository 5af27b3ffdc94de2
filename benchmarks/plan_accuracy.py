"""Whether runs take the time, and reach the accuracy, that ``vgg-transfer plan`` forecasts.

    python benchmarks/plan_accuracy.py --dataset digits --shots 5 20 all --cuts pool4 none

For each number of images per class and each seed, a forecast is made and the recommended run done:
a head on the best tap. For the first seed, runs of the same tap follow with the cuts given.
"Within" says whether the accuracy on the held-out images is in the interval of the forecast; the
ratio is the ``total_s`` of the run relative to the forecast. Times need an otherwise idle machine.
With ``--trial-minutes`` the forecast tries full fine-tuning as well, and what it gains over the
head is shown beside the gain of the run with the cut ``none``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

from transfer import fine_tune, load_meta_graph, open_source
from transfer.data.dataset import Split
from transfer.finetuning.forecast import Forecast, forecast, with_trial
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.models.meta_graph import MetaGraph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--image-folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--shots", nargs="+", default=["5", "20", "all"], help="images per class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cuts", nargs="*", default=["pool4", "none"], help="runs to time as well")
    parser.add_argument("--tap", default="auto", help="tap of the runs with --cuts")
    parser.add_argument("--trial-minutes", type=float, default=0.0)
    arguments = parser.parse_args()

    graph = load_meta_graph(arguments.model)
    if arguments.image_folder is None:
        source = open_source(arguments.dataset, data_dir=arguments.data_dir)
    else:
        source = open_source(image_folder=arguments.image_folder)
    splits = source.train_and_eval_splits()
    accuracies: list[list[object]] = []
    times: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shots in arguments.shots:
            for seed in range(arguments.seeds):
                options: dict[str, Any] = {"seed": seed, "cache_dir": Path(folder, "cache")}
                if shots != "all":
                    options["shots_per_class"] = int(shots)
                cuts = arguments.cuts if seed == 0 else []
                if cuts:  # activations of a cut that others have computed would save time
                    options["cache_dir"] = Path(folder, f"cache-{shots}")
                compare(graph, splits, options, arguments, cuts, Path(folder), accuracies, times)
    within = sum(row[-1] == "yes" for row in accuracies)
    print(
        tabulate(accuracies, ["per class", "seed", "tap", "forecast", "interval", "run", "within"])
    )
    print(f"{within} of {len(accuracies)} within the interval\n")
    print(tabulate(times, ["per class", "seed", "cut", "forecast s", "run s", "ratio"]))
    return 0


def compare(
    graph: MetaGraph,
    splits: tuple[Split, Split],
    options: dict[str, Any],
    arguments: argparse.Namespace,
    cuts: list[str],
    folder: Path,
    accuracies: list[list[object]],
    times: list[list[object]],
) -> None:
    """Append the rows of a forecast and of its runs."""
    name = [options.get("shots_per_class", "all"), options["seed"]]

    def plan(tap: str, trial_minutes: float = 0.0) -> Forecast:
        request = RunRequest(graph, *splits, FineTuneOptions(**options, tap=tap))
        return with_trial(forecast(request), request, trial_minutes)

    def run(result: Forecast, cut: str) -> float:
        given = {**options, "tap": result.choice.best.tap}
        if cut != "tap":  # as the forecast: what is trained is trained by gradient descent
            given["freeze_until"] = cut
        metrics = fine_tune(graph, *splits, run_dir=folder / "run", **given).metrics
        shutil.rmtree(folder / "run")
        costs = {cost.cut: cost.total_s for cost in result.costs}
        predicted = costs[metrics["cut"]]
        taken = metrics["time"]["total_s"]
        times.append([*name, cut, f"{predicted:.1f}", f"{taken:.1f}", f"{taken / predicted:.2f}"])
        print(*times[-1], flush=True)
        return float(metrics["eval"]["accuracy"])

    result = plan("auto", arguments.trial_minutes if "none" in cuts else 0.0)
    trial = result.trial
    low, high = result.choice.nested_interval
    accuracy = run(result, "tap")
    accuracies.append(
        [
            *name,
            result.choice.best.tap,
            f"{result.choice.nested:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{accuracy:.3f}",
            "yes" if low <= accuracy <= high else "no",
        ]
    )
    print(*accuracies[-1], flush=True)
    if cuts and arguments.tap != "auto":
        result = plan(arguments.tap)
    for cut in cuts:
        with_cut = run(result, cut)
        if cut == "none" and trial is not None:
            low, high = trial.interval
            print(
                f"gain of full fine-tuning: trial {trial.gain:+.3f} ({low:+.3f} to {high:+.3f}), "
                f"run {with_cut - accuracy:+.3f}"
            )


if __name__ == "__main__":
    sys.exit(main())
