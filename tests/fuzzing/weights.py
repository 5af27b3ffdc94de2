"""Original weight files in every layout, of a VGG with a few hundred parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, Base


def tiny_architecture() -> Any:
    """Register a tiny architecture in this process, so that its files can be converted."""
    from transfer.vgg import architectures

    tiny = architectures.Architecture(((2,), (2,), (3,), (3,), (4,)), fc=5, image_size=64)
    return architectures.ARCHITECTURES.setdefault("tiny", tiny)


def weights_bases(root: Path) -> Iterator[Base]:
    import keras

    from transfer.vgg import architectures

    sys.path.append(str(ROOT / "tests"))
    import published_files as published

    tiny = tiny_architecture()
    published.SMALL, published.NUM_CLASSES = tiny, 3
    published.VALUES = architectures.random_weights(tiny, 3)
    published.CONVOLUTIONS = [name for block in tiny.convolutions for name, _ in block]
    published.WINDOW, published.CHANNELS = tiny.pooled_size, tiny.blocks[-1][-1]

    def base(name: str, file: str, write: Callable[[Path], object]) -> Base:
        folder = root / f"weights-{name}"
        folder.mkdir()
        write(folder / file)
        files = tuple(sorted(path.name for path in folder.iterdir()))  # several of a checkpoint
        return Base("weights", name, folder, file, files, "fc7", None, ())

    def write_old_matconvnet(path: Path) -> None:
        published.write_matconvnet(path, transposed=True, old=True)

    writers = {name: writer for name, (writer, *_) in published.WRITERS.items()}
    writers |= {
        "torch": published.write_torch_zip,
        "old torch": published.write_torch_legacy,
        "old matconvnet": write_old_matconvnet,
    }
    for name, writer in writers.items():
        yield base(name, "weights", writer)

    layers = [keras.Input((64, 64, 3))]
    for (width,) in tiny.blocks:
        layers += [keras.layers.Conv2D(width, 3, padding="same")]
        layers += [keras.layers.BatchNormalization(), keras.layers.ReLU()]
        layers += [keras.layers.MaxPooling2D()]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(3)])
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):  # before a ReLU
            layer.moving_mean.assign(-layer.moving_variance)
    for suffix in (".h5", ".keras", ".weights.h5"):
        write = model.save_weights if suffix == ".weights.h5" else model.save
        yield base(f"saved{suffix}", f"weights{suffix}", write)
    yield base("onnx", "weights", lambda path: write_onnx(path, tiny))


def write_onnx(path: Path, tiny: Any) -> None:
    """A tiny VGG as torch.onnx writes it."""
    import numpy as np
    from onnx import helper, numpy_helper

    nodes, weights, last, channels = [], [], "images", 3

    def add(kind: str, *arrays: Any, **attributes: Any) -> None:
        nonlocal last
        names = [f"w{len(weights) + number}" for number in range(len(arrays))]
        weights.extend(numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True))
        nodes.append(helper.make_node(kind, [last, *names], [f"t{len(nodes)}"], **attributes))
        last = f"t{len(nodes) - 1}"

    for (width,) in tiny.blocks:
        kernel, ones = np.ones((width, channels, 3, 3), np.float32), np.ones(width, np.float32)
        add("Conv", kernel, ones, kernel_shape=[3, 3], pads=[1] * 4)
        add("BatchNormalization", ones, ones, ones, ones)
        add("Relu")
        add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        channels = width
    add("Flatten")
    add("Gemm", np.ones((3, 4 * channels), np.float32), np.ones(3, np.float32), transB=1)
    image = helper.make_tensor_value_info("images", 1, ["n", 3, 64, 64])
    output = helper.make_tensor_value_info(last, 1, None)
    graph = helper.make_graph(nodes, "vgg", [image], [output], weights)
    path.write_bytes(helper.make_model(graph).SerializeToString())
