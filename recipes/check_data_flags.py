"""Flags of ``vgg-transfer check-data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from recipes.image_flags import SplitFlags


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CheckDataConfig(SplitFlags):
    """Flags of ``vgg-transfer check-data``, with their defaults."""

    model: str = "embedded"
    """Model whose features are used to find wrong labels; 'none' skips this check."""
    preprocess: str | None = None
    """Preprocessing that the weights expect. [default: the card's]"""
    show: int = 20
    """Findings of each kind to list; --json lists all."""
    json: Annotated[bool, Parameter(negative=())] = False
    """Print JSON."""
    strict: Annotated[bool, Parameter(negative=())] = False
    """Exit with status 1 if an image is unreadable, or in both splits."""


DEFAULTS = CheckDataConfig()
