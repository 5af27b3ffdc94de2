"""Flags of ``vgg-transfer predict``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Flags of ``vgg-transfer predict``, with their defaults."""

    top_k: int = 3
    """Number of classes to show per image, most probable first."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """csv: a row per image and class; jsonl: one JSON object per image and line."""
    batch_size: int = 32
    """Images per step."""
    abstain_below: float | None = None
    """Mark predictions whose probability is below this value, 0 to 1, as not sure; csv and jsonl
    have a column sure. The report of evaluate shows what a value gains."""
    probabilities: Path | None = None
    """File for the probabilities of all classes: a NumPy array (.npy, float32) with a row per image
    of the results and a column per line of labels.txt."""
    explain: Path | None = None
    """Folder for a Grad-CAM heat map per image, over the photo at its own resolution, named by its
    number in the results: red marks the region that explains the most probable class."""


DEFAULTS = PredictConfig()
