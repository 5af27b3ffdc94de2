"""scikit-learn estimators: VGG features as a transformer, fine-tuning as a classifier.

They follow scikit-learn's conventions, so that ``Pipeline``, ``GridSearchCV``, ``cross_val_score``,
``clone`` and ``joblib`` work with them. The features of an image are computed once and kept in the
activation cache, which all estimators, folds and processes share.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from transfer.activations.cache import Cache, default_directory
from transfer.activations.entry import Entry
from transfer.activations.extraction import Compiled, kernels, versions
from transfer.data.dataset import Split
from transfer.data.holdout import stratified_holdout
from transfer.data.image_arrays import ImageArrays, source_of_arrays
from transfer.data.labelled_files import state_of
from transfer.exports.meta_graph import save_classifier
from transfer.finetuning.run import FineTuneResult, fine_tune
from transfer.images.preprocess import Preprocess, parse_size, to_channels
from transfer.layers.backbone import Backbone
from transfer.layers.classifier import MODEL, Classifier
from transfer.layers.graph_layer import Pooling
from transfer.models.meta_graph import load_meta_graph

logger = logging.getLogger(__name__)

_CACHE_BYTES = 20 * 10**9


class _ImageEstimator(BaseEstimator):
    """Validation of images, common to both estimators."""

    image_shape: Sequence[int] | None
    scale: float
    batch_size: int

    def _check_batch_size(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def _images(self, X: Any, *, reset: bool) -> ImageArrays:
        """The images; rows of pixels are checked as in other estimators."""
        self._check_batch_size()
        if self.image_shape is not None:
            X = validate_data(self, X, dtype="numeric", reset=reset)
        images = ImageArrays(X, self.image_shape, self.scale)
        if not len(images):
            raise ValueError("found 0 images; expected at least 1")
        return images


class VGGFeatures(TransformerMixin, _ImageEstimator):
    """Features of a pretrained network, as a scikit-learn transformer.

    Args:
        model: path of the model, as in ``load_meta_graph``, or ``embedded``.
        tap: tensor with the features, or several; those with height and width are pooled. Default:
            that of the model's card, else ``fc7``.
        pooling: ``avg`` or ``max``.
        preprocess: preprocessing that the weights expect. Default: that of the model's card.
        image_size: size of the network's input in pixels, ``224`` or ``"100x200"``. Default: the
            model's.
        image_shape: height, width and channels of images that come as rows of pixels. One of them
            may be -1, as in ``numpy.reshape``.
        scale: factor of pixels in arrays that makes them 0 to 255, e.g. 255 for pixels in 0..1.
        batch_size: images per batch.
        cache_dir: folder of the activation cache. Default: the user's cache folder. If it cannot be
            used, features are computed each time.

    Images are an array ``[num_images, height, width, channels]``, or a list of arrays of different
    sizes, of Pillow images, or of paths; gray or RGB, 0 to 255. Features are float32 ``[num_images,
    width]``. They depend on the images in the same batch at float precision only, about 1e-6.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> from transfer.sklearn import VGGFeatures
        >>> X, y = load_digits(return_X_y=True)  # rows of 8 x 8 pixels, 0 to 16
        >>> features = VGGFeatures("embedded", image_shape=(8, 8, 1), scale=255 / 16)
        >>> pipeline = make_pipeline(features, LogisticRegression(max_iter=1000))
        >>> pipeline.fit(X[:200], y[:200]).score(X[200:400], y[200:400]) > 0.8
        True
    """

    def __init__(
        self,
        model: str | Path = "embedded",
        tap: str | Sequence[str] | None = None,
        *,
        pooling: Literal["avg", "max"] = "avg",
        preprocess: str | None = None,
        image_size: int | str | None = None,
        image_shape: Sequence[int] | None = None,
        scale: float = 1.0,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
    ):
        self.model = model
        self.tap = tap
        self.pooling = pooling
        self.preprocess = preprocess
        self.image_size = image_size
        self.image_shape = image_shape
        self.scale = scale
        self.batch_size = batch_size
        self.cache_dir = cache_dir

    def fit(self, X: Any, y: Any = None) -> VGGFeatures:
        """Check the images and load the model; nothing is learned.

        Raises:
            ValueError, FileNotFoundError: if the model or the images cannot be used.
        """
        self._images(X, reset=True)
        self.n_features_out_ = self._extractor().width
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features of images: float32 ``[num_images, width]``.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: if images cannot be read.
        """
        check_is_fitted(self)
        images, extractor = self._images(X, reset=False), self._extractor()
        ids = np.array([images.digest(index) for index in range(len(images))], "S16")
        rows = np.empty((len(images), extractor.width), np.float32)
        with contextlib.ExitStack() as stack:
            entry, missing = self._entry(extractor), np.ones(len(ids), bool)
            if entry is not None:
                stack.enter_context(entry.lock())
                known = np.flatnonzero(~entry.missing(ids))
                found, is_intact = entry.read(ids[known]).read(slice(None))
                rows[known[is_intact]] = found[is_intact]
                missing[known[is_intact]] = False
                if not self._has_room(entry, int(missing.sum()) * entry.row_bytes):
                    entry = None
            positions = np.flatnonzero(missing)
            for start in range(0, len(positions), self.batch_size):
                chosen = positions[start : start + self.batch_size]
                rows[chosen] = extractor([images[index] for index in chosen])
                if entry is not None:
                    with contextlib.suppress(OSError):  # a full disk
                        entry.append(ids[chosen], rows[chosen])
        return rows

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: the tap and a number."""
        check_is_fitted(self)
        names = self._extractor().column_names
        return np.array(names, object)

    def _entry(self, extractor: _Extractor) -> Entry | None:
        """Where the features are cached; ``None`` if the folder cannot be written to."""
        try:
            return self._cache().entry(extractor.key, [extractor.width], "float32")
        except OSError as error:
            logger.warning(f"features are not cached: {error}")
            return None

    def _has_room(self, entry: Entry, num_bytes: int) -> bool:
        try:
            self._cache().make_room(num_bytes, keep=[entry])
        except OSError as error:
            logger.warning(f"features are not cached: {error}")
            return False
        return True

    def _cache(self) -> Cache:
        folder = default_directory() if self.cache_dir is None else Path(self.cache_dir)
        return Cache(folder, _CACHE_BYTES)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # float32, whatever the dtype of the images
        return tags

    def _extractor(self) -> _Extractor:
        taps = self.tap if self.tap is None or isinstance(self.tap, str) else tuple(self.tap)
        return _extractor(
            str(self.model),
            _state(str(self.model)),
            taps,
            self.pooling,
            self.preprocess,
            self.image_size,
        )


@dataclass(frozen=True)
class _Extractor:
    """A network that was loaded once: images of any size to features."""

    network: Compiled
    preprocess: Preprocess
    taps: dict[str, int]
    key: dict[str, Any]

    @property
    def width(self) -> int:
        return sum(self.taps.values())

    @property
    def column_names(self) -> list[str]:
        return [f"{tap}_{index}" for tap, width in self.taps.items() for index in range(width)]

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(self.network(tf.stack([self.preprocess(image) for image in images])))


def _state(model: str) -> tuple[tuple[object, ...], ...]:
    """Names, sizes and times of the files of a model, which change if it is trained anew."""
    path = Path(model).expanduser()
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{glob.escape(path.stem)}*")
    return tuple((file.name, *state_of(file)) for file in sorted(files) if file.is_file())


# Clones, as in a grid search, share the network.
@functools.lru_cache(maxsize=4)
def _extractor(
    model: str,
    state: tuple[tuple[object, ...], ...],
    tap: str | tuple[str, ...] | None,
    pooling: Pooling,
    preprocess: str | None,
    image_size: int | str | None,
) -> _Extractor:
    graph = load_meta_graph(model)
    taps = list(tap) if isinstance(tap, tuple) else tap
    backbone = Backbone(graph, taps, pooling=pooling)
    size = None if image_size is None else parse_size(image_size)
    steps = graph.preprocess(backbone.network.input, preprocess, size)
    features = backbone.concatenated()
    spec = backbone.compute_output_spec(keras.KerasTensor((1, *steps.shape), "float32"))
    widths = (
        {name: int(part.shape[-1]) for name, part in spec.items()}
        if isinstance(spec, Mapping)
        else {backbone.network.output.removesuffix(":0"): int(spec.shape[-1])}
    )
    key = {
        "kind": "sklearn",
        "model": graph.name,
        "sha256": features.digest(),
        "tap": list(widths),
        "pooling": pooling,
        "preprocess": steps.mode,
        "image_size": steps.plain_size,
        "channels": steps.channels,
        **versions(),
        **kernels(),
    }
    return _Extractor(Compiled(features), steps, widths, key)


class VGGClassifier(ClassifierMixin, _ImageEstimator):
    """Fine-tuning as a scikit-learn classifier; see ``fine_tune``.

    Args:
        model: path of the model, as in ``load_meta_graph``, or ``embedded``.
        tap: tensor with the features. Default: that of the model's card, else ``fc7``.
        freeze_until: the cut, see ``fine_tune``.
        solver: ``lbfgs`` (logistic regression) or ``ridge`` (closed form), for a frozen backbone;
            ``gradient``, or ``auto``, see ``FineTuneOptions``.
        C: inverse strength of the L2 penalty of ``lbfgs``. Default: chosen by cross-validation.
        epochs: passes over the images with ``gradient``. Default: as in ``fine_tune``.
        learning_rate: default: as in ``fine_tune``.
        preprocess: preprocessing that the weights expect. Default: that of the model's card.
        image_size: size of the network's input in pixels. Default: the model's.
        options: further options of ``fine_tune``, e.g. ``{"augment": True}``.
        validation_fraction: share of the images of each class that is not trained on but gives the
            validation loss of ``history_``. With 0, or too few images, the training images do.
        image_shape: height, width and channels of images that come as rows of pixels.
        scale: factor of pixels in arrays that makes them 0 to 255; they are then rounded to whole
            numbers.
        batch_size: images per batch of a prediction.
        cache_dir: folder of the activation cache. Default: the user's cache folder.
        random_state: seed, int.

    Images are as in ``VGGFeatures``, labels of any type that scikit-learn's classifiers take.
    ``classifier_`` is the ``Classifier``, ``classes_`` are the labels, ``history_`` and
    ``metrics_`` those of ``FineTuneResult``.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from transfer.sklearn import VGGClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> classifier = VGGClassifier(C=1.0, image_shape=(8, 8, 1), scale=255 / 16)
        >>> classifier.fit(X[:200], y[:200]).score(X[200:400], y[200:400]) > 0.8
        True
    """

    def __init__(
        self,
        model: str | Path = "embedded",
        tap: str | None = None,
        *,
        freeze_until: str = "tap",
        solver: Literal["auto", "gradient", "ridge", "lbfgs"] = "lbfgs",
        C: float | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
        preprocess: str | None = None,
        image_size: int | str | None = None,
        options: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.1,
        image_shape: Sequence[int] | None = None,
        scale: float = 1.0,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
        random_state: int = 0,
    ):
        self.model = model
        self.tap = tap
        self.freeze_until = freeze_until
        self.solver = solver
        self.C = C
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.preprocess = preprocess
        self.image_size = image_size
        self.options = options
        self.validation_fraction = validation_fraction
        self.image_shape = image_shape
        self.scale = scale
        self.batch_size = batch_size
        self.cache_dir = cache_dir
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> VGGClassifier:
        """Fine-tune the model on images and their labels.

        Raises:
            ValueError: if images or labels cannot be used, there are fewer than two classes, or an
                argument is out of range.
        """
        self._check_batch_size()
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                "validation_fraction must be at least 0 and less than 1, got "
                f"{self.validation_fraction}"
            )
        if self.image_shape is not None:
            X, y = validate_data(self, X, y, dtype="numeric")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        images = ImageArrays(X, self.image_shape, self.scale)
        if len(images) != len(y):
            raise ValueError(f"found {len(images)} images and {len(y)} labels")
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y has {len(classes)} class; a classifier needs at least 2")
        source = source_of_arrays(
            images, labels.astype(np.int64), list(map(str, classes)), "arrays"
        )
        train = held_out = source.split("train")
        mask = stratified_holdout(labels, train.names, self.validation_fraction)
        if self.validation_fraction and mask.any():
            train, held_out = train.where(~mask), train.where(mask)
        # ``fine_tune`` seeds the global generators, from which splitters of scikit-learn draw.
        states = random.getstate(), np.random.get_state()
        try:
            result = self._fine_tune(train, held_out)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        self.classes_, self.classifier_ = classes, result.classifier
        self.history_, self.metrics_ = result.history, result.metrics
        self._network = Compiled(self.classifier_.probabilities_of_resized)
        return self

    def _fine_tune(self, train: Split, held_out: Split) -> FineTuneResult:
        with tempfile.TemporaryDirectory() as folder:
            return fine_tune(
                str(self.model),
                train,
                held_out,
                run_dir=Path(folder) / "run",
                tap=self.tap,
                freeze_until=self.freeze_until,
                solver=self.solver,
                lbfgs_c=self.C,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                preprocess=self.preprocess,
                image_size=self.image_size,
                cache_dir=self.cache_dir,
                seed=self.random_state,
                **(self.options or {}),
            )

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of ``classes_``: float32 ``[num_images, num_classes]``."""
        check_is_fitted(self)
        images, preprocess = self._images(X, reset=False), self.classifier_.preprocess
        parts = []
        for start in range(0, len(images), self.batch_size):
            stop = min(start + self.batch_size, len(images))
            batch = [images.pixels(i) for i in range(start, stop)]
            resized = [preprocess.resize(to_channels(x, preprocess.channels)) for x in batch]
            parts.append(np.asarray(self._network(tf.stack(resized))))
        return np.concatenate(parts)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each image, from ``classes_``."""
        check_is_fitted(self)
        return np.asarray(self.classes_[self.predict_proba(X).argmax(-1)])

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and ``copy.deepcopy``; the network as the files of a meta graph."""
        state = dict(super().__getstate__())
        state.pop("_network", None)
        if "classifier_" in state:
            state["classifier_"] = _to_files(self.classifier_)
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        state = dict(state)
        if "classifier_" in state:
            state["classifier_"] = _from_files(state["classifier_"])
        super().__setstate__(state)
        if "classifier_" in state:
            self._network = Compiled(self.classifier_.probabilities_of_resized)


def _to_files(classifier: Classifier) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(classifier, Path(folder) / MODEL, classifier.card)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _from_files(files: Mapping[str, bytes]) -> Classifier:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / Path(name).name).write_bytes(content)
        return Classifier.load(folder)
