"""Label smoothing for the training of more than a head, from a head on frozen activations.

Training ends as certain of the training images as its loss asks for, and too certain of others. How
certain it may be of the former is known beforehand, roughly: nearly as certain as a head on the
pretrained activations of all layers that are trained, if its temperature makes it as certain of
left-out images as it should be.
"""

from __future__ import annotations

import logging
import random

import numpy as np

from transfer.activations.cache import default_directory
from transfer.activations.features import layer_features
from transfer.activations.samples import FOLDER as SAMPLES
from transfer.activations.store import CachePolicy
from transfer.data.dataset import Split
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.tap_choice import drawn
from transfer.layers.classifier import Classifier
from transfer.training.ridge import fit_ridge

logger = logging.getLogger(__name__)

MAX_SMOOTHING, SHARPENING = 0.1, np.log(2)
"""Most label smoothing; and how much less certain of the training images training should be than a
head, as it also fits the features to them. Measured in docs/fine-tuning.md."""
MARGIN_IMAGES, MAX_MARGIN_IMAGES = 500, 2000
"""Training images from which label smoothing is estimated, or more for many classes."""


def choose_smoothing(
    options: FineTuneOptions, train: Split, classifier: Classifier, model: str, cut: str
) -> float:
    """The label smoothing of a run that trains what follows a cut; see ``head_margin``."""
    # The run is that with this label smoothing, given: layers with dropout draw seeds.
    state = random.getstate()
    margin = head_margin(options, train, classifier, model, cut)
    random.setstate(state)
    if margin is None:
        return 0.0
    smoothing = smoothing_for(margin, len(classifier.labels), len(train))
    logger.info(
        f"label_smoothing: {smoothing:g}; a head on the layers to be trained, frozen, that is "
        f"calibrated in cross-validation has a margin of {margin:.1f} on its training images"
    )
    return smoothing


def smoothing_for(margin: float, num_classes: int, num_images: int) -> float:
    """The label smoothing for a margin of the logits.

    The loss is lowest where the log odds of the smoothed label of an image and of another class are
    the margin, less ``SHARPENING``. To this comes Laplace's estimate of the rate of errors from
    images without one, 1 / (num_images + 2), as in the calibration of the head.
    """
    odds = np.exp(margin - SHARPENING)
    smoothing = num_classes / (odds + num_classes - 1) + 1 / (num_images + 2)
    return round(float(min(MAX_SMOOTHING, smoothing)), 4)


def head_margin(
    options: FineTuneOptions, train: Split, classifier: Classifier, model: str, cut: str
) -> float | None:
    """How much the logit of an image's class exceeds the mean of the others, 0 or more, with a head
    on all activations after a cut, on the training images that it is fitted to. Its temperature is
    that with which the predictions of each image from the others have the lowest log loss.

    ``None`` if no class has images that could be left out.

    Args:
        options: of the run.
        train: its training images.
        classifier: before training.
        model: name of the pretrained model.
        cut: name of a tensor, or ``none`` for the activations of the whole network.
    """
    few = drawn(train, MARGIN_IMAGES, options.seed)
    if len(few) > MAX_MARGIN_IMAGES:  # of very many classes
        few = few.where(np.isin(few.labels, np.unique(few.labels)[:: len(few) // MARGIN_IMAGES]))
    present, classes = np.unique(few.labels, return_inverse=True)
    if len(present) < 2:
        return None
    on_disk = options.cache == "disk" and not options.random_weights
    folder = (options.cache_dir or default_directory()) / SAMPLES
    features = layer_features(
        classifier.feature_extractor.activations(None if cut == "none" else cut),
        few,
        classifier.preprocess,
        model,
        CachePolicy("disk" if on_disk else "memory", folder, options.cache_limit),
    )
    solution = fit_ridge(features, classes, len(present), groups=few.groups)
    if solution.out_of_sample is None:
        return None
    logits = solution.logits(features)
    own = logits[np.arange(len(classes)), classes]
    others = (logits.sum(-1) - own) / (len(present) - 1)
    return max(0.0, float((own - others).mean()))
