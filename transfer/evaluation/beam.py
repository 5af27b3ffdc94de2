"""Prediction on large numbers of images as an Apache Beam pipeline.

File names -> pixels -> probabilities -> lines of JSON. Beam's ``RunInference`` batches the images
and loads the model once per process.
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
    """Run the pipeline and wait until it finishes.

    Args:
        model: run folder, or checkpoint prefix of a fine-tuned model. Model, images and outputs may
            be on any filesystem that Beam supports.
        pattern: glob pattern of the images, e.g. ``"photos/*.jpg"``; ``**`` also matches
            subfolders.
        output: prefix of the output shards, ``<output>-00000-of-00004.jsonl`` etc., with one line
            of ``as_json`` per image; ``<output>.failed-*.jsonl`` list unreadable images, with the
            reason.
        top_k: number of classes per image.
        batch_size: maximum number of images per step.
        options: Beam options, e.g. ``["--runner", "FlinkRunner"]``.

    Returns:
        The number of images, and the number of those that could not be read.

    Raises:
        FileNotFoundError: if the model does not exist, or no image matches.
        ValueError: if ``top_k`` or ``batch_size`` is less than 1, or the model is not fine-tuned.

    Example:
        >>> from transfer.evaluation.beam import predict_on_beam
        >>> predict_on_beam("runs/a", "photos/**.jpg", "out/predictions")  # doctest: +SKIP
        (24, 0)
    """
    check_counts(top_k=top_k, batch_size=batch_size)
    prefix = find_model(model)
    classifier = load(prefix)  # raises errors of the model before workers start
    labels = list(classifier.labels)
    if not FileSystems.match([pattern], limits=[1])[0].metadata_list:
        raise FileNotFoundError(f"no file matches {pattern!r}")
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    read = (
        pipeline
        | fileio.MatchFiles(pattern)
        | beam.Reshuffle()  # distributes the files over the workers
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
    """The checkpoint prefix of a model, given this prefix or a run folder.

    Raises:
        FileNotFoundError: if there is no model.
    """
    for prefix in (FileSystems.join(model, MODEL), model):
        if FileSystems.exists(f"{prefix}.meta"):
            return prefix
    raise FileNotFoundError(
        f"{model!r} is neither a run folder nor the checkpoint prefix of a model: {model}.meta "
        "does not exist"
    )


def load(prefix: str) -> Classifier:
    """Load a classifier from any filesystem that Beam supports."""
    if Path(f"{prefix}.meta").is_file():
        return Classifier.load(Path(prefix))
    directory, name = FileSystems.split(prefix)
    with tempfile.TemporaryDirectory() as folder:

        def fetch(path: str) -> Path:
            copy = Path(folder, FileSystems.split(path)[1])
            with FileSystems.open(path) as source, copy.open("wb") as file:
                shutil.copyfileobj(source, file)
            return copy

        for file in FileSystems.match([f"{prefix}.*"])[0].metadata_list:
            fetch(file.path)
        card = Path(folder, f"{name}.json")
        labels = read_card(card).labels if card.is_file() else None
        if labels and Path(labels).name == labels:  # else loading raises the error
            fetch(FileSystems.join(directory, labels))
        return Classifier.load(Path(folder, name))


class Read(beam.DoFn):
    """Maps a file to ``(name, float32 [size, size, channels] in 0..255)``; unreadable files go to a
    second output, as lines of JSON."""

    def __init__(self, preprocess: Preprocess):
        self._preprocess = preprocess

    def setup(self) -> None:
        """Trace the resizing function, once per worker."""
        self._prepare = prepare_images(self._preprocess)

    def process(self, file: Any) -> Iterator[Any]:
        """Yield the name and resized pixels of a file, or a line of JSON with the reason why it
        cannot be read."""
        name = file.metadata.path
        try:
            if os.path.exists(name):  # a local file, which may be a pipe
                image_files.check(Path(name))
            with file.open() as opened:
                pixels = self._prepare(read_tensor(opened.read())).numpy()
        except Exception as error:  # decoders of damaged files may raise anything
            Metrics.counter("predict", _UNREADABLE).inc()
            line = json.dumps({"image": name, "error": reason(error)}, ensure_ascii=False)
            yield beam.pvalue.TaggedOutput(_FAILED, line)
            return
        Metrics.counter("predict", _READ).inc()
        yield name, pixels


class Handler(ModelHandler[np.ndarray, np.ndarray, Compiled]):
    """Maps pixels to probabilities, for ``RunInference``."""

    def __init__(self, prefix: str, batch_size: int):
        super().__init__(min_batch_size=1, max_batch_size=batch_size)
        self._prefix = prefix

    def load_model(self) -> Compiled:
        """Load the model, once per worker."""
        return Compiled(load(self._prefix).probabilities_of_resized)

    def run_inference(
        self, batch: Sequence[np.ndarray], model: Compiled, inference_args: Any = None
    ) -> Iterable[np.ndarray]:
        """The probabilities of a batch of images."""
        del inference_args
        return list(model(np.stack(batch)).numpy())
