"""Types and constants shared by the modules of the fuzzer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


WILD = ROOT.parent / "shared" / "wild"


# Share of the inputs of each kind.
KINDS = {
    "meta": 6,
    "index": 3,
    "data": 1,
    "v1": 2,
    "pb": 3,
    "pbtxt": 2,
    "savedmodel": 4,
    "state": 1,
    "card": 1,
    "weights": 4,
}


OUTCOMES = ("fine", "refused", "call error", "unexpected", "crash", "hang", "memory")


FAILURES = OUTCOMES[3:]


WORKERS = 2


INPUTS_PER_WORKER = 400


GIANT = 8 * 2**30


Generator = np.random.Generator


Message = Any  # a protobuf message; only the workers import TensorFlow


@dataclass(frozen=True)
class Base:
    """An original model from which inputs are made.

    ``path`` is loaded, ``targets`` are the files that may be changed, all relative to ``folder``.
    ``complete`` models must load unchanged.
    """

    kind: str
    name: str
    folder: Path
    path: str
    targets: tuple[str, ...]
    tap: str
    input: str | None
    shape: tuple[int, ...]
    dtype: str = "float32"
    feeds: dict[str, float | bool] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True)
class Result:
    """The outcome of an input; ``number`` -1 is an unchanged original model."""

    kind: str
    number: int
    outcome: str
    base: str = ""
    mutation: str = ""
    stage: str = ""
    error: str = ""
    message: str = ""
    where: str = ""
    trace: str = ""
    seconds: float = 0.0
    growth: int = 0

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES or (self.number < 0 and self.outcome != "fine")


def pick(items: Iterable[Any], rng: Generator) -> Any:
    items = list(items)
    return items[int(rng.integers(len(items)))]
