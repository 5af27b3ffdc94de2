"""The stages of a fine-tuning run: where each cuts, for how long and how fast it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import keras
import numpy as np

from recipes.finetune import FinetuneConfig, cut_of
from transfer.backbone import GraphLayer
from transfer.classifier import Classifier
from transfer.cuts import blocks, stopped
from transfer.optimizers import cosine, make_optimizer
from transfer.training import ParameterGroup

# A head on kept features: its steps cost next to nothing.
HEAD_LEARNING_RATE, HEAD_WIDTH, HEAD_STEPS, HEAD_EPOCHS = 6e-3, 512, 2000, (5, 200)
# A VGG without batch norm diverges or stalls at 1e-3.
BACKBONE_LEARNING_RATE, BACKBONE_STEPS, BACKBONE_EPOCHS = 1e-4, 900, (3, 60)


@dataclass(frozen=True)
class Stage:
    """Some epochs with everything up to a tensor frozen.

    ``cut`` is the name of the tensor without its ``:0``, or ``none``; ``learning_rate`` is the
    head's, and that of the backbone is ``backbone_lr_scale`` times it. What is ``None`` is to be
    chosen.
    """

    cut: str
    epochs: int | None
    learning_rate: float | None
    backbone_lr_scale: float | None = None

    def __str__(self) -> str:
        return ":".join(str(v) for v in (self.cut, self.epochs, self.learning_rate) if v)


def asked_for(config: FinetuneConfig) -> list[Stage]:
    """The stages that the flags name.

    Raises:
        ValueError: if the schedule is not of the form ``CUT:EPOCHS[:RATE],...``.
    """
    if config.schedule is None:
        scale = config.backbone_lr_scale
        return [Stage(config.freeze_until, config.epochs, config.learning_rate, scale)]
    if config.epochs is not None:
        raise ValueError("--schedule has epochs of its own; leave --epochs out")
    # The head of a later stage is trained already: it needs no rate of its own.
    scale = 1.0 if config.backbone_lr_scale is None else config.backbone_lr_scale
    return [_parse(part, config.learning_rate, scale) for part in config.schedule.split(",")]


def _parse(part: str, default_rate: float | None, scale: float) -> Stage:
    # A tensor's name may end in :0, which is not a number of epochs.
    words = part.strip().replace(":0:", ":").split(":")
    try:
        cut, epochs, *rate = words
        stage = Stage(cut, int(epochs), float(rate[0]) if rate else default_rate, scale)
        if cut and len(rate) < 2 and stage.epochs > 0 and not (stage.learning_rate or 0) < 0:
            return stage
    except ValueError:
        pass
    raise ValueError(
        f"--schedule {part!r}: expected CUT:EPOCHS or CUT:EPOCHS:RATE, like 'fc7:20,none:3:0.0001'"
    )


def resolve(
    stage: Stage,
    classifier: Classifier,
    tap: str,
    features: np.ndarray,
    steps_per_epoch: int,
) -> Stage:
    """The stage with nothing left to default.

    Args:
        stage: as asked for; its cut may be ``tap``, or a short name.
        classifier: built.
        tap: the tensor with the features.
        features: ``[images, width]`` of a few, as the head gets them.
        steps_per_epoch: on the training images.

    Raises:
        ValueError: if the cut is no tensor, or does not separate the input from the tap; or if all
            was to be trained and nothing in the backbone can be.
    """
    backbone, cut = classifier.backbone, stage.cut
    if cut == "tap":
        cut = tap.removesuffix(":0")
    elif cut != "none":
        cut = backbone.tensor(cut).removesuffix(":0")
    trained = backbone if cut == "none" else backbone.split(cut)[1]
    only_head = not any(variable.trainable for variable in trained.graph_variables)
    if only_head and cut == "none":
        raise ValueError(
            "nothing in the backbone can be trained: its weights are constants of the graph; "
            "leave --freeze-until out to train a head only"
        )
    rate, scale = stage.learning_rate, stage.backbone_lr_scale
    if rate is None and (only_head or scale is None):
        rate = head_learning_rate(features)
        scale = BACKBONE_LEARNING_RATE / rate if scale is None else scale
    elif rate is None:
        rate = BACKBONE_LEARNING_RATE
    epochs = stage.epochs
    if epochs is None:
        steps, (least, most) = (
            (HEAD_STEPS, HEAD_EPOCHS) if only_head else (BACKBONE_STEPS, BACKBONE_EPOCHS)
        )
        epochs = min(max(-(-steps // steps_per_epoch), least), most)
    return Stage(cut, epochs, rate, 1.0 if scale is None else scale)


def head_learning_rate(features: np.ndarray) -> float:
    """For Adam, 0.006 for up to 512 features with a root mean square of 1.

    Adam moves all weights by the learning rate, so that a logit moves by the rate times the sum of
    the features: smaller features want a higher one, and more features a lower one (arXiv
    2203.03466, table 3).
    """
    rate = HEAD_LEARNING_RATE / rms(features) * min(1, HEAD_WIDTH / features.shape[1])
    return float(f"{rate:.2g}")


def rms(features: np.ndarray) -> float:
    """Root mean square; 1 where all are zero."""
    return float(np.sqrt(np.mean(np.square(features)))) or 1.0


def parameter_groups(
    config: FinetuneConfig, classifier: Classifier, stage: Stage, steps_per_epoch: int
) -> list[ParameterGroup]:
    """Which optimizer updates which variables: the head's, then the backbone's by block."""
    _, trained = classifier.split(cut_of(stage.cut))
    head = classifier.head.trainable_variables
    rates = [(stage.learning_rate, head)]
    suffix = trained.layers[0]
    for distance, block in enumerate(_trainable_blocks(suffix)):
        scale = stage.backbone_lr_scale * config.block_lr_decay**distance
        rates.append((stage.learning_rate * scale, block))
    total = steps_per_epoch * stage.epochs
    is_cosine = config.lr_schedule == "cosine"
    if config.lr_schedule == "auto":
        is_cosine = len(rates) > 1
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 10)
    return [
        ParameterGroup(
            make_optimizer(
                config.optimizer,
                cosine(rate, total, warmup) if is_cosine else rate,
                weight_decay=config.weight_decay,
                accumulate=config.accumulate,
            ),
            variables,
        )
        for rate, variables in _merged(rates)
    ]


def _trainable_blocks(layer: GraphLayer) -> Iterable[list[keras.Variable]]:
    """The variables of a layer that are trained, by block, the block nearest to the head first."""
    by_name = dict(zip(layer.variable_names, layer.graph_variables, strict=True))
    untrained = {name for names in stopped(layer.network).values() for name in names}
    for block in reversed(blocks(layer.network)):
        names = [name for name in block if by_name[name].trainable and name not in untrained]
        if names:
            yield [by_name[name] for name in names]


def _merged(
    rates: list[tuple[float, list[keras.Variable]]],
) -> list[tuple[float, list[keras.Variable]]]:
    """Groups of one rate as one, so that there are no more optimizers than rates."""
    by_rate: dict[float, list[keras.Variable]] = {}
    for rate, variables in rates:
        by_rate.setdefault(rate, []).extend(variables)
    return list(by_rate.items())
