"""Register this package's serializable Keras classes lazily, without importing their modules.

``keras.models.load_model`` looks classes up by their registered name, and classes are registered
when their modules are imported. ``import transfer`` imports neither these modules nor Keras, which
would take seconds. It registers stand-ins instead, which import a class when a model needs it:
immediately if Keras is already imported, else right after Keras is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGE = "vgg_transfer"
CLASSES = {
    "Preprocess": "transfer.images.preprocess",
    "SharedVariables": "transfer.layers.graph_layer",
    "GraphLayer": "transfer.layers.graph_layer",
    "Backbone": "transfer.layers.backbone",
    "Head": "transfer.layers.head",
    "Classifier": "transfer.layers.classifier",
    "FusedAdam": "transfer.training.optimizers",
    "FusedSGD": "transfer.training.optimizers",
}
"""Class name to module."""


def register() -> None:
    """Register the stand-ins, now or when Keras is imported."""
    if "keras" in sys.modules:
        _register()
    elif not any(isinstance(finder, _KerasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _KerasFinder())


class StandIn:
    """Stands in for a class: implements what Keras needs to create an instance."""

    def __init__(self, name: str):
        self.__name__ = name

    def from_config(self, config: dict[str, Any]) -> Any:
        cls = getattr(importlib.import_module(CLASSES[self.__name__]), self.__name__)
        return cls.from_config(config)


class _KerasFinder(MetaPathFinder):
    """Import hook that registers the stand-ins once Keras is imported, then removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != "keras":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        vars(loader)["exec_module"] = exec_module
        return spec


def _register() -> None:
    import keras

    # Does not replace the classes themselves if they are already imported.
    registered = keras.saving.get_custom_objects()
    for name in CLASSES:
        registered.setdefault(f"{PACKAGE}>{name}", StandIn(name))
