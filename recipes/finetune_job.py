"""What ``vgg-transfer finetune`` does; its flags are in ``recipes.finetune``."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recipes import measure, run_folder
from recipes.finetune import EMBEDDED, FinetuneConfig
from transfer import Backbone, Card, Classifier, Head, MetaGraph, load_meta_graph
from transfer.card import read_card, write_card
from transfer.data import Split, few_shot, train_and_eval_splits
from transfer.evaluation import predict, summarize
from transfer.export import save_classifier
from transfer.features import compiled, extract, stream
from transfer.sources import open_source
from transfer.training import ParameterGroup, RunCheckpoint, Trainer, epoch_seed

EMBEDDED_MODEL = str(files("pretrained") / "vgg_small")
# A head on kept features takes Keras' default rate for Adam, and its epochs cost next to nothing.
HEAD_LEARNING_RATE, HEAD_EPOCHS = 1e-3, 50
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
        graph = load_meta_graph(EMBEDDED_MODEL if config.model == EMBEDDED else config.model)
        train, held_out = _splits(config)
        classifier, config = _classifier(config, graph, train.source.class_names)
        cut = None if config.freeze_until == "none" else config.freeze_until
        frozen, trained = classifier.split(cut)
        groups = _parameter_groups(config, classifier, trained)
        _check_repeatable(classifier, held_out)
        out = config.out or run_folder.default_out(train.source.name, config.freeze_until)
        if config.resume:
            run_folder.check_resumed(out, config)
        out = run_folder.create(out, resume=config.resume)
        config = replace(config, out=out)
        run_folder.write_config(out, config)
        run_folder.write_text(out / run_folder.HELD_OUT, "".join(f"{n}\n" for n in held_out.names))

    def images(split: Split, seed: int | None = None) -> Iterable:
        return split.batches(
            classifier.preprocess,
            config.batch_size,
            shuffle_seed=seed,
            augment=config.augment and seed is not None,
        )

    def cached(split: Split, name: str) -> Callable[[int | None], Iterable]:
        batches = measure.progress(images(split), f"features of the {name} images")
        activations = extract(compiled(frozen), batches, len(split))
        return lambda seed=None: activations.batches(config.batch_size, seed)

    is_kept = frozen is not None and _fits_in_memory(frozen, classifier, len(train) + len(held_out))
    is_train_kept = is_kept and not config.augment
    with clock("extract_s"):
        eval_batches = cached(held_out, "held-out") if is_kept else lambda: images(held_out)
        train_batches = cached(train, "training") if is_train_kept else lambda s: images(train, s)
    prefix = compiled(frozen) if frozen is not None else None

    def evaluate(model: keras.Model) -> Callable[[], dict[str, Any]]:
        forward = compiled(model)
        if is_kept or prefix is None:
            return lambda: summarize(*predict(forward, eval_batches()))
        return lambda: summarize(*predict(forward, stream(prefix, eval_batches())))

    validate = evaluate(trained)
    trainer = Trainer(trained, groups, frozen=None if is_train_kept else frozen)
    checkpoint = RunCheckpoint(out / run_folder.CHECKPOINTS)
    if config.resume:
        checkpoint.restore(trainer)
    first_step = trainer.step
    with clock("train_s"), contextlib.redirect_stdout(sys.stderr):  # Keras' progress bar
        trainer.fit(
            lambda epoch: train_batches(epoch_seed(config.seed, epoch)),
            epochs=config.epochs,
            steps_per_epoch=-(-len(train) // config.batch_size),
            validate=lambda: _scalars(validate()),
            callbacks=[
                keras.callbacks.CSVLogger(out / run_folder.HISTORY, append=config.resume),
                keras.callbacks.TensorBoard(out / run_folder.EVENTS, write_graph=False),
            ],
            verbose=measure.verbosity(),
            checkpoint=checkpoint,
        )

    with clock("eval_s"):
        card = Card(
            source=f"fine-tuned from {graph.prefix.name}, frozen until {config.freeze_until}",
            licence=graph.card.licence,
            trained_on=f"{train.source.name}, {len(train)} images, {trainer.epoch} epochs",
        )
        save_classifier(classifier, out / run_folder.MODEL, card)
        # What is reported is what was written: the files are read back and evaluated.
        _, saved = Classifier.load(out / run_folder.MODEL).split(cut)
        evaluation = evaluate(saved)()
        card_path = out / f"{run_folder.MODEL}.json"
        write_card(card_path, replace(read_card(card_path), eval=evaluation))

    steps = trainer.step - first_step
    metrics = {
        "eval": evaluation,
        "train": {
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "final_loss": _last_loss(out / run_folder.HISTORY),
        },
        "time": clock.seconds,
        "throughput": {
            "extract_images_per_s": measure.rate(
                is_kept * len(held_out) + is_train_kept * len(train),
                clock.seconds["extract_s"],
            ),
            "train_images_per_s": measure.rate(
                steps / -(-len(train) // config.batch_size) * len(train), clock.seconds["train_s"]
            ),
        },
        "memory": {"peak_rss_mb": measure.peak_rss_mb()},
        "params": {
            "total": classifier.count_params(),
            "trainable": sum(
                int(v.value.shape.num_elements()) for v in trainer.trainable_variables
            ),
        },
        "cut": config.freeze_until,
        "seed": config.seed,
        "versions": measure.versions(),
    }
    run_folder.write_json(out / run_folder.METRICS, metrics)
    return metrics, out


def _check(config: FinetuneConfig) -> None:
    """What can be said of the flags alone."""
    limits = {
        "epochs": (config.epochs, 1),
        "batch size": (config.batch_size, 1),
        "image size": (config.image_size, 1),
        "shots per class": (config.shots_per_class, 1),
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


def _check_repeatable(classifier: Classifier, split: Split) -> None:
    """Refuse features that differ from run to run: no two evaluations would agree."""
    backbone = classifier.backbone
    if not backbone.random_nodes:
        return
    images, _ = next(iter(split.batches(classifier.preprocess, 4)))
    if np.array_equal(backbone(images), backbone(images)):
        return
    raise ValueError(
        "the features of one image differ from run to run: dropout or noise lies before the tap "
        f"({', '.join(backbone.random_nodes[:3])}); turn it off with --feed, e.g. keep_prob:0=1.0, "
        "or choose a tap before it"
    )


def _fits_in_memory(frozen: keras.layers.Layer, classifier: Classifier, num_images: int) -> bool:
    """Whether the activations of all images may be kept: in half of the memory that is free."""
    size, channels = classifier.preprocess.size, classifier.preprocess.channels
    one = frozen(np.zeros([1, size, size, channels], np.float32))
    needed_mb = num_images * np.asarray(one).nbytes / 1e6
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
    config: FinetuneConfig, graph: MetaGraph, labels: list[str]
) -> tuple[Classifier, FinetuneConfig]:
    """The classifier before training, and the config with what was found out."""
    tap = graph.tensor(config.tap or graph.card.tap or "fc7")
    feeds = dict(_feed(assignment) for assignment in config.feed)
    network = graph.network(tap, config.input, feeds)
    preprocess = graph.preprocess(network.input, config.preprocess, config.image_size)
    backbone = Backbone(graph, tap, input=network.input, feeds=feeds, name="backbone")
    if config.random_weights:
        backbone.randomize(config.seed)
    freeze_until = config.freeze_until
    if freeze_until == "tap":
        freeze_until = tap.removesuffix(":0")
    head = Head(
        len(labels), hidden=config.hidden, dropout=config.dropout, seed=config.seed, name="head"
    )
    classifier = Classifier(backbone, head, preprocess, labels)
    classifier.build_from_size()
    only_head = freeze_until != "none" and not backbone.split(freeze_until)[1].graph_variables
    rate, epochs = BACKBONE_LEARNING_RATE, BACKBONE_EPOCHS
    if only_head:
        rate, epochs = HEAD_LEARNING_RATE, HEAD_EPOCHS
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
    if config.freeze_until == "none" and not backbone:
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


def _feed(assignment: str) -> tuple[str, float | bool]:
    name, _, value = assignment.rpartition("=")
    with contextlib.suppress(ValueError):
        if name:
            switches = {"true": True, "false": False}
            return name, switches[value.lower()] if value.lower() in switches else float(value)
    raise ValueError(f"--feed {assignment!r}: expected NAME=VALUE with a number, true or false")


def _scalars(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _last_loss(history: Path) -> float:
    with history.open(newline="", encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["loss"])
