"""Start-up of every subcommand: imports TensorFlow quietly, keeps standard output for results."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from recipes import console, terminal

# Keras imports them, if installed, for wrappers and plots that no subcommand uses: a quarter of the
# time to import TensorFlow. What needs them imports them later.
_NOT_FOR_KERAS = ("sklearn", "matplotlib")


@contextlib.contextmanager
def job(strategy: str = "none") -> Iterator[Any]:
    """Import TensorFlow; within the context, output of TensorFlow, Keras and tfds goes to standard
    error.

    Yields the ``Replicas`` of the strategy, or ``None``; with several workers it waits until all
    have started.

    During the import and device discovery, standard error is redirected to the null device: the C++
    code logs lines (oneDNN is on, no GPU found) that no setting turns off and that would hide a
    one-line error.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            with _hidden(_NOT_FOR_KERAS):
                import tensorflow as tf

            tf.get_logger().setLevel("ERROR")  # warnings about retracing are for developers
            replicas = None if strategy == "none" else _replicas(strategy, saved)
            tf.config.list_logical_devices()
            tf.zeros([])
        finally:
            os.dup2(saved, 2)
            os.close(saved)
    console.log_to_stderr()
    with contextlib.redirect_stdout(terminal.raw(sys.stderr)):  # Keras bars move the cursor
        yield replicas


@contextlib.contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Within the context, packages that are not imported yet cannot be imported."""
    hidden = [name for name in names if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # to import None raises an ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _replicas(strategy: str, stderr: int) -> Any:
    from transfer.core.distribution import num_workers, open_replicas

    if strategy in ("auto", "multi_worker") and num_workers() > 1:
        os.write(stderr, b"waiting for the other workers of TF_CONFIG\n")
    return open_replicas(strategy)
