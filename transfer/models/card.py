"""Model cards: expected input, source and evaluation of a model, stored in ``<prefix>.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer.core.files import read_text, write_text
from transfer.images.preprocess import Size, as_size

MAX_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Card:
    """Metadata that a meta graph lacks but that is needed to use it. All fields are optional.

    Example:
        >>> from transfer import Card, load_meta_graph
        >>> card = load_meta_graph("pretrained/vgg_small").card
        >>> card.input, card.tap, card.image_size, card.preprocess
        ('images:0', 'fc7:0', 64, 'torch')
        >>> Card(input="images:0", tap="fc7:0", image_size=224, preprocess="caffe").licence
    """

    input: str | None = None
    """Tensor that takes the preprocessed images, e.g. ``images:0``."""
    tap: str | None = None
    """Tensor with the features, e.g. ``fc7:0``."""
    taps: list[str] = field(default_factory=list)
    """Where ``tap`` is the features of several tensors, pooled over height and width and
    concatenated: these tensors, in order."""
    image_size: Size | None = None
    """Height and width of the input in pixels: one number, or both."""
    preprocess: str | dict[str, Any] | None = None
    """Input convention: a key of ``transfer.images.preprocess.CONVENTIONS``, or custom means:
    ``{"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}``; see
    ``transfer.images.preprocess.convention``."""
    labels: str | None = None
    """File with one class name per line, in the order of the logits; relative to the card."""
    feeds: dict[str, float | bool] = field(default_factory=dict)
    """Placeholders other than the input, with their value, at inference and in training: 1.0 for a
    ``keep_prob`` turns its dropout off in fine-tuning, too."""
    keep_dropout: bool = False
    """Whether dropout that the graph always applies stays active at inference."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Output tensors by name: ``logits``, ``probabilities``."""
    source: str | None = None
    licence: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    """File name to SHA-256, for the files of the model."""
    trained_on: str | None = None
    eval: dict[str, Any] = field(default_factory=dict)
    """Metrics on held-out images, as in ``metrics.json``."""

    def to_json(self) -> str:
        """The card as JSON text, without unset values."""
        values = {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if value not in (None, {}, [], False)
        }
        return json.dumps(values, indent=2) + "\n"


_ITEMS: dict[str, Any] = {
    "taps": str,
    "outputs": str,
    "sha256": str,
    "feeds": bool | int | float,
}
"""Types of the items of a list, or of the values of an object."""


def write_card(path: Path, card: Card) -> None:
    """Write a card atomically."""
    write_text(path, card.to_json())


def read_card(path: Path) -> Card:
    """Read a card; unknown keys are ignored.

    Raises:
        ValueError: if the file is not a card.
    """
    try:
        values = json.loads(read_text(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a card: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is not a card: expected a JSON object")
    kinds: dict[str, Any] = {
        "keep_dropout": bool,
        "feeds": dict,
        "outputs": dict,
    }
    kinds |= {"taps": list, "sha256": dict, "eval": dict, "preprocess": str | dict}
    known = {f.name: values[f.name] for f in dataclasses.fields(Card) if f.name in values}
    if "image_size" in known:
        try:
            known["image_size"] = as_size(known["image_size"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r}: image_size is {known['image_size']!r}; expected an int, or height "
                "and width"
            ) from error
    for key, value in known.items():
        if key == "image_size":
            continue
        kind = kinds.get(key, str)
        if not isinstance(value, kind):
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{str(path)!r}: {key} is {value!r}; expected a {name}")
        items = value if isinstance(value, list) else value.values() if key in _ITEMS else ()
        if not all(isinstance(item, _ITEMS.get(key, object)) for item in items):
            raise ValueError(f"{str(path)!r}: {key} is {value!r}; expected other values in it")
    return Card(**known)
