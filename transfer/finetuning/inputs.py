"""Inputs of the trained part of a classifier: cached activations where possible, else images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH, Activations, Compiled, stream
from transfer.activations.store import HELD_OUT, TRAINING, ActivationStore, ExtractionRequest
from transfer.data.dataset import Split
from transfer.data.epochs import Epochs
from transfer.evaluation.prediction import predict_logits, summarize
from transfer.finetuning.context import RunContext
from transfer.finetuning.options import ResolvedOptions
from transfer.finetuning.precision import calibration_images
from transfer.graph import is_seeded
from transfer.layers.graph_layer import GraphLayer
from transfer.quantization.prefix import QuantizedPrefix
from transfer.training.trainer import epoch_seed


def num_missing(context: RunContext, cut: str) -> int:
    """How many images a stage of a run on one device in float32 would compute the activations at a
    cut of, as they are not in the cache. Writes nothing."""
    requests = _requests(context)
    frozen, _ = context.classifier.feature_extractor.split(cut)
    if is_seeded(frozen.network.graph_def):
        return sum(len(request.needed) for request in requests)
    return _store(context, cut, frozen, Compiled(frozen)).num_missing(requests)


def _requests(
    context: RunContext, here: np.ndarray | None = None, here_held_out: np.ndarray | None = None
) -> list[ExtractionRequest]:
    """The held-out images, and each view of the training images that is cached.

    Args:
        context: the run.
        here: see ``ExtractionRequest``, for the training images.
        here_held_out: the same for the held-out images.
    """
    options = context.options
    views = _view_seeds(options)
    if options.augment and not options.views:
        views = []  # new ones in each epoch
    if options.is_mixed and context.replicas.num_workers > 1:
        views = []  # the paired images may live on different workers
    held_out = ExtractionRequest(HELD_OUT, context.held_out, None, here_held_out)
    training = [ExtractionRequest(TRAINING, context.train, view, here) for view in views]
    return [held_out, *training]


def _view_seeds(options: ResolvedOptions) -> list[int | None]:
    """The seed of each view of the training images; ``None`` without random views."""
    return [epoch_seed(options.seed, view) for view in range(options.views)] or [None]


def _store(
    context: RunContext, cut: str, frozen: GraphLayer, compiled: Compiled | QuantizedPrefix
) -> ActivationStore:
    return ActivationStore(
        frozen,
        context.classifier.preprocess,
        cut=cut,
        model=context.request.origin["model"],
        policy=context.cache_policy,
        compiled=compiled,
        precision=compiled.key() if isinstance(compiled, QuantizedPrefix) else None,
        replicas=context.replicas,
        progress=context.progress,
    )


class Inputs:
    """Training and evaluation inputs of a stage.

    Activations at the cut are computed once and cached, on disk or in memory, if there is a frozen
    part and it is deterministic. Random views are cached if their number is fixed; held-out images
    have none. Activations that do not fit in the cache are computed anew in each epoch. With
    several workers, each computes and caches its shard of the images, and trains on the rows of a
    batch that are in this shard.

    ``num_extracted`` images were computed now, ``num_found`` came from the cache.
    """

    def __init__(self, context: RunContext, cut: str, frozen: GraphLayer | None):
        self._context = context
        self._layer = frozen
        self._frozen: Compiled | QuantizedPrefix | None = None
        assigned = context.replicas.examples_of_worker
        self._mine_held_out = assigned(len(context.held_out), EXTRACTION_BATCH)
        self._mine_train = assigned(len(context.train), EXTRACTION_BATCH)
        self.num_extracted = self.num_found = 0
        options = context.options
        self._held_out = self._train = None
        self._is_recomputed = False
        if frozen is None:
            return
        self._frozen = compiled = _in_precision_of_run(context, frozen)
        # TensorFlow cannot compute in int8 within a training step.
        self._is_recomputed = is_int8 = isinstance(compiled, QuantizedPrefix)
        if is_seeded(frozen.network.graph_def):
            return
        here, here_held_out = (
            None if mine.all() else mine for mine in (self._mine_train, self._mine_held_out)
        )
        held_out, *views = _requests(context, here, here_held_out)
        store = _store(context, cut, frozen, compiled)
        rows = store.rows([held_out, *views])
        self.num_extracted, self.num_found = store.num_extracted, store.num_found
        # If the rows of one worker do not fit, no worker uses its cached rows: together they would
        # miss some images.
        if context.replicas.total(int(rows is None)) or rows is None:
            num_parts, rest = divmod(options.batch_size, EXTRACTION_BATCH)
            self._is_recomputed = is_int8 or (bool(views) and num_parts > 1 and not rest)
            return
        self._held_out = Activations(rows[:1], held_out.needed.labels)
        if views:
            self._train = Activations(rows[1:], context.train.labels, here)

    @property
    def frozen(self) -> GraphLayer | None:
        """The frozen layer to apply to the training inputs; ``None`` if they are activations."""
        return self._layer if self._train is None and not self._is_recomputed else None

    @property
    def is_images(self) -> bool:
        """Whether nothing is frozen, so that these are images and no activations."""
        return self._layer is None

    def epochs(self, last_epoch: int) -> Epochs:
        """``train`` without a pause between epochs, up to and without ``last_epoch``."""
        return Epochs(self.train, self._context.steps_per_epoch, last_epoch)

    def train(self, epoch: int, first_batch: int = 0) -> Iterable[Any]:
        """Shuffled batches of ``(inputs, labels)`` for an epoch, starting at ``first_batch``; of
        each batch, this worker's examples."""
        options = self._context.options
        seed = epoch_seed(options.seed, epoch)
        if self._train is not None:
            return self._train.batches(options.batch_size, seed, epoch, first_batch)
        view: int | np.ndarray | None = seed if options.augment else None
        if options.views:  # they did not fit in the cache; the same as if they did
            views = (np.arange(len(self._context.train)) + epoch) % options.views
            view = np.array(_view_seeds(self._context.options), np.int64)[views]
        num_parts = 1
        if self._is_recomputed and options.batch_size % EXTRACTION_BATCH == 0:
            num_parts = options.batch_size // EXTRACTION_BATCH
        images = self._context.train.batches(
            self._context.classifier.preprocess,
            options.batch_size // num_parts,
            shuffle_seed=seed,
            view_seed=view,
            first_batch=first_batch * num_parts,
            shard=(self._context.replicas.worker, self._context.replicas.num_workers),
        )
        return self._recomputed(images, num_parts) if self._is_recomputed else images

    def _recomputed(self, images: Iterable[Any], num_parts: int) -> Iterator[Any]:
        """Batches of activations, each computed in parts: the images of a large batch of a head,
        and what is computed from them, may not fit in memory."""
        assert self._frozen is not None
        parts = stream(self._frozen, images)
        while group := list(itertools.islice(parts, num_parts)):
            rows, labels = zip(*group, strict=True)
            yield np.concatenate(rows), np.concatenate([np.asarray(part) for part in labels])

    def train_in_order(self, layer: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
        """Outputs of a layer for all views of the training images, view by view, and the labels.

        Returns:
            float32 ``[num_views * num_examples, width]``, where width is the head's input width,
            and int64 ``[num_views * num_examples]``.
        """
        context, mine = self._context, self._mine_train
        width = context.classifier.head.classifier.kernel.shape[0]
        if self._train is None:
            shard = _shard(context.train, mine)
            views = [
                self._computed(shard, view_seed=seed) for seed in _view_seeds(self._context.options)
            ]
        else:
            # One ``Activations`` per view, with the rows of this worker.
            labels = context.train.labels[mine]
            views = [
                Activations([rows], labels).batches(EXTRACTION_BATCH) for rows in self._train.views
            ]
        outputs = [self._joined(layer, view, mine, width) for view in views]
        return np.concatenate(outputs), np.tile(context.train.labels, len(outputs))

    def evaluator(self, model: keras.Model) -> Callable[[], dict[str, Any]]:
        """A function that evaluates a model, with its current weights, on the held-out images."""
        predict = self.predictor(model)
        return lambda: self.summary(predict())

    def predictor(
        self, model: keras.Model, num_classes: int | None = None
    ) -> Callable[[], np.ndarray]:
        """A function that computes the logits of the held-out images with the current weights of a
        model, float32 ``[num_held_out, num_classes]``; by default with the classes of the run."""
        mine, width = self._mine_held_out, num_classes or len(self._context.classifier.labels)
        forward = Compiled(model, self._context.replicas)
        return lambda: self._joined(forward, self._evaluation_batches(), mine, width)

    def summary(self, logits: np.ndarray) -> dict[str, Any]:
        """The ``eval`` part of ``metrics.json`` for logits of the held-out images."""
        held_out = self._context.held_out
        return summarize(logits, held_out.labels, held_out.groups)

    def _joined(
        self, layer: Callable[[Any], Any], batches: Iterable[Any], mine: np.ndarray, width: int
    ) -> np.ndarray:
        """Outputs of a layer for the batches of all workers: float32 ``[len(mine), width]``."""
        rows = np.zeros((0, width), np.float32)
        if mine.any():
            rows, _ = predict_logits(layer, batches)
        return self._context.replicas.join(rows.reshape(len(rows), width), mine)

    def _evaluation_batches(self) -> Iterable[Any]:
        held_out = _shard(self._context.held_out, self._mine_held_out)
        if self._held_out is not None:
            # As evaluate does it, for bit-identical results.
            lengths = [len(part) for part in held_out.of_members()]
            return self._held_out.in_order(EXTRACTION_BATCH, lengths)
        return self._computed(held_out)

    def _computed(self, split: Split, **options: Any) -> Iterable[Any]:
        images = split.in_order(self._context.classifier.preprocess, EXTRACTION_BATCH, **options)
        return images if self._frozen is None else stream(self._frozen, images)


def _shard(split: Split, mine: np.ndarray) -> Split:
    return split if mine.all() else split.where(mine)


def _in_precision_of_run(context: RunContext, layer: GraphLayer) -> Compiled | QuantizedPrefix:
    """The frozen part of a stage as a function of preprocessed images."""
    options = context.options
    if options.precision != "int8":
        return Compiled(layer, context.replicas)
    measured = context.measured
    if measured is not None and measured.digest == layer.digest():
        return measured
    images = calibration_images(context.train, context.classifier.preprocess, options.seed)
    assert options.int8_engine != "auto"  # it is resolved
    float32 = Compiled(layer, context.replicas)
    return QuantizedPrefix(layer, float32, options.int8_engine, images)
