"""Time, memory and disk space of a fine-tuning run at each cut, from a short measurement.

The forward pass of the network, reading images, and from each cut on a training step and the rest
of the forward pass are timed; those of parts that would not fit in memory are derived from the
shares of the multiply-adds. A run takes: setup + images up to the cut once + epochs of steps from
the cut on.
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
from transfer.finetuning.context import RunContext
from transfer.finetuning.defaults import EMA
from transfer.finetuning.hyperparameters import (
    StageRequest,
    default_batch_size,
    parameter_groups,
    resolve,
)
from transfer.finetuning.inputs import num_missing
from transfer.finetuning.label_smoothing import MARGIN_IMAGES
from transfer.finetuning.options import ResolvedOptions
from transfer.finetuning.stage import new_trainer
from transfer.graph.cuts import Cut, list_cuts
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
# At the end of each epoch a parameter, its best value and the three values of the optimizer, one of
# which is the moving average, are copied, and written while training goes on, which slows down its
# steps: as measured on two cores, for epochs of which each is the best so far, as is usual with the
# default label smoothing.
_CHECKPOINT_S = 5 * 4 * 5e-9
# Copies of a trained parameter in memory: gradient, three of the optimizer, four of the checkpoint.
_COPIES_IN_MEMORY = 8
# On disk: two checkpoints with the parameter and three values of the optimizer each.
_COPIES_ON_DISK = 8
_BYTES = 4
_KEPT = 10  # activations of a stage that are kept for the backward pass, relative to its output


@dataclass(frozen=True)
class PartSpeeds:
    """Measured times of the part from a cut on, in seconds.

    ``forward`` is that of an image in inference, ``train`` that of one in a training step, beyond
    that of the head; ``trace`` the time to trace the step.
    """

    forward: float
    train: float
    trace: float


@dataclass(frozen=True)
class Speeds:
    """Measured times in seconds.

    ``setup`` is the time until the first image is computed; ``start`` that until a pipeline has
    its first image; ``read`` the time by which reading, decoding and preprocessing lengthen the
    forward pass of an image, ``forward``, as they overlap with it. ``head_step`` is a training step
    of the head alone, ``head_trace`` the time to trace it; ``parts`` maps cuts to the parts from
    there on; ``update`` is the time of the optimizer for one parameter.
    """

    setup: float
    start: float
    read: float
    forward: float
    head_step: float
    head_trace: float
    parts: Mapping[str, PartSpeeds]
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
    context: RunContext, setup_s: float, ridge_s: float | None = None
) -> list[CutCost]:
    """Costs of a run for each stage of the network, from the tap to the input, and ``none``.

    Args:
        context: a run that has been set up; its classifier is changed by training steps.
        setup_s: the time that this took.
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
    # Before training steps, which change the weights that activations are cached for.
    missing = {name: num_missing(context, name) for name in map(_name, cuts)}
    speeds = _measure(context, cuts, setup_s)
    places: list[Cut | None] = [*reversed(cuts)]
    if cuts[0].trained + _before_first(context):  # else nothing in the backbone can be trained
        places.append(None)
    costs = [_cost(context, cut, cuts, speeds, memory, missing) for cut in places]
    if ridge_s is not None:
        head = costs[0]
        train_s = ridge_s + speeds.head_trace  # the evaluation is traced all the same
        total_s = head.total_s - head.train_s + train_s
        costs[0] = replace(head, solver="ridge", train_s=train_s, total_s=total_s)
    return costs


def _cost(
    context: RunContext,
    cut: Cut | None,
    cuts: list[Cut],
    speeds: Speeds,
    memory_mb: float,
    missing: Mapping[str, int],
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
    part = speeds.parts.get(name) or _derived(speeds, cut, cuts)
    before = 0.0 if cut is None else max(0.0, speeds.forward - part.forward)
    step = speeds.head_step + speeds.update * of_backbone
    of_image = part.train
    is_recomputed = options.augment and not options.views
    views = 0 if is_recomputed else max(1, options.views)
    of_frozen = before + speeds.read  # of an image that is not cached
    reads_images = cut is None or is_recomputed or options.cache == "off"
    starts = reads_images + (cut is None)  # of pipelines in an epoch: to train, and to validate
    if reads_images:
        of_image += of_frozen
        num_extracted = 0
    else:
        num_extracted = missing[name]
    validate = num_held_out * (part.forward + (of_frozen if cut is None else 0.0))
    epoch = steps * step + num_train * of_image + validate
    epoch += starts * speeds.start + _EPOCH_STEPS * speeds.head_step + _CHECKPOINT_S * trained
    extract = num_extracted * of_frozen + (2 * speeds.start if num_extracted else 0.0)
    train = epochs * epoch + part.trace
    evaluate = _EVALUATION * speeds.setup + validate
    setup = speeds.setup
    is_default = context.request.options.label_smoothing is None
    if is_default and not only_head and not options.is_mixed:
        # The default follows from features of some training images.
        setup += speeds.start + min(num_train, MARGIN_IMAGES) * (speeds.forward + speeds.read)

    stored = 0.0 if cut is None or cut.num_bytes is None else float(cut.num_bytes)
    of_training = 0.5 if options.cache_dtype == "float16" else 1.0
    stored *= of_training * num_train * views + num_held_out
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
        total_s=setup + extract + train + evaluate,
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
    start, per_image = _reading(layer, context, num_batches * EXTRACTION_BATCH)
    read = max(0.0, per_image - forward)
    head = _name(cuts[-1])
    of_head = _options(context, only_head=True)
    options = _options(context, only_head=False)
    head_step, head_trace = _step(context, of_head, head, *_part(context, head, EXTRACTION_BATCH))
    update = _update_seconds(options)
    whole = cuts[0].trained + _before_first(context)
    parts = {}
    for name, trained in {NONE: whole, **{_name(cut): cut.trained for cut in cuts}}.items():
        memory_mb = _COPIES_IN_MEMORY * _BYTES * trained / 1e6
        if trained and memory_mb < measurement.available_memory_mb() / 2:
            model, inputs = _part(context, name, size)
            step, trace = _step(context, options, name, model, inputs)
            train = max(0.0, step - head_step - update * trained) / size
            inference = forward if name == NONE else _inference_seconds(model, inputs) / size
            parts[name] = PartSpeeds(inference, train, trace)
    head_step *= _STEP_IN_RUN
    return Speeds(setup_s, start, read, forward, head_step, head_trace, parts, update)


def _reading(layer: Compiled, context: RunContext, num_images: int) -> tuple[float, float]:
    """Seconds until a pipeline has its first image, and to read and compute an image, while the
    next ones are read."""
    split = max(context.train, context.held_out, key=len)
    preprocess = context.classifier.preprocess

    def seconds(count: int) -> float:
        few = split.where(np.arange(len(split)) < count)
        start = time.perf_counter()
        for _ in stream(layer, few.batches(preprocess, EXTRACTION_BATCH)):
            pass
        return time.perf_counter() - start

    seconds(1)  # traces
    of_one, count = seconds(1), min(len(split), num_images)
    per_image = (seconds(count) - of_one) / max(1, count - 1)
    return max(0.0, of_one - per_image), max(0.0, per_image)


def _options(context: RunContext, *, only_head: bool) -> ResolvedOptions:
    """Those of a run at a cut: whether there is a moving average depends on it by default."""
    if context.request.options.ema is not None:
        return context.options
    return replace(context.options, ema=0.0 if only_head else EMA)


def _part(context: RunContext, cut: str, batch: int) -> tuple[keras.Model, np.ndarray]:
    """The part of the classifier from a cut on, and its inputs for a batch of random images."""
    frozen, model = context.classifier.split(cut)
    shape = (batch, *context.classifier.preprocess.shape)
    images = tf.random.stateless_uniform(shape, [0, 0])
    return model, np.asarray(images if frozen is None else frozen(images))


def _inference_seconds(model: keras.Model, inputs: np.ndarray) -> float:
    inference = Compiled(model)
    return _seconds(lambda: inference(inputs).numpy())


def _step(
    context: RunContext, options: ResolvedOptions, cut: str, model: keras.Model, inputs: np.ndarray
) -> tuple[float, float]:
    """Seconds of a training step of the part from a cut on, and of tracing it."""
    classifier, steps = context.classifier, context.steps_per_epoch
    request = StageRequest(cut, 1, 1e-9, 1.0)  # changes the weights by next to nothing
    stage = resolve(request, classifier, np.zeros((1, 1)), steps)
    trainer = new_trainer(context, model, parameter_groups(options, classifier, stage, steps))
    labels = np.zeros(len(inputs), np.int64)
    start = time.perf_counter()
    trainer.train_step(inputs, labels)
    first = time.perf_counter() - start
    seconds = _seconds(lambda: trainer.train_step(inputs, labels))
    return seconds, max(0.0, first - seconds)


def _update_seconds(options: ResolvedOptions, size: int = 2**22) -> float:
    """Seconds in which the optimizer updates one parameter."""
    variable = keras.Variable(np.zeros(size, np.float32))
    optimizer = make_optimizer(options.optimizer, 1e-9, ema=options.ema)
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


def _derived(speeds: Speeds, cut: Cut | None, cuts: list[Cut]) -> PartSpeeds:
    """The part from a cut on, where it was not measured."""
    forward = speeds.forward * (1.0 if cut is None else 1.0 - _share(cut, cuts))
    return PartSpeeds(forward, _FORWARD_AND_BACKWARD * forward, speeds.head_trace)


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
