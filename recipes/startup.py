"""What every job begins with: TensorFlow without its chatter, standard output for results only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Import TensorFlow; what it, Keras and tfds print within goes to standard error.

    While it is imported and looks for devices, standard error is closed: its C++ parts write lines
    there (oneDNN is on, there is no GPU) that no setting turns off and that would bury a one-line
    error.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            import tensorflow as tf

            tf.get_logger().setLevel("ERROR")  # warnings about retracing are for developers
            tf.config.list_logical_devices()
            tf.zeros([])
        finally:
            os.dup2(saved, 2)
            os.close(saved)
    with contextlib.redirect_stdout(sys.stderr):
        yield
