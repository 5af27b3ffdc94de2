"""What ``vgg-transfer finetune`` does; its flags are in ``recipes.finetune``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recipes import measure, run_folder
from recipes.finetune import EMBEDDED, FinetuneConfig, cut_of
from recipes.network_flags import parse_feed, report
from transfer import Backbone, Card, Classifier, Head, MetaGraph, load_meta_graph
from transfer.card import read_card, write_card
from transfer.data import Split, few_shot, train_and_eval_splits
from transfer.evaluation import predict, summarize
from transfer.export import save_classifier
from transfer.features import Activations, compiled, extract, stream
from transfer.sources import open_source
from transfer.training import ParameterGroup, RunCheckpoint, Trainer, epoch_seed

EMBEDDED_MODEL = str(files("pretrained") / "vgg_small")
# A head on kept features: its epochs cost next to nothing. The rate is for features with a root
# mean square of 1; Adam's steps are of one size, so that smaller features need larger ones.
HEAD_LEARNING_RATE, HEAD_EPOCHS = 6e-3, 50
# A VGG without batch norm diverges or stalls at 1e-3.
BACKBONE_LEARNING_RATE, BACKBONE_EPOCHS = 1e-4, 10


def run(config: FinetuneConfig) -> tuple[dict[str, Any], Path]:
    """Fine-tune and evaluate; returns what is in ``metrics.json``, and the run folder.

    Raises:
        ValueError, OSError: see the library functions; nearly all before any slow work.
        NonFiniteLossError: if training diverges.
    """
    _check(config)
    keras.utils.set_random_seed(config.seed)
    clock = measure.Clock()
    with clock("load_s"):
        job = _prepare(config)
    with clock("extract_s"):
        inputs = Inputs(job)
    with clock("train_s"):
        trainer, num_steps = _train(job, inputs)
    with clock("eval_s"):
        figures = _save_and_evaluate(job, inputs, trainer)
    metrics = _metrics(job, trainer, figures)
    metrics["time"] = seconds = clock.seconds
    metrics["throughput"] = {
        "extract_images_per_s": measure.rate(inputs.num_extracted, seconds["extract_s"]),
        "train_images_per_s": measure.rate(
            num_steps / job.steps_per_epoch * len(job.train), seconds["train_s"]
        ),
    }
    run_folder.write_json(job.out / run_folder.METRICS, metrics)
    return metrics, job.out


@dataclass(frozen=True)
class Job:
    """All that is found out before the work begins."""

    config: FinetuneConfig
    """With nothing left to default."""
    out: Path
    graph: MetaGraph
    classifier: Classifier
    frozen: keras.layers.Layer | None
    trained: keras.Model
    groups: list[ParameterGroup]
    train: Split
    held_out: Split

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.batch_size)


class Inputs:
    """What the trained part of the classifier is fed with: kept activations, or else images.

    Activations are kept where there is a frozen part, they fit in memory, and no random views are
    asked for; what is evaluated on has none.
    """

    def __init__(self, job: Job):
        self._job = job
        self._frozen = None if job.frozen is None else compiled(job.frozen)
        keep = self._frozen is not None and _fits_in_memory(job)
        self._held_out = self._extract(job.held_out, "held-out") if keep else None
        self._train = (
            self._extract(job.train, "training") if keep and not job.config.augment else None
        )

    @property
    def frozen(self) -> keras.layers.Layer | None:
        """What is still to be applied to the training inputs."""
        return self._job.frozen if self._train is None else None

    @property
    def num_extracted(self) -> int:
        return sum(len(kept) for kept in (self._held_out, self._train) if kept is not None)

    def train(self, epoch: int) -> Iterable:
        config = self._job.config
        seed = epoch_seed(config.seed, epoch)
        if self._train is not None:
            return self._train.batches(config.batch_size, seed)
        return self._images(self._job.train, shuffle_seed=seed, augment=config.augment)

    def evaluator(self, model: keras.Model) -> Callable[[], dict[str, Any]]:
        """A function that evaluates a model on what was held out, with its weights at that time."""
        forward = compiled(model)
        return lambda: summarize(*predict(forward, self._evaluation_batches()))

    def _evaluation_batches(self) -> Iterable:
        if self._held_out is not None:
            return self._held_out.batches(self._job.config.batch_size)
        images = self._images(self._job.held_out)
        return images if self._frozen is None else stream(self._frozen, images)

    def _images(self, split: Split, **options: Any) -> Iterable:
        return split.batches(
            self._job.classifier.preprocess, self._job.config.batch_size, **options
        )

    def _extract(self, split: Split, name: str) -> Activations:
        batches = measure.progress(self._images(split), f"features of the {name} images")
        return extract(self._frozen, batches, len(split))


def _prepare(config: FinetuneConfig) -> Job:
    graph = load_meta_graph(EMBEDDED_MODEL if config.model == EMBEDDED else config.model)
    train, held_out = _splits(config)
    classifier, config = _classifier(config, graph, train)
    _check_repeatable(classifier, held_out, config.keep_dropout)
    frozen, trained = classifier.split(cut_of(config.freeze_until))
    groups = _parameter_groups(config, classifier, trained)
    out = config.out or run_folder.default_out(train.source.name, config.freeze_until)
    if config.resume:
        run_folder.check_resumed(out, config)
    out = run_folder.create(out, resume=config.resume)
    config = replace(config, out=out)
    run_folder.write_config(out, config)
    run_folder.write_text(out / run_folder.HELD_OUT, "".join(f"{n}\n" for n in held_out.names))
    return Job(config, out, graph, classifier, frozen, trained, groups, train, held_out)


def _train(job: Job, inputs: Inputs) -> tuple[Trainer, int]:
    """Train, or go on training; returns the trainer and the number of steps taken now."""
    trainer = Trainer(job.trained, job.groups, frozen=inputs.frozen)
    checkpoint = RunCheckpoint(job.out / run_folder.CHECKPOINTS)
    if job.config.resume:
        checkpoint.restore(trainer)
    first_step = trainer.step
    validate = inputs.evaluator(job.trained)
    trainer.fit(
        inputs.train,
        epochs=job.config.epochs,
        steps_per_epoch=job.steps_per_epoch,
        validate=lambda: {k: v for k, v in validate().items() if isinstance(v, float)},
        callbacks=[
            keras.callbacks.CSVLogger(job.out / run_folder.HISTORY, append=job.config.resume),
            keras.callbacks.TensorBoard(job.out / run_folder.EVENTS, write_graph=False),
            *_model_of_each_epoch(job, trainer),
        ],
        verbose=measure.verbosity(),
        checkpoint=checkpoint,
    )
    return trainer, trainer.step - first_step


def _model_of_each_epoch(job: Job, trainer: Trainer) -> list[keras.callbacks.Callback]:
    kept = job.config.max_to_keep
    hours = job.config.keep_checkpoint_every_n_hours
    if not kept:
        return []

    def save(epoch: int, logs: dict[str, float]) -> None:
        options = {"max_to_keep": kept, "keep_checkpoint_every_n_hours": hours}
        _save(job, epoch + 1, step=trainer.step, **options)

    return [keras.callbacks.LambdaCallback(on_epoch_end=save)]


def _save(job: Job, epochs: int, **options: Any) -> Path:
    prefix = job.out / run_folder.MODEL
    card = Card(
        source=f"fine-tuned from {job.graph.prefix.name}, frozen until {job.config.freeze_until}",
        licence=job.graph.card.licence,
        trained_on=f"{job.train.source.name}, {len(job.train)} images, {epochs} epochs",
    )
    save_classifier(job.classifier, prefix, card, **options)
    return prefix


def _save_and_evaluate(job: Job, inputs: Inputs, trainer: Trainer) -> dict[str, Any]:
    """What is reported is what was written: the files are read back and evaluated."""
    prefix = _save(job, trainer.epoch)
    _, saved = Classifier.load(prefix).split(cut_of(job.config.freeze_until))
    figures = inputs.evaluator(saved)()
    card_path = prefix.with_name(f"{prefix.name}.json")
    write_card(card_path, replace(read_card(card_path), eval=figures))
    return figures


def _metrics(job: Job, trainer: Trainer, figures: dict[str, Any]) -> dict[str, Any]:
    """``metrics.json``, but for times."""
    with (job.out / run_folder.HISTORY).open(newline="", encoding="utf-8") as file:
        final_loss = float(list(csv.DictReader(file))[-1]["loss"])
    trainable = sum(int(v.value.shape.num_elements()) for v in trainer.trainable_variables)
    return {
        "eval": figures,
        "train": {"epochs": trainer.epoch, "steps": trainer.step, "final_loss": final_loss},
        "time": {},
        "throughput": {},
        "memory": {"peak_rss_mb": measure.peak_rss_mb()},
        "params": {"total": job.classifier.count_params(), "trainable": trainable},
        "cut": job.config.freeze_until,
        "seed": job.config.seed,
        "versions": measure.versions(),
    }


def _check(config: FinetuneConfig) -> None:
    """What can be said of the flags alone."""
    limits = {
        "epochs": (config.epochs, 1),
        "batch size": (config.batch_size, 1),
        "image size": (config.image_size, 1),
        "shots per class": (config.shots_per_class, 1),
        "max to keep": (config.max_to_keep, 0),
        "learning rate": (config.learning_rate, 0),
        "backbone lr scale": (config.backbone_lr_scale, 0),
    }
    for name, (value, least) in limits.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if config.out is not None or config.resume:
        run_folder.check(config.out, resume=config.resume)


def _splits(config: FinetuneConfig) -> tuple[Split, Split]:
    source = open_source(
        config.dataset or "", data_dir=config.data_dir, image_folder=config.image_folder
    )
    train, held_out = train_and_eval_splits(source, config.train_split, config.eval_split)
    if config.shots_per_class is not None:
        train = few_shot(train, config.shots_per_class, config.seed)
    if config.batch_size > len(train):
        raise ValueError(
            f"batch size {config.batch_size} does not fit {len(train)} training images; "
            f"choose 1 to {len(train)}"
        )
    return train, held_out


def _feature_scale(classifier: Classifier, split: Split) -> float:
    """Root mean square of the features of the first images, which come in a random order."""
    images, _ = next(iter(split.batches(classifier.preprocess, 64)))
    return float(np.sqrt(np.mean(np.square(classifier.backbone(images))))) or 1.0


def _check_repeatable(classifier: Classifier, split: Split, keep_dropout: bool) -> None:
    """Refuse features that differ from run to run: no two evaluations would agree."""
    backbone = classifier.backbone
    if not backbone.random_nodes or keep_dropout:
        return
    images, _ = next(iter(split.batches(classifier.preprocess, 4)))
    if np.array_equal(backbone(images), backbone(images)):
        return
    raise ValueError(
        "the features of one image differ from run to run: noise lies before the tap "
        f"({', '.join(backbone.random_nodes[:3])}); choose an --input after it, a tap before it, "
        "or turn it off with --feed"
    )


def _fits_in_memory(job: Job) -> bool:
    """Whether the activations of all images may be kept: in half of the memory that is free."""
    preprocess = job.classifier.preprocess
    image = np.zeros([1, preprocess.size, preprocess.size, preprocess.channels], np.float32)
    num_images = len(job.train) + len(job.held_out)
    needed_mb = num_images * np.asarray(job.frozen(image)).nbytes / 1e6
    free_mb = measure.available_memory_mb()
    if needed_mb <= free_mb / 2:
        return True
    print(
        f"the activations would take {needed_mb:,.0f} MB and {free_mb:,.0f} MB are free: they are "
        "computed anew in each epoch; a later --freeze-until needs less",
        file=sys.stderr,
    )
    return False


def _classifier(
    config: FinetuneConfig, graph: MetaGraph, train: Split
) -> tuple[Classifier, FinetuneConfig]:
    """The classifier before training, and the config with what was found out."""
    tap = graph.tensor(config.tap or graph.card.tap or "fc7")
    feeds = dict(parse_feed(assignment) for assignment in config.feed)
    network = graph.network(tap, config.input, feeds, config.keep_dropout)
    report(config, tap, network)
    labels = train.source.class_names
    preprocess = graph.preprocess(network.input, config.preprocess, config.image_size)
    backbone = Backbone(
        graph,
        tap,
        input=network.input,
        feeds=feeds,
        keep_dropout=config.keep_dropout,
        use_ema=config.use_ema,
        name="backbone",
    )
    if config.random_weights:
        backbone.randomize(config.seed)
    freeze_until = config.freeze_until
    if freeze_until == "tap":
        freeze_until = tap.removesuffix(":0")
    elif freeze_until != "none":
        freeze_until = backbone.tensor(freeze_until).removesuffix(":0")
    head = Head(
        len(labels), hidden=config.hidden, dropout=config.dropout, seed=config.seed, name="head"
    )
    classifier = Classifier(backbone, head, preprocess, labels)
    classifier.build_from_size()
    only_head = freeze_until != "none" and not backbone.split(freeze_until)[1].graph_variables
    rate, epochs = BACKBONE_LEARNING_RATE, BACKBONE_EPOCHS
    if only_head:
        scale = _feature_scale(classifier, train) if config.learning_rate is None else 1.0
        rate, epochs = float(f"{HEAD_LEARNING_RATE / scale:.2g}"), HEAD_EPOCHS
    return classifier, replace(
        config,
        model=config.model if config.model == EMBEDDED else str(graph.prefix.resolve()),
        data_dir=config.data_dir and str(Path(config.data_dir).expanduser().resolve()),
        image_folder=config.image_folder and str(Path(config.image_folder).expanduser().resolve()),
        dataset=config.dataset or (None if config.image_folder or config.data_dir else "digits"),
        tap=tap,
        input=network.input,
        freeze_until=freeze_until,
        preprocess=preprocess.mode,
        image_size=preprocess.size,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        epochs=epochs if config.epochs is None else config.epochs,
    )


def _parameter_groups(
    config: FinetuneConfig, classifier: Classifier, trained: keras.Model
) -> list[ParameterGroup]:
    rate = config.learning_rate
    head = classifier.head.trainable_variables
    ours = {id(variable) for variable in head}
    backbone = [v for v in trained.trainable_variables if id(v) not in ours]
    groups = [ParameterGroup(_optimizer(config, rate), head)]
    if cut_of(config.freeze_until) is None and not backbone:
        raise ValueError(
            "nothing in the backbone can be trained: its weights are constants of the graph; "
            "leave --freeze-until out to train a head only"
        )
    if backbone:
        optimizer = _optimizer(config, rate * config.backbone_lr_scale)
        groups.append(ParameterGroup(optimizer, backbone))
    return groups


def _optimizer(config: FinetuneConfig, learning_rate: float) -> keras.optimizers.Optimizer:
    if config.optimizer == "sgd":
        return keras.optimizers.SGD(learning_rate, momentum=0.9)
    return keras.optimizers.Adam(learning_rate)
