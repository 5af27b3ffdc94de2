"""Fine-tune a pretrained network on labelled images: ``fine_tune`` and the run it performs."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from transfer.core import measurement
from transfer.core.distribution import Replicas
from transfer.data.dataset import Split
from transfer.evaluation.metrics_text import describe_accuracy
from transfer.exports.meta_graph import save_classifier
from transfer.exports.writing import EXPORTS
from transfer.finetuning import tracking
from transfer.finetuning.advice import (
    describe_leaks,
    describe_old_evaluation,
    describe_overfitting,
    describe_rare_classes,
)
from transfer.finetuning.calibration import calibrate, report
from transfer.finetuning.context import RunContext
from transfer.finetuning.inputs import Inputs
from transfer.finetuning.options import OF_GRADIENT_DESCENT, FineTuneOptions, options_from
from transfer.finetuning.provenance import SOURCES, check_provenance, write_provenance
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.finetuning.solver import StageSolver
from transfer.finetuning.stage import Progress, StageTrainer
from transfer.layers.classifier import Classifier
from transfer.models.card import Card, read_card, write_card
from transfer.models.meta_graph import MetaGraph, load_meta_graph
from transfer.runs import interruption, run_data, run_folder
from transfer.runs.growth import describe_growth
from transfer.runs.interruption import Signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuneResult:
    """A finished run.

    ``classifier`` is the fine-tuned model, loaded from ``run_dir``; ``metrics`` is the content of
    ``metrics.json`` (empty on a worker that is not the chief); ``history`` maps the name of a
    metric to its value after each epoch; ``logits`` are those of the held-out images, in their
    order, float32 ``[num_held_out, num_classes]``.

    Example:
        >>> from transfer import FineTuneResult, fine_tune, open_source
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> result: FineTuneResult = fine_tune(
        ...     "embedded", train, held_out, epochs=1, shots_per_class=5, run_dir="runs/few"
        ... )
        >>> sorted(result.history)[:3]
        ['accuracy', 'epoch', 'loss']
        >>> result.classifier.labels == train.source.class_names
        True
        >>> result.describe()
        ['accuracy 0... on 359 held-out images (95 % interval 0... to 0...)']
    """

    classifier: Classifier
    metrics: dict[str, Any]
    history: dict[str, list[float]]
    run_dir: Path
    logits: np.ndarray

    def describe(self) -> list[str]:
        """The accuracy and, where images were added to a run, how its classes fare, in lines."""
        if not self.metrics:
            return []
        added = self.metrics.get("growth")
        return [
            describe_accuracy(self.metrics["eval"], "held-out images"),
            *(describe_growth(added) if added else ()),
        ]


def fine_tune(
    graph: MetaGraph | str | Path,
    train: Split,
    held_out: Split,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    feeds: Mapping[str, float | bool] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
    replicas: Replicas | None = None,
    **options: Any,
) -> FineTuneResult:
    """Fine-tune a pretrained network on labelled images, evaluate it, and write a run folder.

    ``vgg-transfer finetune`` is this function with flags: the same defaults, cache and files. With
    the same options and seed, results are bit-identical on a CPU. The seed is set globally with
    ``keras.utils.set_random_seed``.

    Args:
        graph: the pretrained network from ``load_meta_graph``, or a path to load.
        train: training images; a split of a source from ``open_source``.
        held_out: images to evaluate on, from the same source and disjoint from ``train``.
        run_dir: folder of the run, new or empty. Default: ``runs/<date-time>-<dataset>-<cut>``,
            with the cut as in ``freeze_until``.
        resume: continue the run in ``run_dir``, or start it if there is none.
        feeds: values of placeholders of the graph, see ``Backbone``.
        callbacks: Keras callbacks in addition to those that write the run folder. With
            ``solver="auto"`` they make the run gradient descent, as only its epochs call them.
        verbose: 0 silent, 1 progress bars, 2 log lines (level ``INFO``): one per epoch, at most
            one in five seconds.
        replicas: devices and processes that train together; see ``open_replicas``.
        **options: the fields of ``FineTuneOptions``, such as ``freeze_until="pool4"``,
            ``epochs=5`` or ``learning_rate=0.001``.

    Returns:
        The classifier, its metrics, history and folder.

    Raises:
        TypeError: for an unknown option.
        ValueError, OSError: if options, model and images are incompatible; nearly all are raised
            before any slow work.
        NonFiniteLossError: if training diverges.
        Interrupted: on Ctrl-C or SIGTERM; the run can be resumed.
        LostWorkerError: if another worker has stopped; the run can be resumed.

    Example:
        >>> from transfer import fine_tune, load_meta_graph, open_source
        >>> graph = load_meta_graph("pretrained/vgg_small")
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> result = fine_tune(graph, train, held_out, run_dir="runs/digits", epochs=20)
        >>> result.metrics["eval"]["accuracy"] > 0.9
        True
    """
    if not isinstance(graph, MetaGraph):
        graph = load_meta_graph(graph)
    return run(
        RunRequest(
            graph,
            train,
            held_out,
            options_from(options),
            feeds=feeds or {},
            run_dir=None if run_dir is None else Path(run_dir),
            resume=resume,
            callbacks=callbacks,
            verbose=verbose,
            replicas=replicas or Replicas(),
        )
    )


def run(request: RunRequest) -> FineTuneResult:
    """Perform the run of a request; see ``fine_tune``."""
    replicas = request.replicas
    request.options.check()
    tracking.check_installed(request.options.track)
    keras.utils.set_random_seed(request.options.seed)
    clock = measurement.Clock()
    with replicas.watched():
        with clock("load_s"):
            context = prepare(request)
            if request.run_dir is None:
                context = replace(context, run_dir=_new_folder(context))
        with (
            _opened(context),
            tracking.tracked(context) as tracker,
            interruption.resumable(context.run_dir) as signals,
        ):
            callbacks = [*request.callbacks, *tracker.callbacks]
            context = replace(context, request=replace(context.request, callbacks=callbacks))
            classifier, metrics, logits = _train_and_evaluate(context, clock, signals)
            if replicas.is_chief:
                before = _loss_before(context.run_dir)
                run_folder.write_json(context.run_dir / run_folder.METRICS, metrics)
                tracker.finish(metrics)
            replicas.barrier()  # no worker exits while the chief may still need it
    history = run_folder.read_history(context.run_dir)
    if replicas.is_chief:
        loss = metrics["eval"]["loss"]
        lines = describe_old_evaluation(
            str(context.run_dir),
            before,
            loss,
            is_evaluated=(context.run_dir / run_folder.EVALUATION).is_file(),
            is_exported=(context.run_dir / EXPORTS).is_dir(),
        )
        for line in (*_advice(context, history), *lines):
            logger.warning(line)
    return FineTuneResult(classifier, metrics, history, context.run_dir, logits)


def _loss_before(run_dir: Path) -> float | None:
    """The log loss in the ``metrics.json`` of a finished run that is resumed."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # missing or damaged
        return float(run_folder.read_json(run_dir / run_folder.METRICS)["eval"]["loss"])
    return None


def _advice(context: RunContext, history: dict[str, list[float]]) -> list[str]:
    """What looks wrong in the finished run."""
    options, train = context.options, context.train
    lines = describe_leaks(context.num_leaks)
    if options.shots_per_class is None:  # else few images were asked for
        lines += describe_rare_classes(train.source.class_names, train.labels)
    if options.early_stopping is None:
        tap = context.classifier.feature_extractor.network.output.removesuffix(":0")
        head_only = [stage.cut for stage in context.stages] == [tap]
        lines += describe_overfitting(history, options, head_only=head_only)
    return lines


def _new_folder(context: RunContext) -> Path:
    """The default folder of the run, which the chief creates."""
    replicas, folder = context.replicas, context.run_dir
    return Path(
        replicas.from_chief(str(run_folder.create(folder) if replicas.is_chief else folder))
    )


@contextlib.contextmanager
def _opened(context: RunContext) -> Iterator[None]:
    """Open the run folder: the chief writes it, all workers read it."""
    replicas, run_dir = context.replicas, context.run_dir
    is_chief = replicas.is_chief
    if is_chief and context.request.resume:
        check_provenance(context)  # before config.yaml is replaced
        _check_epochs(context)
    # Earlier versions recorded options of gradient descent whatever the solver.
    unused = OF_GRADIENT_DESCENT if context.options.solver != "gradient" else ()
    may_differ = (*SOURCES, *unused)
    folder = run_folder.opened(
        run_dir,
        context.config,
        resume=context.request.resume,
        defaults=_defaults(context),
        may_differ=may_differ,
    )
    with folder if is_chief else contextlib.nullcontext():
        with replicas.chief_first():
            if is_chief:
                write_provenance(context)
                tracking.write_hparams(context)
            elif not (run_dir / run_folder.PROVENANCE).is_file():
                raise FileNotFoundError(
                    f"worker {replicas.worker} cannot see the files of the chief in "
                    f"{str(run_dir)!r}; the run folder must be shared by all workers"
                )
        yield


def _check_epochs(context: RunContext) -> None:
    """Refuse to end a resumed run before the epochs that it has."""
    epochs, done = context.config.get("epochs"), run_folder.num_epochs(context.run_dir)
    if epochs is not None and done > epochs:
        raise ValueError(
            f"the run in {str(context.run_dir)!r} already has {done} epochs, and epochs={epochs} "
            f"would end it before; give epochs={done} or more, or start a new run"
        )


def _defaults(context: RunContext) -> dict[str, Any]:
    """What ``config.yaml`` of an earlier version did not record."""
    defaults = asdict(FineTuneOptions(solver="gradient"))
    origin = context.request.origin
    if "train_split" not in origin:  # a run from Python; provenance.json covers its feeds
        defaults |= {name: origin.get(name, ()) for name in ("feed", "rename")}
    return defaults


def _train_and_evaluate(
    context: RunContext, clock: measurement.Clock, signals: Signals
) -> tuple[Classifier, dict[str, Any], np.ndarray]:
    """Run all stages; returns the saved classifier, on the chief the content of ``metrics.json``,
    and the logits of the held-out images."""
    num_extracted = num_found = 0
    progress = Progress()
    for number, stage in enumerate(context.stages):
        with clock("load_s"):
            frozen, model = context.split(stage)
            trainer: StageTrainer | StageSolver
            if context.options.solver == "gradient":
                trainer = StageTrainer(context, number, frozen, model, progress)
            else:
                trainer = StageSolver(context, model)
        if not trainer.is_done or stage is context.stages[-1]:
            with clock("extract_s"):
                inputs = Inputs(context, stage.cut, frozen)
            if isinstance(trainer, StageTrainer) and trainer.solves_head:
                with clock("head_start_s"):
                    trainer.solve_head(inputs)
            with clock("train_s"):
                trainer.fit(inputs, functools.partial(_save, context), signals)
            num_extracted += inputs.num_extracted
            num_found += inputs.num_found
        progress = trainer.progress
    with clock("eval_s"):
        calibrated = _calibrated(context, inputs)
        classifier, evaluation, logits = _save_and_evaluate(context, inputs, progress)
    growth = _growth(context, inputs, logits)
    replicas = context.replicas
    num_extracted, num_found = replicas.total(num_extracted), replicas.total(num_found)
    if not replicas.is_chief:
        return classifier, {}, logits
    metrics = _metrics(context, progress, evaluation) | calibrated | growth
    metrics["time"] = seconds = clock.seconds
    num_trained = progress.steps_now / context.steps_per_epoch * len(context.train)
    metrics["throughput"] = {
        "extract_images_per_s": measurement.rate(num_extracted, seconds["extract_s"]),
        "train_images_per_s": measurement.rate(num_trained, seconds["train_s"]),
    }
    metrics["activations"] = {"computed": num_extracted, "found": num_found}
    metrics["unreadable"] = run_data.unreadable(context.train, context.held_out)
    return classifier, metrics, logits


def _save(context: RunContext, epochs: int, **options: Any) -> None:
    prefix = context.run_dir / run_folder.MODEL
    run_folder.check_present(context.run_dir)  # else its folder is created for the model
    graph, train = context.request.graph, context.train
    cuts = ", then ".join(stage.cut for stage in context.stages)
    freeze_from = context.stages[-1].freeze_from
    frozen_after = f" and from {freeze_from}" if freeze_from else ""
    taps, solver = context.taps, context.options.solver
    card = Card(
        taps=taps if len(taps) > 1 else [],
        source=f"fine-tuned from {graph.prefix.name}, frozen until {cuts}{frozen_after}",
        licence=graph.card.licence,
        trained_on=f"{train.source.name}, {len(train)} images, "
        + (f"{epochs} epochs" if solver == "gradient" else f"head fitted by {solver}"),
    )
    save_classifier(context.classifier, prefix, card, **options)


def _save_and_evaluate(
    context: RunContext, inputs: Inputs, progress: Progress
) -> tuple[Classifier, dict[str, Any], np.ndarray]:
    """Write the model, load it and evaluate the loaded model: metrics are those of the files."""
    replicas = context.replicas
    with replicas.chief_first():
        if replicas.is_chief:
            _save(context, progress.epoch)
    prefix = context.run_dir / run_folder.MODEL
    classifier = Classifier.load(prefix)
    classifier.cut = context.last_cut
    _, saved = classifier.split(context.last_cut)
    logits = inputs.predictor(saved)()
    evaluation = inputs.summary(logits)
    if context.options.precision != "float32" and context.last_cut != "none":
        # Of the frozen part in this precision: the classifier in the files computes in float32.
        evaluation["precision"] = context.options.precision
    if replicas.is_chief:
        card_path = prefix.with_name(f"{prefix.name}.json")
        write_card(card_path, replace(read_card(card_path), eval=evaluation))
    return classifier, evaluation, logits


def _calibrated(context: RunContext, inputs: Inputs) -> dict[str, Any]:
    """With ``calibrate``, scale the head, and return the entry of ``metrics.json``."""
    if not context.options.calibrate:
        return {}
    _, trained = context.classifier.split(context.last_cut)
    logits, held_out = inputs.predictor(trained)(), context.held_out
    found = calibrate(context.classifier.head, logits, held_out.labels, held_out.groups)
    report(found, len(held_out))
    return {"calibration": found}


def _growth(context: RunContext, inputs: Inputs, logits: np.ndarray) -> dict[str, Any]:
    """Where images were added to a run, the entry ``growth`` of ``metrics.json``."""
    growth = context.request.growth
    if growth is None:
        return {}
    _, head = Classifier.load(growth.run / run_folder.MODEL).split(context.last_cut)
    before = inputs.predictor(head, len(growth.class_names))()
    class_names, labels = context.classifier.labels, context.held_out.labels
    added, added_held_out = growth.num_added
    images = {
        "kept": len(context.train) - added,
        "added": added,
        "held_out_added": added_held_out,
        "already_there": growth.num_known,
    }
    return {
        "growth": {"run": str(growth.run), "images": images}
        | growth.compare(class_names, labels, before, logits)
    }


def _metrics(context: RunContext, progress: Progress, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Content of ``metrics.json``, except for times."""
    options = context.options
    metrics: dict[str, Any] = {
        "eval": evaluation,
        "train": {
            "epochs": progress.epoch,
            "steps": progress.step,
            "final_loss": run_folder.read_history(context.run_dir)["loss"][-1],
            "epoch_s": progress.epoch_s,
        },
        "time": {},
        "throughput": {},
        "memory": {"peak_rss_mb": measurement.peak_rss_mb()},
        "params": {"total": context.classifier.count_params(), "trainable": progress.trainable},
        "cut": context.last_cut,
        "seed": options.seed,
        "precision": options.precision,
        "versions": measurement.versions(),
        "solver": {"name": options.solver, **progress.solution},
    }
    if len(context.taps) > 1:
        metrics["taps"] = context.taps
    if options.precision == "int8":
        metrics["int8_engine"] = options.int8_engine
    return metrics
