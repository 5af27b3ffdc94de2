"""The range of pixels that are given as arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

logger = logging.getLogger(__name__)

_LIMIT = 300  # interpolation may go slightly beyond 255


def check_range(arrays: Iterable[np.ndarray], scale: float | None = None) -> None:
    """Refuse pixels of another range than 0 to 255, and warn if they are at most 1.

    Args:
        arrays: pixels of any shape and numeric dtype.
        scale: factor that makes the pixels 0 to 255, if the user can give one.

    Raises:
        ValueError: if pixels are booleans without a factor, not finite, or far above 255.
    """
    arrays = [*arrays]
    has_hint = scale == 1
    if scale in (None, 1) and any(array.dtype == bool for array in arrays):
        hint = ": if True is white, give scale=255" if has_hint else ""
        raise ValueError(f"pixels are booleans; expected 0 to 255{hint}")
    highest = [array.max() for array in arrays if array.size]
    if not highest:
        return
    largest = (scale or 1) * float(np.max(highest))
    if not largest < _LIMIT:  # NaN too
        times = "" if scale in (None, 1) else f" times scale={scale:g}"
        hint = ": if white is 65535, give scale=255/65535" if has_hint else ""
        raise ValueError(f"pixels{times} are up to {largest:.6g}; expected 0 to 255{hint}")
    if 0 < largest <= 1:
        hint = ": if white is 1, give scale=255" if has_hint else ""
        logger.warning(f"pixels are at most {largest:.3g}; expected 0 to 255{hint}")
