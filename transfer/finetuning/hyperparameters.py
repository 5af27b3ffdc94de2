"""The stages of a fine-tuning run: the cut, epochs and learning rates of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import keras
import numpy as np

from transfer.finetuning.options import FineTuneOptions, ResolvedOptions
from transfer.graph import is_seeded
from transfer.graph.cuts import blocks, list_cuts, stopped
from transfer.layers.backbone import Backbone
from transfer.layers.classifier import Classifier
from transfer.layers.graph_layer import GraphLayer
from transfer.training.optimizers import cosine, make_optimizer
from transfer.training.ridge import is_solvable
from transfer.training.trainer import ParameterGroup

# For a head on cached features, whose steps are cheap.
HEAD_LEARNING_RATE, HEAD_WIDTH, HEAD_STEPS, HEAD_EPOCHS = 6e-3, 512, 2000, (5, 200)
# A VGG without batch norm diverges or stalls at 1e-3.
BACKBONE_LEARNING_RATE, BACKBONE_STEPS, BACKBONE_EPOCHS = 1e-4, 900, (3, 60)
BATCH, MAX_HEAD_BATCH = 32, 4096


@dataclass(frozen=True)
class StageRequest:
    """A stage as given by the options; ``resolve`` replaces each ``None``.

    ``cut`` is a tensor name, a short name of a tensor, ``tap`` or ``none``. ``is_head_solved``: the
    stage starts from a head that was solved for, not from a random one. ``freeze_from`` is a tensor
    after the cut, whose name may be short.
    """

    cut: str
    epochs: int | None
    learning_rate: float | None
    backbone_lr_scale: float | None = None
    is_head_solved: bool = False
    freeze_from: str | None = None


@dataclass(frozen=True)
class Stage:
    """A number of epochs with everything up to a tensor frozen.

    ``cut`` is the name of the tensor without ``:0``, or ``none``. ``learning_rate`` is the
    head's; the backbone's is ``backbone_lr_scale`` times that. What follows ``freeze_from``, up to
    the head, is frozen too.
    """

    cut: str
    epochs: int
    learning_rate: float
    backbone_lr_scale: float
    freeze_from: str | None = None

    def __str__(self) -> str:
        return f"{self.cut}:{self.epochs}:{self.learning_rate}"


def requested_stages(options: FineTuneOptions) -> list[StageRequest]:
    """The stages that the options specify.

    Raises:
        ValueError: if the schedule is not of the form ``CUT:EPOCHS[:RATE],...``.
    """
    is_solved = options.head_start == "ridge"
    if options.schedule is None:
        stage = StageRequest(
            options.freeze_until,
            options.epochs,
            options.learning_rate,
            options.backbone_lr_scale,
            is_head_solved=is_solved,
            freeze_from=options.freeze_from,
        )
        if stage.freeze_from is not None and stage.cut == "tap":  # the default
            stage = replace(stage, cut="none")
        return [stage]
    if options.epochs is not None:
        raise ValueError("schedule has its own epochs; leave epochs=N out")
    # In later stages the head is already trained: it needs no separate learning rate.
    scale = 1.0 if options.backbone_lr_scale is None else options.backbone_lr_scale
    stages = [_parse(part, options.learning_rate, scale) for part in options.schedule.split(",")]
    return [replace(stages[0], is_head_solved=is_solved), *stages[1:]]


def _parse(part: str, default_rate: float | None, scale: float) -> StageRequest:
    # A tensor's name may end in :0, which is not a number of epochs.
    words = part.strip().replace(":0:", ":").split(":")
    try:
        cut, epochs, *rate = words
        stage = StageRequest(cut, int(epochs), float(rate[0]) if rate else default_rate, scale)
        is_positive = stage.learning_rate is None or 0 < stage.learning_rate < math.inf
        if cut and len(rate) < 2 and int(epochs) > 0 and is_positive:
            return stage
    except ValueError:
        pass
    raise ValueError(
        f"schedule={part!r}: expected CUT:EPOCHS or CUT:EPOCHS:RATE, like 'fc7:20,none:3:0.0001'"
    )


def trains_cached_head(options: FineTuneOptions, backbone: Backbone, num_workers: int) -> bool:
    """Whether all stages of a run train only a head, by gradient descent, on features that are
    computed once; see ``inputs.Inputs``.

    Args:
        options: the options of the run.
        backbone: the network up to the tap.
        num_workers: number of processes that train together.
    """
    if options.solver != "gradient" or options.cache == "off":
        return False
    if (options.augment and not options.views) or (options.is_mixed and num_workers > 1):
        return False
    return trains_head_only(options, backbone) and not is_seeded(backbone.network.graph_def)


def trains_head_only(options: FineTuneOptions, backbone: Backbone) -> bool:
    """Whether the cut of each stage of a run is the tap."""
    cuts = {stage.cut for stage in requested_stages(options)} - {"tap"}
    return "none" not in cuts and all(
        backbone.tensor(cut) == backbone.network.output for cut in cuts
    )


def choose_solver(
    options: FineTuneOptions, backbone: Backbone, num_images: int, width: int
) -> Literal["gradient", "ridge", "lbfgs"]:
    """The solver of a run; for ``auto``, ridge where the run only fits a linear head to features
    that are computed once and ``is_solvable``, and no option of gradient descent was given.

    Args:
        options: the options of the run.
        backbone: the network up to the tap.
        num_images: number of training images.
        width: number of features of an image.
    """
    if options.solver != "auto":
        return options.solver
    if options.lbfgs_c is not None:
        return "lbfgs"
    # Without a cache, a solver computes the features once all the same.
    cached = replace(options, solver="gradient", cache="memory")
    if options.of_gradient_descent or not trains_cached_head(cached, backbone, 1):
        return "gradient"
    return "ridge" if is_solvable(num_images * max(1, options.views), width) else "gradient"


def default_batch_size(num_images: int, *, is_cached_head: bool) -> int:
    """Images per step: 32, or all if there are fewer; for a head on cached features of 25,600
    images or more, the largest power of two, up to 4096, with which the smallest number of epochs
    still takes ``HEAD_STEPS`` steps.

    A step with few images mostly moves weights and the optimizer's state through memory. The
    learning rate does not grow with the batch: scaling rules (for Adam the square root, arXiv
    2205.10287) make up for fewer steps, and these are as many as for the small datasets for which
    the rate was chosen. On 60,000 images, the square root gives worse heads.

    Args:
        num_images: number of training images.
        is_cached_head: whether all stages train only a head, on cached features.
    """
    batch = BATCH
    if is_cached_head:
        while batch < MAX_HEAD_BATCH and num_images * HEAD_EPOCHS[0] >= HEAD_STEPS * 2 * batch:
            batch *= 2
    return min(batch, num_images)


def default_epochs(steps_per_epoch: int, *, only_head: bool) -> int:
    """The epochs of about 2000 steps for a head, 900 for more, within limits."""
    steps, (fewest, most) = (
        (HEAD_STEPS, HEAD_EPOCHS) if only_head else (BACKBONE_STEPS, BACKBONE_EPOCHS)
    )
    return min(max(-(-steps // steps_per_epoch), fewest), most)


def resolve(
    request: StageRequest,
    classifier: Classifier,
    features: np.ndarray,
    steps_per_epoch: int,
) -> Stage:
    """Replace the ``None`` values of a stage request by defaults.

    Args:
        request: its cut may be ``tap``, or a short name.
        classifier: a built classifier.
        features: float ``[images, width]``, inputs of the head for a few images.
        steps_per_epoch: training steps per epoch.

    Raises:
        ValueError: if the cut or ``freeze_from`` is not a tensor, or does not separate the input
            from the tap; or if the whole network, or a part up to ``freeze_from``, is to be trained
            and has no trainable variables.
    """
    backbone, cut = classifier.backbone, request.cut
    if cut == "tap":
        cut = backbone.network.output.removesuffix(":0")
    elif cut != "none":
        cut = backbone.tensor(cut).removesuffix(":0")
    trained = backbone if cut == "none" else backbone.split(cut)[1]
    freeze_from = request.freeze_from
    if freeze_from is not None:
        trained, freeze_from = _before(trained, freeze_from, cut)
    only_head = not any(variable.trainable for variable in trained.graph_variables)
    if only_head and freeze_from is not None:
        raise ValueError(
            f"freeze_from={freeze_from} leaves nothing to train: there are no weights between "
            f"{'the input' if cut == 'none' else cut} and this tensor"
        )
    if only_head and cut == "none":
        raise ValueError(
            "nothing in the backbone can be trained: its weights are constants of the graph; "
            "leave freeze_until out to train a head only"
        )
    rate, scale = request.learning_rate, request.backbone_lr_scale
    if rate is None and (only_head or scale is None):
        rate = head_learning_rate(features, is_solved=request.is_head_solved)
        scale = BACKBONE_LEARNING_RATE / rate if scale is None else scale
    elif rate is None:
        rate = BACKBONE_LEARNING_RATE
    epochs = request.epochs
    if epochs is None:
        epochs = default_epochs(steps_per_epoch, only_head=only_head)
    return Stage(cut, epochs, rate, 1.0 if scale is None else scale, freeze_from)


def _before(trained: GraphLayer, freeze_from: str, cut: str) -> tuple[GraphLayer, str]:
    """The part of the trained layers up to a tensor, and the tensor's name without ``:0``."""
    try:
        tensor = trained.tensor(freeze_from)
        return trained.split(tensor)[0], tensor.removesuffix(":0")
    except ValueError as error:
        names = [item.tensor.removesuffix(":0") for item in list_cuts(trained.network)[:-1]]
        after = "" if cut == "none" else f" after freeze_until={cut}"
        raise ValueError(
            f"freeze_from={freeze_from}: {error}; the cuts{after} are {', '.join(names) or 'none'}"
        ) from error


def head_learning_rate(features: np.ndarray, *, is_solved: bool = False) -> float:
    """Adam's learning rate for a head: 0.006 for up to 512 features with RMS 1; for a head that was
    solved for, which the first steps would undo, 0.0001.

    Adam moves each weight by the learning rate, so a logit moves by the rate times the sum of the
    features: small features need a higher rate, many features a lower one (arXiv 2203.03466,
    table 3).

    Args:
        features: float ``[images, width]``.
        is_solved: the head is not random.
    """
    at_unit_scale = BACKBONE_LEARNING_RATE if is_solved else HEAD_LEARNING_RATE
    rate = at_unit_scale / rms(features) * min(1, HEAD_WIDTH / features.shape[1])
    return float(f"{rate:.2g}")


def rms(features: np.ndarray) -> float:
    """Root mean square (RMS); 1 if all values are zero."""
    return float(np.sqrt(np.mean(np.square(features)))) or 1.0


def parameter_groups(
    options: ResolvedOptions, classifier: Classifier, stage: Stage, steps_per_epoch: int
) -> list[ParameterGroup]:
    """Optimizers and the variables they update: the head's, then those of the backbone's blocks."""
    _, trained = classifier.split(stage.cut, stage.freeze_from)
    head = classifier.head.trainable_variables
    rates = [(stage.learning_rate, head)]
    suffix = trained.layers[0]
    for distance, block in enumerate(_trainable_blocks(suffix)):
        scale = stage.backbone_lr_scale * options.block_lr_decay**distance
        rates.append((stage.learning_rate * scale, block))
    total = steps_per_epoch * stage.epochs
    is_cosine = options.lr_schedule == "cosine"
    if options.lr_schedule == "auto":
        is_cosine = len(rates) > 1
    warmup = min(round(options.warmup_epochs * steps_per_epoch), total // 10)
    return [
        ParameterGroup(
            make_optimizer(
                options.optimizer,
                cosine(rate, total, warmup) if is_cosine else rate,
                weight_decay=options.weight_decay,
                accumulate=options.accumulate,
                ema=options.ema,
            ),
            variables,
        )
        for rate, variables in _merged(rates)
    ]


def _trainable_blocks(layer: GraphLayer) -> Iterable[list[keras.Variable]]:
    """The trained variables of a layer by block, starting with the block nearest to the head."""
    by_name = dict(zip(layer.variable_names, layer.graph_variables, strict=True))
    untrained = {name for names in stopped(layer.network).values() for name in names}
    for block in reversed(blocks(layer.network)):
        names = [name for name in block if by_name[name].trainable and name not in untrained]
        if names:
            yield [by_name[name] for name in names]


def _merged(
    rates: list[tuple[float, list[keras.Variable]]],
) -> list[tuple[float, list[keras.Variable]]]:
    """Merge groups with the same rate, to have one optimizer per rate."""
    by_rate: dict[float, list[keras.Variable]] = {}
    for rate, variables in rates:
        by_rate.setdefault(rate, []).extend(variables)
    return list(by_rate.items())
