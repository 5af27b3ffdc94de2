"""Predict the classes of very many images as an Apache Beam pipeline.

Names of files -> pixels -> probabilities -> lines. Beam's ``RunInference`` makes the batches and
loads the model once a process.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import apache_beam as beam
    from apache_beam.io import fileio
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.metrics.metric import Metrics
    from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise ImportError(
        f"prediction on Beam needs Apache Beam ({error}): pip install 'vgg-transfer[beam]'"
    ) from error

from transfer.activations.extraction import Compiled
from transfer.evaluation.file_predictions import (
    as_json,
    check_counts,
    most_probable,
    prepare_images,
    reason,
)
from transfer.images import image_files
from transfer.images.decoding import read_tensor
from transfer.images.preprocess import Preprocess
from transfer.layers.classifier import MODEL, Classifier
from transfer.models.card import read_card

_FAILED = "failed"
_READ, _UNREADABLE = "images read", "images unreadable"


def predict_on_beam(
    model: str,
    pattern: str,
    output: str,
    *,
    top_k: int = 3,
    batch_size: int = 32,
    options: Sequence[str] = (),
) -> tuple[int, int]:
    """Run the pipeline to its end.

    Args:
        model: run folder, or checkpoint prefix of a fine-tuned model; it may lie, as images and
            outputs may, wherever Beam finds files.
        pattern: the images, e.g. ``"photos/*.jpg"``; ``**`` stands for folders as well.
        output: prefix of the results, ``<output>-00000-of-00004.jsonl`` and so on, a line of
            ``as_json`` for each image; ``<output>.failed-*.jsonl`` name unreadable images, with the
            reason.
        top_k: classes for each image.
        batch_size: largest number of images per step.
        options: options of Beam, e.g. ``["--runner", "FlinkRunner"]``.

    Returns:
        The number of images, and the number of those that could not be read.

    Raises:
        FileNotFoundError: if there is no such model, or no image.
        ValueError: if a number is less than 1, or the model is not a fine-tuned one.

    Example:
        >>> from transfer.evaluation.beam import predict_on_beam
        >>> predict_on_beam("runs/a", "photos/**.jpg", "out/predictions")  # doctest: +SKIP
        (24, 0)
    """
    check_counts(top_k=top_k, batch_size=batch_size)
    prefix = find_model(model)
    classifier = load(prefix)  # here first: what is wrong with it is said before workers start
    labels = list(classifier.labels)
    if not FileSystems.match([pattern], limits=[1])[0].metadata_list:
        raise FileNotFoundError(f"no file matches {pattern!r}")
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    read = (
        pipeline
        | fileio.MatchFiles(pattern)
        | beam.Reshuffle()  # so that workers share the files, not the pattern
        | fileio.ReadMatches()
        | beam.ParDo(Read(classifier.preprocess)).with_outputs(_FAILED, main="pixels")
    )
    lines = (
        read["pixels"]
        | RunInference(KeyedModelHandler(Handler(prefix, batch_size)))
        | beam.MapTuple(lambda name, row: as_json(name, most_probable(row, labels, top_k)))
    )
    lines | "Write" >> beam.io.WriteToText(output, ".jsonl")
    read[_FAILED] | "WriteFailed" >> beam.io.WriteToText(f"{output}.failed", ".jsonl")
    result = pipeline.run()
    result.wait_until_finish()
    counts = {c.key.metric.name: c.result for c in result.metrics().query()["counters"]}
    failed = counts.get(_UNREADABLE, 0)
    return counts.get(_READ, 0) + failed, failed


def find_model(model: str) -> str:
    """The prefix of a model, which may be in a run folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    for prefix in (FileSystems.join(model, MODEL), model):
        if FileSystems.exists(f"{prefix}.meta"):
            return prefix
    raise FileNotFoundError(
        f"{model!r} is neither a run folder nor the prefix of a model: there is no {model}.meta"
    )


def load(prefix: str) -> Classifier:
    """A classifier from wherever Beam finds files."""
    if Path(f"{prefix}.meta").is_file():
        return Classifier.load(Path(prefix))
    directory, name = FileSystems.split(prefix)
    with tempfile.TemporaryDirectory() as folder:

        def fetch(path: str) -> Path:
            copy = Path(folder, FileSystems.split(path)[1])
            with FileSystems.open(path) as source, copy.open("wb") as file:
                shutil.copyfileobj(source, file)
            return copy

        for found in FileSystems.match([f"{prefix}.*"])[0].metadata_list:
            fetch(found.path)
        card = Path(folder, f"{name}.json")
        labels = read_card(card).labels if card.is_file() else None
        if labels and Path(labels).name == labels:  # else loading says what is wrong
            fetch(FileSystems.join(directory, labels))
        return Classifier.load(Path(folder, name))


class Read(beam.DoFn):
    """A file to ``(name, float32 [size, size, channels] in 0..255)``; what cannot be read goes to
    another output, as a line."""

    def __init__(self, preprocess: Preprocess):
        self._preprocess = preprocess

    def setup(self) -> None:
        """Trace the resizing, once per worker."""
        self._prepare = prepare_images(self._preprocess)

    def process(self, file: Any) -> Iterator[Any]:
        """A file's name and resized pixels, or a line of JSON about why it cannot be read."""
        name = file.metadata.path
        try:
            if os.path.exists(name):  # of the local file system, which may have pipes
                image_files.check(Path(name))
            with file.open() as opened:
                pixels = self._prepare(read_tensor(opened.read())).numpy()
        except Exception as error:  # a damaged file makes its reader raise anything
            Metrics.counter("predict", _UNREADABLE).inc()
            line = json.dumps({"image": name, "error": reason(error)}, ensure_ascii=False)
            yield beam.pvalue.TaggedOutput(_FAILED, line)
            return
        Metrics.counter("predict", _READ).inc()
        yield name, pixels


class Handler(ModelHandler[np.ndarray, np.ndarray, Compiled]):
    """Pixels to probabilities, for ``RunInference``."""

    def __init__(self, prefix: str, batch_size: int):
        super().__init__(min_batch_size=1, max_batch_size=batch_size)
        self._prefix = prefix

    def load_model(self) -> Compiled:
        """Open the model, once per worker."""
        return Compiled(load(self._prefix).probabilities_of_resized)

    def run_inference(
        self, batch: Sequence[np.ndarray], model: Compiled, inference_args: Any = None
    ) -> Iterable[np.ndarray]:
        """The probabilities of a batch of images."""
        del inference_args
        return list(model(np.stack(batch)).numpy())
