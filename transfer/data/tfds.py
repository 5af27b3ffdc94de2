"""Imports ``tensorflow_datasets`` and fails early if the import was incomplete.

When a part of it cannot be imported, tfds only logs the reason, and programs fail later with
``module 'tensorflow_datasets' has no attribute 'ReadConfig'``. All modules of this project import
tfds from here, where such an import fails immediately with the reason.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import tensorflow_datasets as tfds

__all__ = ["tfds"]

_PACKAGES = ("tensorflow-datasets", "tensorflow-metadata", "protobuf", "tensorflow")


def _check() -> None:
    """Refuse a partially imported tfds.

    Raises:
        ImportError: with the first error of the import, and the versions of the packages that
            usually cause it.
    """
    if hasattr(tfds, "builder") and hasattr(tfds, "ReadConfig"):
        return
    reason: object = "it has no attribute 'builder'; is this another package of its name?"
    error: Exception | None = None
    try:
        importlib.import_module("tensorflow_datasets.public_api")  # fails as it did for tfds
    except Exception as failure:
        error, reason = failure, f"{type(failure).__name__}: {failure}"
    raise ImportError(
        f"tensorflow_datasets cannot be imported: {reason} (installed: "
        f"{', '.join(f'{package} {_version(package)}' for package in _PACKAGES)}; "
        "versions that fit together are in constraints.txt)"
    ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


_check()
