"""What ``vgg-transfer finetune`` does; its flags are in ``recipes.finetune``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from recipes import interruption, measure, run_data, run_folder
from recipes.finetune import FinetuneConfig, cut_of
from recipes.finetune_inputs import Inputs
from recipes.finetune_setup import Job, prepare, write_down
from recipes.finetune_solver import StageSolver
from recipes.finetune_training import Progress, StageTrainer
from recipes.interruption import Signals
from transfer import Card, Classifier
from transfer.card import read_card, write_card
from transfer.distribution import Replicas
from transfer.exports.meta_graph import save_classifier


def run(config: FinetuneConfig, replicas: Replicas | None = None) -> tuple[dict[str, Any], Path]:
    """Fine-tune and evaluate; returns what is in ``metrics.json`` (nothing on a worker that is not
    the chief), and the run folder.

    Raises:
        ValueError, OSError: see the library functions; nearly all before any slow work.
        NonFiniteLossError: if training diverges.
        Interrupted: if it was asked to end; it can be resumed.
        LostWorkerError: if another worker is gone; so can this.
    """
    replicas = replicas or Replicas()
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    clock = measure.Clock()
    with replicas.watched(), run_data.skip_suggested():
        with clock("load_s"):
            job = prepare(config, replicas)
        with (
            _opened(job),
            interruption.resumable("finetune", job.out, run_folder.CONFIG) as signals,
        ):
            metrics = _train_and_evaluate(job, clock, signals)
            if replicas.is_chief:
                run_folder.write_json(job.out / run_folder.METRICS, metrics)
            replicas.barrier()  # none leaves while the chief may still need it
    return metrics, job.out


@contextlib.contextmanager
def _opened(job: Job) -> Iterator[None]:
    """The run folder, which the chief writes and all workers read."""
    replicas = job.replicas
    with run_folder.opened(job.config) if replicas.is_chief else contextlib.nullcontext():
        with replicas.chief_first():
            if replicas.is_chief:
                write_down(job)
            elif not (job.out / run_folder.PROVENANCE).is_file():
                raise FileNotFoundError(
                    f"worker {replicas.worker} does not see what the chief wrote to "
                    f"{str(job.out)!r}; --out must be a folder that all workers share"
                )
        yield


def _train_and_evaluate(job: Job, clock: measure.Clock, signals: Signals) -> dict[str, Any]:
    """All stages, one after the other; returns what is in ``metrics.json``, on the chief."""
    extracted = found = 0
    progress = Progress()
    for number, stage in enumerate(job.stages):
        with clock("load_s"):
            frozen, model = job.classifier.split(cut_of(stage.cut))
            trainer: StageTrainer | StageSolver
            if job.config.solver == "lbfgs":
                trainer = StageSolver(job, model)
            else:
                trainer = StageTrainer(job, number, frozen, model, progress)
        if not trainer.is_done or stage is job.stages[-1]:
            with clock("extract_s"):
                inputs = Inputs(job, stage.cut, frozen)
            with clock("train_s"):
                trainer.fit(inputs, functools.partial(_save, job), signals)
            extracted += inputs.num_extracted
            found += inputs.num_found
        progress = trainer.progress
    with clock("eval_s"):
        figures = _save_and_evaluate(job, inputs, progress)
    extracted, found = job.replicas.total(extracted), job.replicas.total(found)
    if not job.replicas.is_chief:
        return {}
    metrics = _metrics(job, progress, figures)
    metrics["time"] = seconds = clock.seconds
    num_trained = progress.steps_now / job.steps_per_epoch * len(job.train)
    metrics["throughput"] = {
        "extract_images_per_s": measure.rate(extracted, seconds["extract_s"]),
        "train_images_per_s": measure.rate(num_trained, seconds["train_s"]),
    }
    metrics["activations"] = {"computed": extracted, "found": found}
    metrics["unreadable"] = run_data.report_unreadable(job.unreadable)
    return metrics


def _save(job: Job, epochs: int, **options: Any) -> None:
    prefix = job.out / run_folder.MODEL
    cuts = ", then ".join(stage.cut for stage in job.stages)
    card = Card(
        source=f"fine-tuned from {job.graph.prefix.name}, frozen until {cuts}",
        licence=job.graph.card.licence,
        trained_on=f"{job.train.source.name}, {len(job.train)} images, {epochs} epochs",
    )
    save_classifier(job.classifier, prefix, card, **options)


def _save_and_evaluate(job: Job, inputs: Inputs, progress: Progress) -> dict[str, Any]:
    """What is reported is what was written: the files are read back and evaluated."""
    with job.replicas.chief_first():
        if job.replicas.is_chief:
            _save(job, progress.epoch)
    prefix = job.out / run_folder.MODEL
    _, saved = Classifier.load(prefix).split(cut_of(job.config.freeze_until))
    figures = inputs.evaluator(saved)()
    if job.replicas.is_chief:
        card_path = prefix.with_name(f"{prefix.name}.json")
        write_card(card_path, replace(read_card(card_path), eval=figures))
    return figures


def _metrics(job: Job, progress: Progress, figures: dict[str, Any]) -> dict[str, Any]:
    """``metrics.json``, but for times."""
    final_loss = run_folder.read_history(job.out)["loss"][-1]
    return {
        "eval": figures,
        "train": {"epochs": progress.epoch, "steps": progress.step, "final_loss": final_loss}
        | {"epoch_s": progress.epoch_s},
        "time": {},
        "throughput": {},
        "memory": {"peak_rss_mb": measure.peak_rss_mb()},
        "params": {"total": job.classifier.count_params(), "trainable": progress.trainable},
        "cut": job.config.freeze_until,
        "seed": job.config.seed,
        "versions": measure.versions(),
    }
