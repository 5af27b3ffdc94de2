"""Baseline of a benchmark: fine-tuning with ``keras.Model.fit``, as in the Keras guides.

The same network, images in the same order, head, optimizer, learning rate and epochs as
``fine_tune``, but the backbone runs in every epoch, frozen (``trainable=False``) or trained.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled
from transfer.core import measurement
from transfer.evaluation.prediction import predict_logits, summarize
from transfer.finetuning.hyperparameters import BATCH
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.runs import run_folder
from transfer.training.trainer import epoch_seed

_UNUSED = (
    *("freeze_from", "schedule", "head_start", "block_lr_decay", "weight_decay", "l2_sp", "ema"),
    *("clip_norm", "accumulate", "early_stopping", "label_smoothing", "mixup", "cutmix"),
    *("class_weights", "views", "precision", "lr_schedule", "calibrate"),
)


def check(options: FineTuneOptions) -> None:
    """Check that the baseline uses the options that matter to the results.

    Raises:
        ValueError: names those that it does not use.
    """
    if options.lr_schedule == "constant":  # what the baseline takes for auto
        options = replace(options, lr_schedule="auto")
    unused = [f"{name}={getattr(options, name)}" for name in options.changed(_UNUSED)]
    if unused:
        raise ValueError(
            f"the baseline with keras.Model.fit does not use {', '.join(unused)}, so that it would "
            "be compared with other training; leave out baseline or these options"
        )


def keras_baseline(request: RunRequest) -> dict[str, Any]:
    """Train and evaluate with ``keras.Model.fit``; writes ``metrics.json`` into the run folder.

    Args:
        request: as for ``fine_tune``. ``freeze_until`` must be the tap (frozen) or ``none``.

    Returns:
        The content of ``metrics.json``, with the keys that the benchmark's report reads.

    Raises:
        ValueError: see ``check``.
    """
    check(request.options)
    keras.utils.set_random_seed(request.options.seed)
    clock, times = measurement.Clock(), _EpochTimes()
    with clock("load_s"):
        work = prepare(request)
        (stage,) = work.stages
        classifier, options = work.classifier, work.options
        is_full = stage.cut == "none"
        inputs = keras.Input(classifier.preprocess.shape)
        classifier.backbone.trainable = is_full
        base = classifier.backbone if is_full else _InferenceMode(classifier.backbone)
        model = keras.Model(inputs, classifier.head(base(inputs)))
        # Keras has one learning rate for all layers: if the backbone is trained, the backbone's.
        rate = stage.learning_rate * (stage.backbone_lr_scale if is_full else 1.0)
        sgd = keras.optimizers.SGD(rate, momentum=0.9)
        model.compile(
            sgd if options.optimizer == "sgd" else keras.optimizers.Adam(rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        # The default of a head on cached features would be too large for whole images.
        batch_size = request.options.batch_size or min(BATCH, len(work.train))

        def batches(epoch: int) -> tf.data.Dataset:
            seed = epoch_seed(options.seed, epoch)
            view = seed if options.augment else None
            return work.train.batches(
                classifier.preprocess, batch_size, shuffle_seed=seed, view_seed=view
            ).dataset()

        held_out = work.held_out.batches(classifier.preprocess, EXTRACTION_BATCH)
        validation = held_out.dataset()
    with clock("train_s"):
        for epoch in range(stage.epochs):  # each has its own order and views
            history = model.fit(
                batches(epoch),
                initial_epoch=epoch,
                epochs=epoch + 1,
                shuffle=False,  # the dataset is shuffled
                validation_data=validation,
                callbacks=[times],
                verbose=2,
            )
    with clock("eval_s"):
        evaluation = summarize(*predict_logits(Compiled(model), held_out), work.held_out.groups)
    seconds = clock.seconds
    metrics = {
        "eval": evaluation,
        "train": {
            "epochs": stage.epochs,
            "steps": stage.epochs * -(-len(work.train) // batch_size),
            "final_loss": history.history["loss"][-1],
            "epoch_s": measurement.usual(times.seconds),
        },
        "time": {"extract_s": 0.0} | seconds,
        "throughput": {
            "extract_images_per_s": 0.0,
            "train_images_per_s": measurement.rate(
                stage.epochs * len(work.train), seconds["train_s"]
            ),
        },
        "memory": {"peak_rss_mb": measurement.peak_rss_mb()},
        "params": {
            "total": model.count_params(),
            "trainable": sum(int(v.value.shape.num_elements()) for v in model.trainable_variables),
        },
        "activations": {"computed": 0, "found": 0},
        "cut": work.last_cut,
        "seed": options.seed,
        "versions": measurement.versions(),
    }
    with run_folder.opened(work.run_dir, work.config):
        run_folder.write_json(work.run_dir / run_folder.METRICS, metrics)
    return metrics


class _EpochTimes(keras.callbacks.Callback):
    """Wall time of each epoch, without its validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        if self._start is not None:
            self.seconds.append(time.perf_counter() - self._start)
            self._start = None


class _InferenceMode(keras.layers.Layer):
    """``base(x, training=False)``, as in https://keras.io/guides/transfer_learning, even where
    a functional model passes another ``training`` to its layers."""

    def __init__(self, base: keras.layers.Layer):
        super().__init__(trainable=False)
        self.base = base

    def call(self, inputs: Any) -> Any:
        return self.base(inputs, training=False)
