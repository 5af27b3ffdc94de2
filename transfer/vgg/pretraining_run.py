"""What ``vgg-transfer pretrain`` does; its flags are in ``recipes.pretrain``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from recipes import console, terminal
from recipes.finetune_request import flags_of
from recipes.pretrain import PretrainConfig
from transfer import Backbone, Card, Preprocess, load_meta_graph, open_source, save_meta_graph
from transfer.activations.extraction import Compiled
from transfer.core import measurement
from transfer.core.files import write_names
from transfer.data.dataset import Split
from transfer.evaluation.prediction import predict, summarize
from transfer.images.preprocess import for_card
from transfer.models.card import write_card
from transfer.runs import interruption, run_data, run_folder
from transfer.runs.interruption import Signals
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.trainer import ParameterGroup, Trainer, epoch_seed
from transfer.vgg import architectures, pretraining

CHECKPOINT_S = 600.0
KEPT_DECODED_MB = 2000  # of training images; larger ones take longer to train on than to decode


def run(config: PretrainConfig) -> tuple[dict[str, Any], Path]:
    """Train, save and evaluate; returns the figures on held-out images, and the model's prefix.

    Raises:
        ValueError, OSError: see the library functions.
        NonFiniteLossError: if training diverges.
    """
    if config.arch not in architectures.ARCHITECTURES:
        raise ValueError(
            f"--arch {config.arch}: choose from {', '.join(architectures.ARCHITECTURES)}"
        )
    for name, least in (("epochs", 1), ("batch_size", 1), ("fc_epochs", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name.replace('_', ' ')} must be at least {least}")
    if config.out is not None or config.resume:
        run_folder.check(config.out, resume=config.resume)
    keras.utils.set_random_seed(config.seed)
    architecture = architectures.ARCHITECTURES[config.arch]
    source = open_source(
        "" if config.image_folder else config.dataset,
        data_dir=config.data_dir,
        image_folder=config.image_folder,
    )
    train, held_out = run_data.splits(
        source,
        config.train_split,
        config.eval_split,
        resumed=config.out if config.resume else None,
    )
    _small_images(config, architecture)  # before anything is written
    out = (config.out or run_folder.default_out(source.name, config.arch)).resolve()
    config = replace(config, out=out)
    with (
        run_folder.opened(out, flags_of(config), resume=config.resume),
        interruption.resumable(out) as signals,
    ):
        write_names(out / run_folder.HELD_OUT, held_out.names)
        return _train_and_save(config, train, held_out, signals)


def _train_and_save(
    config: PretrainConfig, train: Split, held_out: Split, signals: Signals
) -> tuple[dict[str, Any], Path]:
    architecture = architectures.ARCHITECTURES[config.arch]
    preprocess = Preprocess(config.preprocess, architecture.image_size)
    out, class_names = config.out, train.source.class_names

    def figures(network: keras.layers.Layer) -> dict[str, Any]:
        return summarize(
            *predict(Compiled(network), held_out.batches(preprocess, config.batch_size))
        )

    model = _trained(config, train, figures, signals)

    num_epochs = config.epochs + config.fc_epochs
    prefix = out / config.arch
    labels = out / f"{config.arch}.labels.txt"
    write_names(labels, class_names)
    card = Card(
        input="images:0",
        tap="fc7:0",
        image_size=architecture.image_size,
        preprocess=for_card(config.preprocess),
        labels=labels.name,
        outputs={"logits": "fc8:0", "probabilities": "prob:0"},
        source=_command(config),
        licence=config.licence,
        trained_on=f"{train.source.name}, {len(train)} images, {num_epochs} epochs",
    )
    graph = architectures.build_graph(architecture, len(class_names))
    save_meta_graph(graph, prefix, pretraining.folded(model), card)
    # What is reported is what was written.
    saved = load_meta_graph(prefix)
    result = figures(Backbone(saved, tap="fc8"))
    write_card(prefix.with_name(f"{prefix.name}.json"), replace(saved.card, eval=result))
    run_folder.write_json(out / run_folder.METRICS, {"eval": result, "seed": config.seed})
    return result, prefix


def _trained(
    config: PretrainConfig,
    train: Split,
    figures: Callable[[keras.Model], dict[str, Any]],
    signals: Signals,
) -> keras.Model:
    """The whole network, trained for ``--epochs``; then, for ``--fc-epochs``, one with its
    convolutions. ``figures`` are those on held-out images."""
    architecture = architectures.ARCHITECTURES[config.arch]
    steps_per_epoch = -(-len(train) // config.batch_size)
    batches = _batches(config, train)

    def fit(trainer: Trainer, whole: keras.Model, epochs: int, checkpoints: Path) -> None:
        checkpoint = RunCheckpoint(checkpoints, every_s=CHECKPOINT_S)
        if config.resume:
            checkpoint.restore(trainer)
            for line in checkpoint.damaged:
                terminal.say(f"warning: {line}; going on from the one before")
            if trainer.epoch >= epochs:
                return
            run_folder.keep_history(config.out, trainer.epoch)
        trainer.fit(
            batches,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validate=lambda: {k: v for k, v in figures(whole).items() if isinstance(v, float)},
            callbacks=[keras.callbacks.CSVLogger(config.out / run_folder.HISTORY, append=True)],
            verbose=console.verbosity(),
            checkpoint=checkpoint,
            uninterrupted=signals.held,
        )

    def updates(model: keras.Model, epochs: int) -> list[ParameterGroup]:
        optimizer = pretraining.optimizer(
            config.learning_rate, config.weight_decay, steps_per_epoch, epochs
        )
        return [ParameterGroup(optimizer, model.trainable_variables)]

    checkpoints = config.out / run_folder.CHECKPOINTS
    num_classes = len(train.source.class_names)
    model = pretraining.trainable_model(architecture, num_classes, dropout=config.dropout)
    trainer = Trainer(
        model,
        updates(model, config.epochs),
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        seed=config.seed,
    )
    fit(trainer, model, config.epochs, checkpoints)
    if not config.fc_epochs:
        return model
    keras.utils.set_random_seed(config.seed)  # the same weights in a run that is resumed here
    model = pretraining.with_new_fully_connected(model, architecture)
    convolutions, fully_connected = pretraining.halves(model)
    trainer = Trainer(
        fully_connected,
        updates(fully_connected, config.fc_epochs),
        label_smoothing=config.label_smoothing,
        frozen=convolutions,
        seed=config.seed,
        epoch=config.epochs,
    )
    # Where --resume raises --epochs, the convolutions become others, and these begin anew.
    checkpoints = checkpoints / f"fc-after-{config.epochs}"
    fit(trainer, model, config.epochs + config.fc_epochs, checkpoints)
    return model


def _batches(config: PretrainConfig, train: Split) -> Callable[[int, int], Iterable]:
    """An epoch's number, and how many of its batches are done, to the rest of its batches."""
    architecture = architectures.ARCHITECTURES[config.arch]
    preprocess = Preprocess(config.preprocess, architecture.image_size)
    small = _small_images(config, architecture)
    decoded = _decoded(config, train, preprocess)

    def batches(epoch: int, first_batch: int) -> Iterable:
        seed = epoch_seed(config.seed, epoch)
        prepare = small if epoch < config.small_epochs else preprocess
        if decoded is not None:
            return decoded.batches(
                prepare, config.batch_size, seed, augment=config.augment, first_batch=first_batch
            )
        return train.batches(
            prepare,
            config.batch_size,
            shuffle_seed=seed,
            view_seed=seed if config.augment else None,
            first_batch=first_batch,
        )

    return batches


def _decoded(
    config: PretrainConfig, train: Split, preprocess: Preprocess
) -> pretraining.DecodedImages | None:
    """The training images in memory, if they are few and small enough. Order and views are others
    than where they are read anew, so that the choice may depend on nothing but the images."""
    pixels = replace(preprocess, mode="none")
    needed = len(train) * pixels.size**2 * pixels.channels / 1e6
    if needed > KEPT_DECODED_MB:
        return None
    images = measurement.progress(train.batches(pixels, config.batch_size), "training images")
    return pretraining.DecodedImages(images, len(train), train.labels)


def _small_images(config: PretrainConfig, architecture: architectures.Architecture) -> Preprocess:
    """What the first ``--small-epochs`` see.

    Raises:
        ValueError: if the last pooling would make something else of them than of full-size images.
    """
    if (config.small_epochs > 0) != (config.small_size is not None):
        raise ValueError("--small-epochs and --small-size go together: give both or none")
    size = config.small_size or architecture.image_size
    poolings = 2 ** len(architecture.blocks)
    smallest = (architecture.pooled_size - 1) * poolings + 1
    if not smallest <= size <= architecture.image_size:
        raise ValueError(
            f"--small-size {size}: for {config.arch} it must be {smallest} to "
            f"{architecture.image_size} pixels, so that fc6 has as many inputs as at full size"
        )
    return Preprocess(config.preprocess, size)


def _command(config: PretrainConfig) -> str:
    """The command that makes the same model, but for where things lie."""
    places = ("data_dir", "image_folder", "out", "resume", "licence")
    words = ["vgg-transfer", "pretrain"]
    for name, value in vars(config).items():
        flag = name.replace("_", "-")
        if name in places or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return " ".join(words)
