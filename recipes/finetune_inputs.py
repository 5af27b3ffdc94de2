"""What the trained part of a classifier is fed with: kept activations, or else images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras

from recipes.finetune_activations import Keeper, Wanted
from recipes.finetune_setup import Job
from transfer.backbone import GraphLayer
from transfer.data import Split
from transfer.evaluation import predict, summarize
from transfer.features import EXTRACTION_BATCH, Activations, compiled, stream
from transfer.surgery import is_seeded
from transfer.training import epoch_seed


class Inputs:
    """Training and evaluation inputs of a stage.

    Activations at the cut are computed once and kept, on disk or in memory, where there is a frozen
    part and the same image always gives the same. Random views are kept if there is a fixed number
    of them; what is evaluated on has none.

    ``num_extracted`` images were computed now, ``num_found`` were there already.
    """

    def __init__(self, job: Job, cut: str, frozen: GraphLayer | None):
        self._job = job
        self._layer = frozen
        self._frozen = None if frozen is None else compiled(frozen)
        self.num_extracted = self.num_found = 0
        config = job.config
        self._held_out = self._train = None
        if frozen is None or is_seeded(frozen.network.graph_def):
            return
        views = [epoch_seed(config.seed, view) for view in range(config.views)] or [None]
        if config.augment and not config.views:
            views = []  # new ones in each epoch
        wanted = [Wanted("held-out", job.held_out, None)]
        wanted += [Wanted("training", job.train, view) for view in views]
        keeper = Keeper(config, job.classifier.preprocess, cut, frozen, self._frozen)
        rows = keeper.keep(wanted)
        self.num_extracted, self.num_found = keeper.num_extracted, keeper.num_found
        if rows is None:
            return
        self._held_out = Activations(rows[:1], job.held_out.labels)
        if views:
            self._train = Activations(rows[1:], job.train.labels)

    @property
    def frozen(self) -> GraphLayer | None:
        """What is still to be applied to the training inputs."""
        return self._layer if self._train is None else None

    def train(self, epoch: int, first_batch: int = 0) -> Iterable:
        """Shuffled batches of ``(inputs, labels)`` for an epoch, from one of them on."""
        config = self._job.config
        seed = epoch_seed(config.seed, epoch)
        if self._train is not None:
            return self._train.batches(config.batch_size, seed, epoch, first_batch)
        return self._images(
            self._job.train,
            config.batch_size,
            shuffle_seed=seed,
            view_seed=seed if config.augment else None,
            first_batch=first_batch,
        )

    def train_in_order(self) -> Iterable:
        """Batches of all views of the training images, kept or computed now, in order."""
        if self._train is None:
            return self._computed(self._job.train)
        views = range(len(self._train.views))
        return (b for view in views for b in self._train.batches(EXTRACTION_BATCH, epoch=view))

    def evaluator(self, model: keras.Model) -> Callable[[], dict[str, Any]]:
        """A function that evaluates a model on what was held out, with its weights at that time."""
        forward = compiled(model)
        return lambda: summarize(*predict(forward, self._evaluation_batches()))

    def _evaluation_batches(self) -> Iterable:
        if self._held_out is not None:
            return self._held_out.batches(EXTRACTION_BATCH)
        return self._computed(self._job.held_out)

    def _computed(self, split: Split) -> Iterable:
        images = self._images(split, EXTRACTION_BATCH)
        return images if self._frozen is None else stream(self._frozen, images)

    def _images(self, split: Split, batch_size: int, **options: Any) -> Iterable:
        return split.batches(self._job.classifier.preprocess, batch_size, **options)
