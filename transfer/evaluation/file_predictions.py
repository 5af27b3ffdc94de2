"""Predict the classes of image files."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.activations.extraction import Compiled
from transfer.core import npy_files
from transfer.core.escapes import escaped_json, printable
from transfer.data.unreadable import UnreadableImageError
from transfer.evaluation.explain import Explainer
from transfer.evaluation.out_of_distribution import (
    Score,
    feature_distance,
    logit_scores,
    of_resized,
)
from transfer.evaluation.prediction import probabilities as softmax
from transfer.images import image_files
from transfer.images.decoding import read_tensor
from transfer.images.image_files import PassedOver, PixelBudget
from transfer.images.preprocess import Preprocess, to_channels
from transfer.layers.classifier import Classifier

logger = logging.getLogger(__name__)

_READERS = 4  # threads; decoding releases the GIL

OnUnreadable = Callable[[Path, Exception], None]


@dataclass(frozen=True)
class Prediction:
    """The predicted class of an image file.

    ``label`` is the most probable class and ``probability`` (0..1) its predicted probability.
    ``top`` are the most probable classes with their probabilities, in descending order.
    ``is_sure`` is false if the probability is below ``abstain_below`` of ``predict``.
    ``prediction_set`` has the classes that reach ``set_threshold``, like ``top``, and
    ``unknown_score`` is the score of this name; both are ``None`` if ``predict`` was not asked.

    Example:
        >>> from pathlib import Path
        >>> from transfer import Prediction
        >>> prediction = Prediction(Path("a.jpg"), "red", 0.75, [("red", 0.75), ("blue", 0.25)])
        >>> for label, probability in prediction.top:
        ...     print(f"{label} {probability:.0%}")
        red 75%
        blue 25%
    """

    path: Path
    label: str
    probability: float
    top: list[tuple[str, float]]
    is_sure: bool = True
    prediction_set: list[tuple[str, float]] | None = None
    unknown_score: float | None = None


def predict(
    model: Classifier | str | Path,
    paths: str | Path | Iterable[str | Path],
    *,
    top_k: int = 3,
    batch_size: int = 32,
    abstain_below: float | None = None,
    set_threshold: float | None = None,
    unknown_score: Score | None = None,
    class_means: np.ndarray | None = None,
    explain: str | Path | None = None,
    probabilities: str | Path | None = None,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[Prediction]:
    """Predict the classes of image files, in the order of the paths.

    Images are decoded as in training, from the same formats. Only a few batches are in memory at
    any time, so the number of files is not limited.

    Args:
        model: a classifier from ``fine_tune`` or ``Classifier.load``, or the path of a run folder
            or of a fine-tuned model.
        paths: image files, and folders that are searched recursively for images, in the order of
            their names.
        top_k: number of classes in ``Prediction.top``.
        batch_size: images per step.
        abstain_below: predictions whose probability is below this value, 0 to 1, are marked as not
            sure. The risk-coverage curve of ``evaluate`` tells what a value gains.
        set_threshold: add the set of classes whose probability reaches this value, 0 to 1. With the
            ``threshold`` of ``conformal`` of ``evaluate`` it has the coverage stated there.
        unknown_score: add this out-of-distribution score, higher for images that are less like the
            classes; see ``transfer.evaluation.out_of_distribution``.
        class_means: those of ``out_of_distribution.class_means``, for ``feature_distance``.
        explain: folder for a Grad-CAM heat map per image, over the photo at its own resolution, as
            a JPEG named by its number in the results: red marks the region that explains the
            predicted class.
        probabilities: file for the probabilities of all classes, ``.npy``, float32 ``[num_images,
            num_classes]``, with a row per prediction and a column per name in
            ``Classifier.labels``. It is complete, and exists, when the iterator ends.
        on_unreadable: called with the path and the error of each image that cannot be read; the
            others are predicted. By default, such an image raises an error.

    Returns:
        An iterator of predictions.

    Raises:
        FileNotFoundError: if the model or the folder of ``probabilities`` does not exist; during
            iteration, if an image does not.
        ValueError: if ``top_k`` or ``batch_size`` is less than 1, ``abstain_below`` or
            ``set_threshold`` is not 0 to 1, ``unknown_score`` needs ``class_means``,
            ``probabilities`` does not end in ``.npy``, or ``explain`` is given and the network has
            no feature maps.
        UnreadableImageError: during iteration, if an image cannot be decoded.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from transfer import fine_tune, load_meta_graph, open_source, predict
        >>> graph = load_meta_graph("embedded")
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> result = fine_tune(graph, train, held_out, run_dir="runs/predict", epochs=20)
        >>> Image.fromarray(np.zeros((64, 64), np.uint8)).save("black.png")
        >>> for prediction in predict(result.classifier, ["black.png"]):
        ...     print(prediction.path, len(prediction.top))
        black.png 3
    """
    check_counts(top_k=top_k, batch_size=batch_size)
    check_threshold(abstain_below)
    check_threshold(set_threshold, "set_threshold")
    if unknown_score == "feature_distance" and class_means is None:
        raise ValueError("unknown_score=feature_distance needs the class means of evaluate")
    if probabilities is not None:
        npy_files.check_path(Path(probabilities), "probabilities")
    classifier = model if isinstance(model, Classifier) else Classifier.load(model)
    explainer = None if explain is None else Explainer(classifier, Path(explain))
    if isinstance(paths, str | Path):
        paths = [paths]
    return predict_files(
        classifier,
        _files(paths),
        top_k=top_k,
        batch_size=batch_size,
        abstain_below=abstain_below,
        set_threshold=set_threshold,
        unknown_score=unknown_score,
        class_means=class_means,
        explainer=explainer,
        probabilities=None if probabilities is None else Path(probabilities),
        on_unreadable=on_unreadable or _refuse,
    )


def predict_files(
    classifier: Classifier,
    files: Iterable[Path],
    *,
    top_k: int,
    batch_size: int,
    abstain_below: float | None,
    set_threshold: float | None,
    unknown_score: Score | None,
    class_means: np.ndarray | None,
    explainer: Explainer | None,
    probabilities: Path | None,
    on_unreadable: OnUnreadable,
) -> Iterator[Prediction]:
    """``predict`` for files. Unreadable images of a batch are reported before its predictions."""
    # Thresholds are those of probabilities in float64; in float32, many round to 1.
    is_exact = (abstain_below, set_threshold, unknown_score) != (None, None, None)
    network = Compiled(of_resized(classifier) if is_exact else classifier.probabilities_of_resized)
    with contextlib.ExitStack() as stack:
        append = None
        if probabilities is not None:
            writer = npy_files.row_writer(probabilities, len(classifier.labels))
            append = stack.enter_context(writer)
        for paths, pixels, failures in batches_of(files, classifier.preprocess, batch_size):
            for path, error in failures:
                on_unreadable(path, error)
            if not paths:
                continue
            p = outputs = np.asarray(network(tf.stack(pixels)))
            scores: Sequence[float | None] = [None] * len(paths)
            if is_exact:
                logits = outputs[:, -len(classifier.labels) :]
                p = softmax(logits)
            if unknown_score == "feature_distance" and class_means is not None:
                features = outputs[:, : -len(classifier.labels)]
                scores = feature_distance(features, class_means).tolist()
            elif unknown_score is not None:
                scores = logit_scores(logits)[unknown_score].tolist()
            if append is not None:
                append(p)
            if explainer is not None:
                explainer(paths, tf.stack(pixels), p.argmax(-1))
            for path, row, score in zip(paths, p, scores, strict=True):
                top = most_probable(row, classifier.labels, top_k)
                is_sure = abstain_below is None or top[0][1] >= abstain_below
                chosen = None
                if set_threshold is not None:
                    size = int((row >= set_threshold).sum())
                    chosen = most_probable(row, classifier.labels, size)
                yield Prediction(path, *top[0], top, is_sure, chosen, score)


def check_counts(**counts: int) -> None:
    """Validate counts such as ``top_k``.

    Raises:
        ValueError: if one of them is less than 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {count}")


def check_threshold(value: float | None, name: str = "abstain_below") -> None:
    """Validate a threshold of a probability.

    Raises:
        ValueError: if it is not 0 to 1.
    """
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} must be 0 to 1, got {value}")


def most_probable(
    probabilities: np.ndarray, labels: Sequence[str], count: int
) -> list[tuple[str, float]]:
    """The most probable classes with their probabilities; ties are in the order of the labels."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(labels[index], float(probabilities[index])) for index in order]


def prepare_images(preprocess: Preprocess) -> Callable[[np.ndarray], tf.Tensor]:
    """A function that resizes pixels, uint8 ``[height, width, 3]``, to float32 ``[size, size,
    channels]`` in 0..255."""
    return tf.function(
        lambda image: preprocess.resize(to_channels(image, preprocess.channels)),
        input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)],
        autograph=False,
    )


def reason(error: Exception) -> str:
    """The reason why an image cannot be read, from its error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError):
        return str(error)
    return f"it cannot be read ({type(error).__name__}: {str(error)[:200]})"


def as_json(name: str, top: Sequence[tuple[str, float]], **others: Any) -> str:
    """A prediction as one line of JSON: ``{"image": ..., "predictions": [{"label": ...,
    "probability": ...}, ...]}``, and the other values by name, except for ``None``."""
    predictions = [{"label": label, "probability": probability} for label, probability in top]
    others = {key: value for key, value in others.items() if value is not None}
    values = {"image": name, "predictions": predictions} | others
    return escaped_json(json.dumps(values, ensure_ascii=False))


def files_in(folder: str | Path) -> Iterator[Path]:
    """The images in a folder, at any depth, in the order of their names.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it has no images.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{printable(folder)!r} is not a folder of images")
    files = _files([folder])
    first = next(files, None)
    if first is None:
        raise ValueError(f"there are no images in the folder {printable(folder)!r}")
    return itertools.chain([first], files)


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """The files, and the images in folders."""
    passed_over = PassedOver()
    for path in paths:
        path = Path(os.path.expanduser(path))  # that of Path refuses ~name.jpg
        if not path.is_dir():
            yield path
            continue
        is_empty = True
        for file in image_files.find(path, passed_over, in_order=True):
            is_empty = False
            yield file
        if is_empty:
            logger.warning(f"no images in the folder {printable(path)!r}")
    for line in passed_over.describe():
        logger.warning(line)


def _refuse(path: Path, error: Exception) -> None:
    if isinstance(error, OSError):
        raise error
    raise UnreadableImageError({printable(path): reason(error)}) from error


def batches_of(
    paths: Iterable[Path], preprocess: Preprocess, batch_size: int
) -> Iterator[tuple[list[Path], list[tf.Tensor], list[tuple[Path, Exception]]]]:
    """Yield the paths and resized images of each batch, and the paths of unreadable images with the
    errors. The next batches are read while one is predicted."""
    prepare = prepare_images(preprocess)
    budget = PixelBudget()

    def read(path: Path) -> tf.Tensor:
        with budget.hold(path):
            image = read_tensor(image_files.read(path))
            prepared = prepare(image)
            del image  # before the next one is decoded
            return prepared

    with ThreadPoolExecutor(_READERS) as pool:
        waiting: list[tuple[Path, Future[tf.Tensor]]] = []
        paths = iter(paths)
        while True:
            num_free = 2 * batch_size - len(waiting)
            waiting += [
                (path, pool.submit(read, path)) for path in itertools.islice(paths, num_free)
            ]
            if not waiting:
                return
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            readable, images, failures = [], [], []
            for path, future in batch:
                try:
                    images.append(future.result())
                    readable.append(path)
                except Exception as error:  # decoders of damaged files may raise anything
                    failures.append((path, error))
            yield readable, images, failures
