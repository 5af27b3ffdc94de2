"""What the last evaluation of a run recorded for predictions of new images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from transfer.runs import run_folder


def recorded_sets(run: Path) -> dict[str, Any]:
    """The entry ``conformal`` of the last evaluation, with the ``threshold`` for new images.

    Raises:
        ValueError: if there is none.
    """
    if (sets := _evaluation(run).get("conformal")) and "threshold" in sets:
        return dict(sets)
    raise ValueError(
        f"the last evaluation of the run in {str(run)!r} measured no prediction sets, whose "
        f"threshold the sets of new images need; run evaluate {run} --coverage 0.9 first"
    )


def recorded_unknown(run: Path) -> dict[str, Any] | None:
    """The entry ``unknown`` of the last evaluation, ``None`` if there is none."""
    found: dict[str, Any] | None = _evaluation(run).get("unknown")
    return found


def recorded_class_means(run: Path) -> np.ndarray:
    """The class means of the last evaluation, float32 ``[num_classes, num_features]``.

    Raises:
        ValueError: if there are none.
    """
    path = run / run_folder.CLASS_MEANS
    if recorded_unknown(run) is None or not path.is_file():
        raise ValueError(
            f"the last evaluation of the run in {str(run)!r} has no class means, which "
            f"feature_distance needs; run evaluate {run} --unknown FOLDER first, with images of "
            "none of the classes"
        )
    return np.asarray(np.load(path, allow_pickle=False))


def _evaluation(run: Path) -> dict[str, Any]:
    """The last evaluation, of the weights that the run has now: one that is resumed or grown
    writes its metrics anew, without an evaluation."""
    path = run / run_folder.METRICS
    found = run_folder.read_json(path).get("evaluation") if path.is_file() else None
    return found if isinstance(found, dict) else {}
