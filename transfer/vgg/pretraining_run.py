"""Train a VGG from scratch and save it as a meta graph with its checkpoint and card.

The embedded model was trained with this module; see ``pretrained/README.md``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import keras

from transfer.activations.extraction import Compiled
from transfer.core import measurement
from transfer.core.files import write_names
from transfer.data.dataset import Split
from transfer.evaluation.prediction import predict_logits, summarize
from transfer.images.preprocess import Mode, Preprocess, for_card
from transfer.layers.backbone import Backbone
from transfer.models.card import Card, write_card
from transfer.models.meta_graph import load_meta_graph
from transfer.models.saver import save_meta_graph
from transfer.runs import interruption, run_data, run_folder
from transfer.runs.interruption import Signals
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.trainer import ParameterGroup, Trainer, epoch_seed
from transfer.vgg import architectures, pretraining
from transfer.vgg.pretraining_options import PretrainOptions

logger = logging.getLogger(__name__)

CHECKPOINT_S = 600.0
KEPT_DECODED_MB = 2000  # of decoded training images; for larger ones, training is the bottleneck


@dataclass(frozen=True)
class PretrainResult:
    """``prefix`` is the checkpoint prefix of the model in the run folder; ``metrics`` are those of
    the saved model on the held-out images, as in ``metrics.json``."""

    prefix: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """Options, images and folder of a run."""

    options: PretrainOptions
    train: Split
    held_out: Split
    run_dir: Path
    resume: bool
    verbose: int
    signals: Signals

    @property
    def architecture(self) -> architectures.Architecture:
        return architectures.ARCHITECTURES[self.options.arch]

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(cast(Mode, self.options.preprocess), self.architecture.image_size)


def pretrain(
    train: Split,
    held_out: Split,
    options: PretrainOptions | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    source: str | None = None,
    verbose: int = 0,
) -> PretrainResult:
    """Train a VGG from scratch, evaluate it, and write a run folder with the model.

    Args:
        train: training images; a split of ``open_source``.
        held_out: images to evaluate on, of the same source.
        options: training options.
        run_dir: folder of the run, new or empty. Default: ``runs/<date-time>-<dataset>-<arch>``.
        resume: continue the run in ``run_dir``, or start it if there is none.
        origin: origin of the images, for ``config.yaml``. Default: that of the source.
        source: how the model was made, for its card. Default: the options.
        verbose: 0 silent, 1 progress bars, 2 log lines.

    Raises:
        ValueError, OSError: if options and images do not fit, or the folder holds something else.
        NonFiniteLossError: if training diverges.
        Interrupted: on Ctrl-C or SIGTERM; the run can be resumed.

    Example:
        >>> from transfer import Backbone, open_source
        >>> from transfer.vgg.pretraining_options import PretrainOptions
        >>> from transfer.vgg.pretraining_run import pretrain
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> result = pretrain(train, held_out, PretrainOptions(epochs=1), run_dir="runs/vgg")
        >>> Backbone(result.prefix).network.output
        'fc7:0'
    """
    options = options or PretrainOptions()
    check(options)
    if run_dir is not None or resume:
        run_folder.check(None if run_dir is None else Path(run_dir), resume=resume)
    keras.utils.set_random_seed(options.seed)
    data = train.source
    if run_dir is None:
        run_dir = run_folder.create(run_folder.default_out(data.name, options.arch))
    out = Path(run_dir).resolve()
    settings = dataclasses.asdict(options)
    images = data.origin if origin is None else origin
    recorded = {"arch": options.arch, **images, **settings, "out": out}
    show = (lambda it: measurement.progress(it, "images", "image")) if verbose else iter
    provenance = {"dataset": {"name": data.name} | run_data.digests(train, held_out, show)}
    if resume:
        _check_images(out / run_folder.PROVENANCE, provenance)
    # Earlier versions recorded the default dataset beside an image folder or a manifest.
    free = () if images.get("dataset") else ("dataset",)
    with (
        run_folder.opened(out, recorded, resume=resume, may_differ=free),
        interruption.resumable(out) as signals,
    ):
        run_folder.write_json(out / run_folder.PROVENANCE, provenance)
        write_names(out / run_folder.HELD_OUT, held_out.names)
        described = ", ".join(f"{name} {value}" for name, value in settings.items())
        run = _Run(options, train, held_out, out, resume, verbose, signals)
        return _train_and_save(run, source or f"trained from scratch: {described}")


def check(options: PretrainOptions) -> None:
    """Check the options, without images or files.

    Raises:
        ValueError: names the option, its value and what is expected.
    """
    if options.arch not in architectures.ARCHITECTURES:
        raise ValueError(
            f"arch={options.arch}: choose from {', '.join(architectures.ARCHITECTURES)}"
        )
    for name, least in (("epochs", 1), ("batch_size", 1), ("fc_epochs", 0)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    _small_images(options)


def _check_images(path: Path, now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other images than those in its ``provenance.json``, which runs of
    earlier versions do not have."""
    if not path.is_file():
        return
    before, images = run_folder.read_json(path)["dataset"], now["dataset"]
    if changed := [role for role in ("training", "held_out") if before[role] != images[role]]:
        raise ValueError(
            f"cannot resume the run in {str(path.parent)!r}: its {' and '.join(changed)} images "
            f"changed since it began (see {path.name}); start anew, with another run_dir"
        )


def _train_and_save(run: _Run, source: str) -> PretrainResult:
    options, train, out = run.options, run.train, run.run_dir
    class_names = train.source.class_names

    def evaluated(network: keras.layers.Layer) -> dict[str, Any]:
        batches = run.held_out.batches(run.preprocess, options.batch_size)
        return summarize(*predict_logits(Compiled(network), batches), run.held_out.groups)

    model = _trained(run, evaluated)

    num_epochs = options.epochs + options.fc_epochs
    prefix = out / options.arch
    labels = out / f"{options.arch}.labels.txt"
    write_names(labels, class_names)
    card = Card(
        input="images:0",
        tap="fc7:0",
        image_size=run.architecture.image_size,
        preprocess=for_card(options.preprocess),
        labels=labels.name,
        outputs={"logits": "fc8:0", "probabilities": "prob:0"},
        source=source,
        licence=options.licence,
        trained_on=f"{train.source.name}, {len(train)} images, {num_epochs} epochs",
    )
    graph = architectures.build_graph(run.architecture, len(class_names))
    save_meta_graph(graph, prefix, pretraining.folded(model), card)
    # Report the metrics of the saved files.
    saved = load_meta_graph(prefix)
    metrics = evaluated(Backbone(saved, tap="fc8"))
    write_card(prefix.with_name(f"{prefix.name}.json"), replace(saved.card, eval=metrics))
    run_folder.write_json(out / run_folder.METRICS, {"eval": metrics, "seed": options.seed})
    return PretrainResult(prefix, metrics)


def _trained(run: _Run, evaluated: Callable[[keras.Model], dict[str, Any]]) -> keras.Model:
    """Train the whole network for ``epochs``, then new fully connected layers on its frozen
    convolutions for ``fc_epochs``. ``evaluated`` computes metrics on held-out images."""
    options = run.options
    steps_per_epoch = -(-len(run.train) // options.batch_size)
    batches = _batches(run)

    def fit(trainer: Trainer, whole: keras.Model, epochs: int, checkpoints: Path) -> None:
        checkpoint = RunCheckpoint(checkpoints, every_s=CHECKPOINT_S)
        if run.resume:
            checkpoint.restore(trainer)
            for line in checkpoint.damaged:
                logger.warning("%s; going on from the one before", line)
            if trainer.epoch >= epochs:
                return
            run_folder.keep_history(run.run_dir, trainer.epoch)
        trainer.fit(
            batches,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validate=lambda: {k: v for k, v in evaluated(whole).items() if isinstance(v, float)},
            callbacks=[keras.callbacks.CSVLogger(run.run_dir / run_folder.HISTORY, append=True)],
            verbose=run.verbose,
            checkpoint=checkpoint,
            uninterrupted=run.signals.held,
        )

    def updates(model: keras.Model, epochs: int) -> list[ParameterGroup]:
        optimizer = pretraining.optimizer(
            options.learning_rate, options.weight_decay, steps_per_epoch, epochs
        )
        return [ParameterGroup(optimizer, model.trainable_variables)]

    checkpoints = run.run_dir / run_folder.CHECKPOINTS
    num_classes = len(run.train.source.class_names)
    model = pretraining.trainable_model(run.architecture, num_classes, dropout=options.dropout)
    trainer = Trainer(
        model,
        updates(model, options.epochs),
        label_smoothing=options.label_smoothing,
        mixup=options.mixup,
        seed=options.seed,
    )
    fit(trainer, model, options.epochs, checkpoints)
    if not options.fc_epochs:
        return model
    keras.utils.set_random_seed(options.seed)  # the same initial weights in a resumed run
    model = pretraining.with_new_fully_connected(model, run.architecture)
    convolutions, fully_connected = pretraining.halves(model)
    trainer = Trainer(
        fully_connected,
        updates(fully_connected, options.fc_epochs),
        label_smoothing=options.label_smoothing,
        frozen=convolutions,
        seed=options.seed,
        epoch=options.epochs,
    )
    # If a resumed run has more epochs, the convolutions change, and these layers start again.
    checkpoints = checkpoints / f"fc-after-{options.epochs}"
    fit(trainer, model, options.epochs + options.fc_epochs, checkpoints)
    return model


def _batches(run: _Run) -> Callable[[int, int], Iterable[Any]]:
    """A function from an epoch and its number of finished batches to its remaining batches."""
    options, train, preprocess = run.options, run.train, run.preprocess
    small = _small_images(options)
    decoded = _decoded(run)

    def batches(epoch: int, first_batch: int) -> Iterable[Any]:
        seed = epoch_seed(options.seed, epoch)
        prepare = small if epoch < options.small_epochs else preprocess
        if decoded is not None:
            return decoded.batches(
                prepare, options.batch_size, seed, augment=options.augment, first_batch=first_batch
            )
        return train.batches(
            prepare,
            options.batch_size,
            shuffle_seed=seed,
            view_seed=seed if options.augment else None,
            first_batch=first_batch,
        )

    return batches


def _decoded(run: _Run) -> pretraining.DecodedImages | None:
    """The decoded training images, if they fit in memory. Order and views differ from those of
    images that are read in each epoch, so the choice must depend on the images only."""
    train, pixels = run.train, Preprocess("none", run.preprocess.size)
    needed = len(train) * pixels.height * pixels.width * pixels.channels / 1e6
    if needed > KEPT_DECODED_MB:
        return None
    images = measurement.progress(train.batches(pixels, run.options.batch_size), "training images")
    return pretraining.DecodedImages(images, len(train), train.labels)


def _small_images(options: PretrainOptions) -> Preprocess:
    """Preprocessing of the first ``small_epochs``.

    Raises:
        ValueError: if the last pooling's output would differ in size from that of full-size images.
    """
    architecture = architectures.ARCHITECTURES[options.arch]
    if (options.small_epochs > 0) != (options.small_size is not None):
        raise ValueError("small_epochs and small_size go together: give both or none")
    size = options.small_size or architecture.image_size
    poolings = 2 ** len(architecture.blocks)
    smallest = (architecture.pooled_size - 1) * poolings + 1
    if not smallest <= size <= architecture.image_size:
        raise ValueError(
            f"small_size={size}: for {options.arch} it must be {smallest} to "
            f"{architecture.image_size} pixels, so that fc6 has as many inputs as at full size"
        )
    return Preprocess(cast(Mode, options.preprocess), size)
