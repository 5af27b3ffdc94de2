"""Transfer learning with pretrained VGG networks that come as TensorFlow meta graphs.

The library takes values, returns values and raises; it does not print, parse flags or exit.
"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"Keras runs on {keras.backend.backend()!r} but a meta graph needs 'tensorflow'; "
        "set KERAS_BACKEND=tensorflow before the first import"
    )

from transfer.backbone import Backbone
from transfer.card import Card
from transfer.classifier import Classifier
from transfer.head import Head, build_head
from transfer.metagraph import MetaGraph, load_meta_graph
from transfer.policy import ForbiddenOpError
from transfer.preprocess import Preprocess
from transfer.saver import save_meta_graph

__all__ = [
    "Backbone",
    "Card",
    "Classifier",
    "ForbiddenOpError",
    "Head",
    "MetaGraph",
    "Preprocess",
    "build_head",
    "load_meta_graph",
    "save_meta_graph",
]
