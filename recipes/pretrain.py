"""Train a VGG from scratch and save it as a meta graph with its checkpoint and card.

The embedded model was made with

    vgg-transfer pretrain --dataset tiny_imagenet --data-dir DIR --licence MIT \
        --epochs 27 --small-epochs 14 --small-size 44 --fc-epochs 5

which takes about two hours on two cores. Its card records its accuracy.
"""

# No `from __future__ import annotations`: the options' types are looked up in this module.
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from recipes import console
from recipes.flag_values import options_of, words_of
from recipes.image_flags import SplitFlags
from recipes.startup import job
from transfer.vgg.pretraining_options import PretrainOptions


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(SplitFlags, PretrainOptions):
    """Flags of ``vgg-transfer pretrain``, with their defaults."""

    dataset: str = "tiny_imagenet"
    """Name of a tfds dataset."""
    out: Path | None = None
    """Run folder; the model is written there, named after its architecture.
    [default: runs/DATE-TIME-DATASET-ARCH]"""
    resume: bool = False
    """Continue the interrupted run in --out after its last complete epoch."""


def pretrain(config: PretrainConfig = PretrainConfig()) -> int:
    """Train a VGG from scratch and save it as a meta graph."""
    with job():
        from transfer.evaluation.metrics_text import describe_accuracy
        from transfer.runs import run_data, run_folder
        from transfer.vgg import pretraining_run

        options = options_of(PretrainOptions, config)
        with console.resumable("pretrain"):
            pretraining_run.check(options)
            if config.out is not None or config.resume:
                run_folder.check(config.out, resume=config.resume)
            if config.image_folder or config.csv:
                config = replace(config, dataset="")
            source = config.open()
            train, held_out = run_data.splits(
                source,
                config.train_split,
                config.eval_split,
                resumed=config.out if config.resume else None,
                progress=console.decoding,
            )
            result = pretraining_run.pretrain(
                train,
                held_out,
                options,
                run_dir=config.out,
                resume=config.resume,
                origin={name: getattr(config, name) or None for name in _IMAGES},
                source=_command(config),
                verbose=console.verbosity(),
            )
    print(describe_accuracy(result.metrics, "held-out images"))
    print(result.prefix)
    return 0


_IMAGES = (
    *("dataset", "data_dir", "image_folder", "csv", "group_by"),
    *("train_split", "eval_split"),
)


def _command(config: PretrainConfig) -> str:
    """The command that reproduces the model, without machine-specific paths."""
    left_out = ("data_dir", "out", "resume", "licence")
    names = dict.fromkeys(["arch", *_IMAGES, *vars(config)])
    flags = {name: getattr(config, name) for name in names if name not in left_out}
    flags |= {name: Path(flags[name] or "").name or None for name in ("image_folder", "csv")}
    flags["dataset"] = config.dataset or None
    return shlex.join(["vgg-transfer", "pretrain", *words_of(flags)])
