"""Train a VGG from scratch and save it as a meta graph with its checkpoint and card.

The embedded model was made with

    vgg-transfer pretrain --dataset tiny_imagenet --data-dir DIR --out runs/pretrain

which takes about 200 s an epoch on two cores.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cyclopts import Parameter

from recipes import measure, run_folder
from recipes.startup import import_tensorflow


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Flags of ``vgg-transfer pretrain``, with their defaults."""

    arch: str = "vgg_small"
    """Architecture: vgg_small (64 px), vgg11, vgg13, vgg16 or vgg19 (224 px)."""
    dataset: str = "tiny_imagenet"
    """Name of a tfds dataset."""
    data_dir: str | None = None
    """Where tfds datasets are. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """A folder of images per class, instead of a dataset."""
    train_split: str = "auto"
    """Split to train on, e.g. train[:90%]."""
    eval_split: str = "auto"
    """Split to evaluate on."""
    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.05
    """Highest learning rate of SGD with momentum: reached after a warm-up of half an epoch, then
    lowered to zero along a cosine."""
    weight_decay: float = 5e-4
    """Decay of the kernels, times the learning rate per step."""
    dropout: float = 0.2
    """Share dropped after fc6 and fc7 while training."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    preprocess: str = "torch"
    """Input convention to train with: caffe, slim, torch, tf, unit or none."""
    augment: bool = True
    """Train on random crops and flips."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    out: Path | None = None
    """Run folder. [default: runs/DATE-TIME-DATASET-ARCH]"""
    resume: bool = False
    """Continue the run in --out after its last complete epoch."""


def pretrain(config: PretrainConfig = PretrainConfig()) -> int:
    """Train a VGG from scratch and save it as a meta graph."""
    import_tensorflow()
    import keras

    from transfer import (
        Card,
        Preprocess,
        data,
        evaluation,
        pretraining,
        save_meta_graph,
        training,
        vgg,
    )

    if config.arch not in vgg.ARCHITECTURES:
        raise ValueError(f"--arch {config.arch}: choose from {', '.join(vgg.ARCHITECTURES)}")
    keras.utils.set_random_seed(config.seed)
    architecture = vgg.ARCHITECTURES[config.arch]
    dataset = "" if config.image_folder else config.dataset
    source = data.open_source(dataset, data_dir=config.data_dir, image_folder=config.image_folder)
    train, held_out = data.train_and_eval_splits(source, config.train_split, config.eval_split)
    preprocess = Preprocess(config.preprocess, architecture.image_size)

    out = config.out or run_folder.default_out(source.name, config.arch)
    out = run_folder.create(out, resume=config.resume)
    run_folder.write_config(out, replace(config, out=out))

    model = pretraining.trainable_model(
        architecture, len(source.class_names), dropout=config.dropout
    )
    steps_per_epoch = -(-len(train) // config.batch_size)
    optimizer = pretraining.optimizer(
        config.learning_rate, config.weight_decay, steps_per_epoch, config.epochs
    )
    trainer = training.Trainer(
        model,
        [training.ParameterGroup(optimizer, model.trainable_variables)],
        label_smoothing=config.label_smoothing,
    )
    checkpoint = training.RunCheckpoint(out / run_folder.CHECKPOINTS)
    if config.resume:
        checkpoint.restore(trainer)

    def figures() -> dict[str, float]:
        batches = held_out.batches(preprocess, config.batch_size)
        return evaluation.summarize(*evaluation.predict(model, batches))

    with contextlib.redirect_stdout(sys.stderr):  # Keras' progress bar
        trainer.fit(
            lambda epoch: train.batches(
                preprocess,
                config.batch_size,
                shuffle_seed=training.epoch_seed(config.seed, epoch),
                augment=config.augment,
            ),
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            validate=lambda: {k: v for k, v in figures().items() if isinstance(v, float)},
            callbacks=[keras.callbacks.CSVLogger(out / run_folder.HISTORY, append=config.resume)],
            verbose=measure.verbosity(),
            checkpoint=checkpoint,
        )

    result = figures()
    card = Card(
        input="images:0",
        tap="fc7:0",
        image_size=architecture.image_size,
        preprocess=config.preprocess,
        labels=run_folder.LABELS,
        source=f"vgg-transfer pretrain, architecture {config.arch}, seed {config.seed}",
        trained_on=f"{source.name}, {len(train)} images, {trainer.epoch} epochs",
        eval=result,
    )
    run_folder.write_text(out / run_folder.LABELS, "\n".join(source.class_names) + "\n")
    graph = vgg.build_graph(architecture, len(source.class_names))
    save_meta_graph(graph, out / run_folder.MODEL, pretraining.folded(model), card)
    run_folder.write_json(out / run_folder.METRICS, {"eval": result, "seed": config.seed})
    print(f"accuracy {result['accuracy']:.4f} on {len(held_out)} held-out images")
    print(out)
    return 0


if __name__ == "__main__":
    from recipes.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
