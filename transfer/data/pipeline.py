"""Settings of ``tf.data`` pipelines."""

from __future__ import annotations

import tensorflow as tf


def without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset, and all that is derived from it, without automatic tuning of parallelism.

    The thread that tunes a pipeline sleeps for as long as the pipeline has run so far, up to a
    minute. The end of an iteration should wake it, but with TensorFlow 2.21 on two cores, two of
    three iterations waited for it to wake by itself, at most until they had taken twice as long.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
