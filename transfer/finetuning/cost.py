"""Time, memory and disk space of a fine-tuning run at each cut, from a short measurement.

The forward pass of the network, reading images, and a training step of the head and of the whole
network are timed. The parts before and after a cut take their shares of the multiply-adds. A run
takes: setup + images up to the cut once + epochs of steps from the cut on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled, stream
from transfer.core import measurement
from transfer.data.dataset import Split
from transfer.finetuning.context import RunContext
from transfer.finetuning.hyperparameters import (
    StageRequest,
    default_batch_size,
    parameter_groups,
    resolve,
)
from transfer.finetuning.stage import new_trainer
from transfer.graph.cuts import Cut, list_cuts
from transfer.images.preprocess import Preprocess
from transfer.training.optimizers import make_optimizer

logger = logging.getLogger(__name__)

NONE = "none"
_LARGEST_PASS = 20e9  # multiply-adds of one timed forward pass
_TIMED_S, _MIN_REPEAT = 1.0, 2  # long enough to include what else the machine is doing
# A backward pass computes the gradients of inputs and of kernels: twice the forward pass.
_FORWARD_AND_BACKWARD = 3.0
# A step in a run also gathers its batch and calls the callbacks: relative to the step alone, for a
# head. The fixed time of an epoch (validation, checkpoint, history) in such steps, and that of the
# evaluation at the end, which writes and loads the model, relative to set-up.
_STEP_IN_RUN, _EPOCH_STEPS, _EVALUATION = 1.8, 25, 0.2
# Copies of a trained parameter in memory: gradient, two of the optimizer, three of the checkpoint.
_COPIES_IN_MEMORY = 6
# On disk: two checkpoints with the parameter and two values of the optimizer each.
_COPIES_ON_DISK = 6
_BYTES = 4
_KEPT = 10  # activations of a stage that are kept for the backward pass, relative to its output


@dataclass(frozen=True)
class Speeds:
    """Measured times in seconds.

    ``setup`` is the time until the first image is computed; ``read`` the time by which reading,
    decoding and preprocessing lengthen the forward pass of an image, ``forward``, as they overlap
    with it. ``head_step`` is a training step of the head alone, ``head_trace`` the time to trace
    it, ``whole_trace`` that of the whole network; ``step_factor`` is the time of a training step
    relative to the forward pass of its images; ``update`` that of the optimizer for one parameter.
    """

    setup: float
    read: float
    forward: float
    head_step: float
    head_trace: float
    whole_trace: float
    step_factor: float
    update: float


@dataclass(frozen=True)
class CutCost:
    """Estimates for a run with a cut.

    ``extract_s`` computes the activations at the cut, ``train_s`` is the training, ``total_s`` the
    whole run, from the opened model to the evaluated classifier; ``memory_mb`` the peak memory,
    ``disk_mb`` the activations and the run folder, in MB of 1e6 bytes; ``trained`` the number of
    trained parameters. With the ``solver`` ``ridge`` there are no epochs.
    """

    cut: str
    epochs: int
    extract_s: float
    train_s: float
    total_s: float
    memory_mb: float
    disk_mb: float
    trained: int
    solver: str = "gradient"


def measure_costs(
    context: RunContext,
    setup_s: float,
    cached: Mapping[str, int] | None = None,
    ridge_s: float | None = None,
) -> list[CutCost]:
    """Costs of a run for each stage of the network, from the tap to the input, and ``none``.

    Args:
        context: a run that has been set up; its classifier is changed by training steps.
        setup_s: the time that this took.
        cached: maps cuts to the number of training images whose activations are in the cache.
        ridge_s: the seconds to solve for the head, if the run does not train it in epochs.

    Raises:
        ValueError: if the network has no layers.
    """
    network = context.classifier.feature_extractor.network
    preprocess = context.classifier.preprocess
    cuts = [cut for cut in list_cuts(network, preprocess.size) if cut.ends_stage]
    if not cuts:
        raise ValueError("the network has no layers with weights before its tap, so no cuts")
    memory = measurement.peak_rss_mb()
    speeds = _measure(context, cuts, setup_s)
    places: list[Cut | None] = [*reversed(cuts)]
    if cuts[0].trained + _before_first(context):  # else nothing in the backbone can be trained
        places.append(None)
    costs = [_cost(context, cut, cuts, speeds, memory, cached or {}) for cut in places]
    if ridge_s is not None:
        head = costs[0]
        saved = head.train_s - ridge_s - speeds.head_trace  # the evaluation is traced all the same
        costs[0] = replace(
            head, solver="ridge", train_s=head.train_s - saved, total_s=head.total_s - saved
        )
    return costs


def _cost(
    context: RunContext,
    cut: Cut | None,
    cuts: list[Cut],
    speeds: Speeds,
    memory_mb: float,
    cached: Mapping[str, int],
) -> CutCost:
    options, head = context.options, context.classifier.head
    name = NONE if cut is None else _name(cut)
    num_train, num_held_out = len(context.train), len(context.held_out)
    only_head = cut is not None and not cut.trained
    batch = context.request.options.batch_size or default_batch_size(
        num_train, is_cached_head=only_head and options.cache != "off"
    )
    steps = -(-num_train // batch)
    rate = options.learning_rate or 1.0  # given, so that no features are needed to choose it
    request = StageRequest(name, options.epochs, rate, options.backbone_lr_scale)
    epochs = resolve(request, context.classifier, np.zeros((1, 1)), steps).epochs

    of_head = sum(math.prod(variable.shape) for variable in head.trainable_variables)
    of_backbone = cuts[0].trained + _before_first(context) if cut is None else cut.trained
    trained = of_head + of_backbone
    before = 0.0 if cut is None else speeds.forward * _share(cut, cuts)
    after = speeds.forward - before
    step = speeds.head_step + batch * speeds.step_factor * after
    step += speeds.update * of_backbone
    is_recomputed = options.augment and not options.views
    views = 0 if is_recomputed else max(1, options.views)
    of_frozen = before + speeds.read  # of an image that is not cached
    if cut is None or is_recomputed or options.cache == "off":
        step += batch * of_frozen
        num_extracted = 0
    else:
        num_extracted = num_held_out + max(0, num_train * views - cached.get(name, 0))
    validate = num_held_out * (after + (of_frozen if cut is None else 0.0))
    epoch = steps * step + validate + _EPOCH_STEPS * speeds.head_step
    trained_share = after / speeds.forward if speeds.forward else 1.0
    trace = speeds.head_trace + trained_share * max(0.0, speeds.whole_trace - speeds.head_trace)
    extract = num_extracted * of_frozen
    train = epochs * epoch + trace
    evaluate = _EVALUATION * speeds.setup + validate

    stored = 0.0 if cut is None or cut.num_bytes is None else float(cut.num_bytes)
    stored *= (num_train * views + num_held_out) * (0.5 if options.cache_dtype == "float16" else 1)
    in_memory = _COPIES_IN_MEMORY * _BYTES * trained + batch * _kept_bytes(cut, cuts)
    in_memory += stored if options.cache == "memory" else 0.0
    model = _BYTES * context.classifier.count_params()
    on_disk = model + _COPIES_ON_DISK * _BYTES * trained
    on_disk += stored if options.cache == "disk" else 0.0
    return CutCost(
        cut=name,
        epochs=epochs,
        extract_s=extract,
        train_s=train,
        total_s=speeds.setup + extract + train + evaluate,
        memory_mb=memory_mb + in_memory / 1e6,
        disk_mb=on_disk / 1e6,
        trained=trained,
    )


def _measure(context: RunContext, cuts: list[Cut], setup_s: float) -> Speeds:
    classifier, backbone = context.classifier, context.classifier.feature_extractor
    preprocess = classifier.preprocess
    size, num_batches, work = EXTRACTION_BATCH, 12, cuts[-1].multiply_adds or 0
    if size * work > _LARGEST_PASS:
        size, num_batches = max(4, int(_LARGEST_PASS / work)), 4
    layer = Compiled(backbone.split(cuts[-1].tensor)[0])
    images = tf.random.stateless_uniform([size, *preprocess.shape], [0, 0])
    forward = _seconds(lambda: layer(images).numpy()) / size
    few = context.train.where(np.arange(len(context.train)) < num_batches * EXTRACTION_BATCH)
    read = max(0.0, _seconds_per_image(layer, few, preprocess) - forward)
    head_step, head_trace = _step(context, _name(cuts[-1]), EXTRACTION_BATCH)
    head_step *= _STEP_IN_RUN
    update = _update_seconds(context)
    factor, whole_trace = _FORWARD_AND_BACKWARD, head_trace
    trained = cuts[0].trained + _before_first(context)
    fits = _COPIES_IN_MEMORY * _BYTES * trained / 1e6 < measurement.available_memory_mb() / 2
    if trained and fits and forward:
        seconds, whole_trace = _step(context, NONE, size)
        factor = max((seconds - head_step - update * trained) / (size * forward), 1.0)
    return Speeds(setup_s, read, forward, head_step, head_trace, whole_trace, factor, update)


def _seconds_per_image(layer: Compiled, split: Split, preprocess: Preprocess) -> float:
    """Seconds to read and compute an image, while the next ones are read; without the start of the
    pipeline, if there are several batches."""
    start = time.perf_counter()
    ends = []
    for _ in stream(layer, split.batches(preprocess, EXTRACTION_BATCH)):
        ends.append(time.perf_counter())
    if len(ends) < 3:
        return (ends[-1] - start) / len(split)
    return (ends[-1] - ends[0]) / (len(split) - EXTRACTION_BATCH)


def _step(context: RunContext, cut: str, batch: int) -> tuple[float, float]:
    """Seconds of a training step with a cut, for random inputs, and of tracing it."""
    classifier = context.classifier
    frozen, model = classifier.split(cut)
    steps = context.steps_per_epoch
    request = StageRequest(cut, 1, 1e-9, 1.0)  # changes the weights by next to nothing
    stage = resolve(request, classifier, np.zeros((1, 1)), steps)
    trainer = new_trainer(
        context, model, parameter_groups(context.options, classifier, stage, steps)
    )
    shape = (batch, *classifier.preprocess.shape)
    inputs = tf.random.stateless_uniform(shape, [0, 0])
    inputs = inputs.numpy() if frozen is None else np.asarray(frozen(inputs))
    labels = np.zeros(batch, np.int64)
    start = time.perf_counter()
    trainer.train_step(inputs, labels)
    first = time.perf_counter() - start
    seconds = _seconds(lambda: trainer.train_step(inputs, labels))
    return seconds, max(0.0, first - seconds)


def _update_seconds(context: RunContext, size: int = 2**22) -> float:
    """Seconds in which the optimizer updates one parameter."""
    variable = keras.Variable(np.zeros(size, np.float32))
    optimizer = make_optimizer(context.options.optimizer, 1e-9)
    optimizer.build([variable])
    gradient = tf.ones(size)
    return _seconds(lambda: optimizer.apply([gradient], [variable])) / size


def _before_first(context: RunContext) -> int:
    """Trainable parameters up to the first cut, which ``Cut.trained`` does not count."""
    network = context.classifier.feature_extractor.network
    total = sum(math.prod(v.shape or ()) for v in network.variables if v.trainable)
    cuts = [cut for cut in list_cuts(network) if cut.ends_stage]
    return total - cuts[0].trained


def _kept_bytes(cut: Cut | None, cuts: list[Cut]) -> float:
    """Bytes of the activations of an image that the backward pass from a cut on needs, roughly: in
    a VGG, a stage has two or three layers, each with four times its pooled output."""
    sizes = [float(other.num_bytes or 0) for other in cuts]
    first = 0 if cut is None else cuts.index(cut) + 1
    return _KEPT * sum(sizes[first:]) + (0.0 if cut is None else sizes[first - 1])


def _share(cut: Cut, cuts: list[Cut]) -> float:
    """Share of the arithmetic up to a cut; of the cuts, if shapes are unknown."""
    return (cuts.index(cut) + 1) / len(cuts) if cut.share is None else cut.share


def _name(cut: Cut) -> str:
    return cut.tensor.removesuffix(":0")


def _seconds(work: Callable[[], object]) -> float:
    """Mean wall time of several repetitions, after a first one."""
    work()
    count, start = 0, time.perf_counter()
    while count < _MIN_REPEAT or time.perf_counter() - start < _TIMED_S:
        work()
        count += 1
    return (time.perf_counter() - start) / count
