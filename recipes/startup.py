"""Import TensorFlow for a command: late, and without its chatter."""

from __future__ import annotations

import os
import sys


def import_tensorflow() -> None:
    """Import TensorFlow and make it look for devices, with standard error closed meanwhile.

    Its C++ parts write lines there (oneDNN is on, there is no GPU) that no setting turns off and
    that would bury a one-line error.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_logical_devices()
            tf.zeros([])
        finally:
            os.dup2(saved, 2)
            os.close(saved)
