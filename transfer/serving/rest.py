"""Requests and answers of TensorFlow Serving's REST API
(https://www.tensorflow.org/tfx/serving/api_rest), without HTTP.

Inputs and outputs are named as in the SavedModel of ``export``: ``image_bytes`` or ``pixels`` to
``probabilities`` and ``label``, so that a client works with either server.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.images.preprocess import to_channels
from transfer.serving.served_model import BadImageError, Image

VERSION = "1"
_SIGNATURES = (None, "", "serving_default", "pixels")
_EXPECTED = 'expected {"b64": "..."}, an image file, or pixels as nested lists of integers'


class RequestError(Exception):
    """A request that is answered with an error; ``status`` is that of HTTP, ``retry_after`` the
    time in seconds after which it may succeed."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class PredictRequest:
    """The images of a request, with an error in the place of each that cannot be used. In columnar
    format, one error fails the request."""

    images: list[Image | BadImageError]
    is_columnar: bool


def parse(body: bytes, max_images: int = 1024) -> PredictRequest:
    """Read the body of a ``:predict`` request.

    Raises:
        RequestError: if it is not a request for images, or for more than ``max_images``.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(400, f"the body is a JSON {type(request).__name__}; expected an object")
    signature = request.get("signature_name")
    if signature not in _SIGNATURES:
        raise RequestError(400, f"signature_name is {signature!r}; expected serving_default")
    given = [name for name in ("instances", "inputs") if name in request]
    if len(given) != 1:
        raise RequestError(
            400, f"the body has {' and '.join(given) or 'no instances'}; expected instances"
        )
    values, is_columnar = request[given[0]], given == ["inputs"]
    if is_columnar:
        values = _named(values)
    if not isinstance(values, list) or not values:
        raise RequestError(400, f"{given[0]} has no images; expected a list of them")
    if len(values) > max_images:
        raise RequestError(413, f"the body has {len(values)} images; expected at most {max_images}")
    images = [_image(value if is_columnar else _named(value)) for value in values]
    return PredictRequest(images, is_columnar)


def answer(
    request: PredictRequest,
    results: Sequence[np.ndarray | BadImageError],
    labels: Sequence[str],
    abstain_below: float | None = None,
) -> dict[str, Any]:
    """The answer to a request.

    Args:
        request: the request.
        results: for each of its images the probabilities, float32 ``[num_classes]``, or an error.
        labels: the names of the classes.
        abstain_below: adds ``not_sure``, whether the highest probability is lower than this.

    Returns:
        A JSON object. In row format it has ``predictions`` with ``{"error": ...}`` for each image
        that cannot be read.

    Raises:
        RequestError: if no image can be read; in columnar format, if one cannot.
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, BadImageError):
            rows.append({"error": str(result)})
            continue
        best = int(result.argmax())
        row = {"probabilities": result.tolist(), "label": labels[best]}
        if abstain_below is not None:
            row["not_sure"] = bool(result[best] < abstain_below)
        rows.append(row)
    failed = [number for number, row in enumerate(rows) if "error" in row]
    if failed and (request.is_columnar or len(failed) == len(rows)):
        raise RequestError(400, f"image {failed[0]}: {rows[failed[0]]['error']}")
    if request.is_columnar:
        return {"outputs": {name: [row[name] for row in rows] for name in rows[0]}}
    return {"predictions": rows}


def status() -> dict[str, Any]:
    """The status of the model."""
    no_error = {"error_code": "OK", "error_message": ""}
    return {
        "model_version_status": [{"version": VERSION, "state": "AVAILABLE", "status": no_error}]
    }


def _named(value: Any) -> Any:
    """The input itself, from ``{"image_bytes": ...}`` or ``{"pixels": ...}``."""
    if isinstance(value, dict) and len(value) == 1:
        return value.get("image_bytes", value.get("pixels", value))
    return value


def _image(value: Any) -> Image | BadImageError:
    """The image in an instance of a request, or an error if it holds no image."""
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except ValueError as error:
            return BadImageError(f"it is not base64: {error}")
    if not isinstance(value, list):
        return BadImageError(f"it is of type {type(value).__name__}; {_EXPECTED}")
    kinds = set(map(type, np.array(value, dtype=object).ravel().tolist()))
    if list in kinds:
        return BadImageError(f"its rows have different lengths; {_EXPECTED}")
    if str in kinds:  # NumPy would allocate the size of the longest text for every element
        return BadImageError(f"it has text among the pixels; {_EXPECTED}")
    pixels = np.array(value)
    if pixels.dtype.kind != "i" or pixels.ndim != 3 or not pixels.size:
        return BadImageError(f"it has the shape {pixels.shape} of {pixels.dtype}; {_EXPECTED}")
    if pixels.shape[-1] not in (1, 3, 4):
        return BadImageError(f"it has {pixels.shape[-1]} channels; expected 1, 3 or 4")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 255:
        return BadImageError(f"it has values from {low} to {high}; expected 0..255")
    return np.asarray(to_channels(pixels.astype(np.uint8), 3))
