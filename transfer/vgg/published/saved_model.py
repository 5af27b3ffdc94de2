"""The Keras model in a SavedModel, without its graph: the configuration that Keras 2 stores."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

from transfer.vgg.published import wire

_METADATA = "keras_metadata.pb"
_MAX_BYTES = 2**26
# Of SavedMetadata and SavedObject. Source: tf_keras/protobuf/saved_metadata.proto.
_NODES, _PATH, _METADATA_JSON = 1, 3, 5


def keras_config(folder: Path) -> str | None:
    """The configuration of the model, in JSON as in a Keras ``.h5`` file; ``None`` if the folder
    has none.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / _METADATA
    if not path.is_file() or not path.stat().st_size:
        return None
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"its {_METADATA} has {path.stat().st_size:,} bytes")
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for number, node in wire.fields(data):
        if number != _NODES or isinstance(node, int):
            continue
        values = dict(wire.fields(node))
        path_in_model, text = values.get(_PATH, 0), values.get(_METADATA_JSON, 0)
        if isinstance(path_in_model, int) or isinstance(text, int):
            continue
        if bytes(path_in_model) == b"root":
            return _model_config(bytes(text))
    return None


def _model_config(text: bytes) -> str | None:
    try:
        metadata: Any = json.loads(text, object_hook=_without_tuples)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {_METADATA} is damaged: {error}") from error
    config = metadata.get("model_config") if isinstance(metadata, dict) else None
    return json.dumps(config) if isinstance(config, dict) else None


def _without_tuples(value: dict[str, Any]) -> Any:
    """A list for a tuple, as JSON has it in a ``.h5`` file."""
    return value.get("items") if value.get("class_name") == "__tuple__" else value
