"""The head before the first step of gradient descent, solved for on frozen features.

The gradients of a random head depend on its random values, and distort the pretrained features
before they can be of use. Fitting the head first avoids this: linear probing, then fine-tuning
(LP-FT, Kumar et al. 2022, arXiv 2202.10054).
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import keras
import numpy as np

from transfer.core.distribution import Replicas
from transfer.finetuning.context import RunContext
from transfer.finetuning.head_solution import describe, report_ridge, solve, training_features
from transfer.finetuning.inputs import Inputs

logger = logging.getLogger(__name__)


def solve_head(context: RunContext, inputs: Inputs, model: keras.Model) -> None:
    """Assign the solution of ridge regression to the head, and log how good it is.

    Args:
        context: the run; no weight was trained yet.
        inputs: of its first stage.
        model: the part that this stage trains.
    """
    *layers, _ = model.layers
    has_dropout = any(layer.network.training is not None for layer in layers)
    if context.options.dropout or has_dropout:
        logger.warning(
            "head_start=ridge solves for a head without dropout, and there is dropout in what is "
            "trained: the first steps may undo the solution; turn it off, that of the graph e.g. "
            "with feeds={'keep_prob:0': 1.0}"
        )
    if inputs.is_images:
        # The features of frozen runs, so that they are found in the cache, and cached for others.
        tap = context.classifier.feature_extractor.network.output.removesuffix(":0")
        # Layers with dropout draw seeds from this state: a resumed run does not make these layers,
        # and those of later stages must have the same seeds.
        state = random.getstate()
        frozen, model = context.classifier.split(tap)
        random.setstate(state)
        # Without augmentation, whose views differ in each epoch; of the weights that are trained.
        options = replace(context.options, augment=False, precision="float32")
        inputs = Inputs(replace(context, options=options), tap, frozen)
    features, labels = training_features(inputs, model)
    solution = solve(context, "ridge", features, labels)
    if context.replicas.num_workers > 1:  # processors differ in rounding, and workers must not
        solution = replace(
            solution,
            kernel=_of_chief(context.replicas, solution.kernel),
            bias=_of_chief(context.replicas, solution.bias),
        )
    solution.assign_to(context.classifier.head)
    report_ridge(solution, describe(solution, labels))
    held_out = inputs.evaluator(model)()
    logger.info(
        f"head_start: before the first step, held-out accuracy {held_out['accuracy']:.4f}, "
        f"log loss {held_out['loss']:.4f}"
    )


def _of_chief(replicas: Replicas, values: np.ndarray) -> np.ndarray:
    return replicas.gather(values if replicas.is_chief else values[:0])
