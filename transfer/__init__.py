"""Transfer learning with pretrained VGG networks that come as TensorFlow meta graphs.

Load a network, put a head on it, fine-tune it:

* ``load_meta_graph`` parses a model without running it; ``MetaGraph`` and ``Card`` describe it.
* ``Backbone`` is the network up to a tap, as a Keras layer; ``Preprocess``, ``Backbone`` and
  ``Head`` form a ``Classifier``. ``build_head`` adds a head to a tensor.
* ``open_source`` opens labelled images; ``fine_tune`` trains a ``Classifier`` on them, and
  ``grow`` adds images to a finished run; ``extract_features`` computes their features.
* ``evaluate`` computes metrics on labelled images, ``predict`` classifies image files.
* ``export`` writes a classifier for other programs: SavedModel, TFLite, ONNX, Keras, meta graph.
* ``to_keras`` converts a network to a Keras model of stock layers, for any backend of Keras.
* ``convert`` converts published weights to a meta graph; ``save_meta_graph`` writes models that
  stock TensorFlow opens.

The library takes values, returns values and raises exceptions; it logs, and does not print, parse
flags or exit. Names are imported on first use, so that ``import transfer`` does not import
TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transfer.core import keras_objects

if TYPE_CHECKING:
    from transfer.activations.features import Features, extract_features
    from transfer.data.sources import open_source
    from transfer.evaluation.file_predictions import Prediction, predict
    from transfer.evaluation.scoring import evaluate
    from transfer.exports.writing import export
    from transfer.finetuning.grow import grow
    from transfer.finetuning.run import FineTuneResult, fine_tune
    from transfer.graph.policy import ForbiddenOpError
    from transfer.images.preprocess import Preprocess
    from transfer.layers.backbone import Backbone
    from transfer.layers.classifier import Classifier
    from transfer.layers.head import Head, build_head
    from transfer.layers.native.conversion import to_keras
    from transfer.models.card import Card
    from transfer.models.meta_graph import MetaGraph, load_meta_graph
    from transfer.models.saver import save_meta_graph
    from transfer.vgg.published.conversion import convert

# In the order of the API page, in which a program uses them.
_MODULES = {
    "load_meta_graph": "transfer.models.meta_graph",
    "MetaGraph": "transfer.models.meta_graph",
    "Card": "transfer.models.card",
    "Backbone": "transfer.layers.backbone",
    "build_head": "transfer.layers.head",
    "Head": "transfer.layers.head",
    "Preprocess": "transfer.images.preprocess",
    "Classifier": "transfer.layers.classifier",
    "open_source": "transfer.data.sources",
    "extract_features": "transfer.activations.features",
    "Features": "transfer.activations.features",
    "fine_tune": "transfer.finetuning.run",
    "grow": "transfer.finetuning.grow",
    "FineTuneResult": "transfer.finetuning.run",
    "evaluate": "transfer.evaluation.scoring",
    "predict": "transfer.evaluation.file_predictions",
    "Prediction": "transfer.evaluation.file_predictions",
    "export": "transfer.exports.writing",
    "to_keras": "transfer.layers.native.conversion",
    "convert": "transfer.vgg.published.conversion",
    "save_meta_graph": "transfer.models.saver",
    "ForbiddenOpError": "transfer.graph.policy",
}

__all__ = [
    "Backbone",
    "Card",
    "Classifier",
    "Features",
    "FineTuneResult",
    "ForbiddenOpError",
    "Head",
    "MetaGraph",
    "Prediction",
    "Preprocess",
    "build_head",
    "convert",
    "evaluate",
    "export",
    "extract_features",
    "fine_tune",
    "grow",
    "load_meta_graph",
    "open_source",
    "predict",
    "save_meta_graph",
    "to_keras",
]


keras_objects.register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_backend()
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return list(_MODULES)


def _check_backend() -> None:
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ImportError(
            f"Keras runs on {keras.backend.backend()!r} but a meta graph needs 'tensorflow'; "
            "set KERAS_BACKEND=tensorflow before the first import"
        )
