"""Run in a process with another backend of Keras: TensorFlow and this package cannot be imported.

KERAS_BACKEND=jax python keras_program.py predict FOLDER
KERAS_BACKEND=jax python keras_program.py train FOLDER
KERAS_BACKEND=jax python keras_program.py execute PROGRAM
"""

import os
import sys
from pathlib import Path


class WithoutTensorFlow:
    """An import hook that finds no TensorFlow, unless it is the backend, and not this package."""

    hidden = {"transfer"} | ({"tensorflow"} - {os.environ["KERAS_BACKEND"]})

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(WithoutTensorFlow, sys.meta_path)

import keras  # noqa: E402
import numpy as np  # noqa: E402

EPOCHS, BATCH = 10, 32


def predict(folder):
    """The outputs of every model in a folder for the images beside it."""
    for path in sorted(folder.glob("*.keras")):
        model = keras.models.load_model(path)
        outputs = model.predict(np.load(path.with_suffix(".images.npy")), verbose=0)
        np.save(path.with_suffix(".outputs.npy"), outputs)


def train(folder):
    """The accuracy of a head that is trained on the features of a native model."""
    data = np.load(folder / "digits.npz")
    backbone = keras.models.load_model(folder / "backbone.keras")
    features = [backbone.predict(data[name], verbose=0) for name in ("train", "held_out")]
    # Backends draw different random numbers from one seed.
    dense = keras.layers.Dense(10, activation="softmax", kernel_initializer="zeros")
    head = keras.Sequential([keras.Input(features[0].shape[1:]), dense])
    head.compile(
        keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    labels = data["train_labels"]
    head.fit(features[0], labels, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    _, accuracy = head.evaluate(features[1], data["held_out_labels"], verbose=0)
    print(keras.backend.backend(), f"{accuracy:.4f}")


def execute(path):
    """Run another program."""
    exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    {"predict": predict, "train": train, "execute": execute}[sys.argv[1]](Path(sys.argv[2]))
