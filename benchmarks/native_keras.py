"""Seconds per training step of VGG16: this project's layer, and stock Keras layers on each backend.

    python benchmarks/native_keras.py --steps 5

All weights are trained, by plain gradient descent, with `keras.Model.train_on_batch` in a process
of its own for each row. JAX and PyTorch are in the environments of `make backends`, or in this one;
else their rows are left out.
Prints the median, the range, and the FLOP rate of matrix products before and after each row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as on the command line

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "Backbone": "tensorflow",
    "stock layers, TensorFlow": "tensorflow",
    "stock layers, TensorFlow with XLA": "tensorflow",
    "stock layers, JAX": "jax",
    "stock layers, PyTorch": "torch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(options.row, options.folder, options.steps, options.batch)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "tensorflow", "-c", f"{WRITE}\nwrite({name!r})")
        print("| | s per step | range | GFLOP/s of matrix products |\n|---|---|---|---|")
        for row, backend in ROWS.items():
            python = python_of(backend)
            if python is not None:
                arguments = [__file__, "--row", row, "--folder", folder]
                numbers = ["--steps", options.steps, "--batch", options.batch]
                run(python, backend, *arguments, *numbers)


def python_of(backend: str) -> str | None:
    """The Python program that has a backend, if there is one."""
    path = ROOT / f".venv-{backend}" / "bin" / "python"
    if path.is_file():
        return str(path)
    return sys.executable if find_spec(backend) else None


def run(python: str, backend: str, *arguments: object) -> None:
    environment = os.environ | {"KERAS_BACKEND": backend}
    subprocess.run([python, *map(str, arguments)], check=True, env=environment)


WRITE = """
def write(folder):
    from pathlib import Path

    from transfer import load_meta_graph, save_meta_graph, to_keras
    from transfer.vgg import architectures

    architecture = architectures.ARCHITECTURES["vgg16"]
    weights = architectures.random_weights(architecture, 5)
    prefix = Path(folder) / "vgg16"
    save_meta_graph(architectures.build_graph(architecture, 5), prefix, weights)
    to_keras(load_meta_graph(prefix), "fc7").save(Path(folder) / "vgg16.keras")
"""


def measure(row: str, folder: Path, steps: int, batch: int) -> None:
    """Print a row of the table."""
    import keras
    import numpy as np

    if row == "Backbone":
        from transfer import Backbone

        network = Backbone(folder / "vgg16", "fc7")
    else:
        network = keras.models.load_model(folder / "vgg16.keras")
    model = keras.Sequential([keras.Input((224, 224, 3)), network, keras.layers.Dense(5)])
    is_tensorflow = keras.backend.backend() == "tensorflow"
    model.compile(
        keras.optimizers.SGD(1e-6),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile="XLA" in row if is_tensorflow else "auto",
    )
    images = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    labels = np.arange(batch) % 5
    model.train_on_batch(images, labels)  # traces or compiles, and allocates memory
    seconds, before = [], product_gflops()
    for _ in range(steps):
        start = time.perf_counter()
        model.train_on_batch(images, labels)
        seconds.append(time.perf_counter() - start)
    after = product_gflops()
    print(
        f"| {row} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} "
        f"| {before:.0f}, {after:.0f} |",
        flush=True,
    )


def product_gflops(size: int = 2048) -> float:
    """What NumPy reaches on this machine now."""
    import numpy as np

    matrix = np.ones((size, size), np.float32)
    matrix @ matrix
    start = time.perf_counter()
    matrix @ matrix
    return 2e-9 * size**3 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
