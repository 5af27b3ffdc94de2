"""Write native Keras models, with what a reader without this package needs."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import keras

from transfer.core.files import names_as_text, replacing
from transfer.models.card import Card

LABELS, CARD = "labels.txt", "card.json"
"""Files in a ``.keras`` archive beside those of Keras, which ignores them."""


def save_native(
    model: keras.Model, path: Path, *, labels: Sequence[str] = (), card: Card | None = None
) -> None:
    """Write a model as a ``.keras`` file, atomically.

    The file is a zip archive. Keras ignores the files that are added here: ``labels.txt``, one
    class name per line, in the order of the outputs, and ``card.json``, what the model expects. A
    program reads them with ``zipfile.ZipFile(path).read("labels.txt")``.

    Args:
        model: a native model, from ``to_keras``.
        path: file to write, with the suffix ``.keras``.
        labels: class names.
        card: description of the model.
    """
    with replacing(path) as temporary:
        draft = temporary.with_suffix(".keras")
        try:
            model.save(draft)
            with zipfile.ZipFile(draft, "a") as archive:
                if labels:
                    archive.writestr(LABELS, names_as_text(labels))
                if card is not None:
                    archive.writestr(CARD, card.to_json())
            draft.replace(temporary)
        finally:
            draft.unlink(missing_ok=True)
