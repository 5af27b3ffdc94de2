"""The classes of this package that Keras finds in saved models, registered without being imported.

``keras.models.load_model`` looks classes up by name among those that are registered, which happens
when their modules are imported. ``import transfer`` imports none of them, nor Keras: that would
take seconds. So it registers stand-ins, which import a class when a model needs it: at once where
Keras is imported already, else right after it is.
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
    "SharedVariables": "transfer.layers.backbone",
    "GraphLayer": "transfer.layers.backbone",
    "Backbone": "transfer.layers.backbone",
    "Head": "transfer.layers.head",
    "Classifier": "transfer.layers.classifier",
    "FusedAdam": "transfer.training.optimizers",
    "FusedSGD": "transfer.training.optimizers",
}
"""Name of a class to its module."""


def register() -> None:
    """Register the stand-ins, now or when Keras is imported."""
    if "keras" in sys.modules:
        _register()
    elif not any(isinstance(finder, _KerasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _KerasFinder())


class StandIn:
    """What Keras uses of a class to make an instance."""

    def __init__(self, name: str):
        self.__name__ = name

    def from_config(self, config: dict[str, Any]) -> Any:
        cls = getattr(importlib.import_module(CLASSES[self.__name__]), self.__name__)
        return cls.from_config(config)


class _KerasFinder(MetaPathFinder):
    """Finds Keras as the other finders do, once, and has the stand-ins registered after it."""

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

    # Not before the classes themselves, where they are imported already.
    registered = keras.saving.get_custom_objects()
    for name in CLASSES:
        registered.setdefault(f"{PACKAGE}>{name}", StandIn(name))
