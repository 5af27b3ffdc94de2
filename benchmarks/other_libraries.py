"""Forward passes and training steps of VGG16: this project, Keras, PyTorch and OpenVINO.

    python benchmarks/other_libraries.py --model vgg16

For the parts that the cuts `pool5`, `pool4` and `none` compute in each step: the features up to
`pool5`, a step of the last block and the head, and one of the whole network, with Adam, in batches
of 32 images of 224 px. PyTorch and OpenVINO get the weights of the model, and their features are
compared with those of this project. Repetitions of all rows alternate, so that other programs slow
all of them down alike. PyTorch and OpenVINO are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as on the command line

import keras
import numpy as np
import tensorflow as tf
from tabulate import tabulate

from transfer import Backbone, Head, load_meta_graph, to_keras
from transfer.activations.extraction import Compiled
from transfer.core.measurement import sgemm_gflops
from transfer.models.meta_graph import MetaGraph
from transfer.training.optimizers import make_optimizer
from transfer.training.trainer import ParameterGroup, Trainer

BATCH, NUM_CLASSES, RATE = 32, 5, 1e-7
Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a VGG16 that has an end called pool5")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()

    graph = load_meta_graph(arguments.model)
    generator = np.random.default_rng(0)
    images = generator.normal(0, 60, (BATCH, 224, 224, 3)).astype(np.float32)
    labels = np.arange(BATCH) % NUM_CLASSES
    works: dict[tuple[str, str], Work] = {}
    features = here(works, graph, images, labels)
    stock_keras(works, graph, images, labels)
    for name, add in {"torch": pytorch, "openvino": openvino}.items():
        if find_spec(name) is not None:
            add(works, graph, images, labels)
    for (part, name), work in works.items():
        result = work()  # traces or compiles, and allocates memory
        if part == "forward, pool5":
            error = np.abs(np.asarray(result) - features).max() / np.abs(features).max()
            print(f"{name}: features differ by {error:.1e} of the largest", flush=True)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    rates = [sgemm_gflops()]
    for _ in range(arguments.repeat):
        for key, work in works.items():
            start = time.perf_counter()
            work()
            seconds[key].append(time.perf_counter() - start)
        rates.append(sgemm_gflops())
    ours = {part: np.array(seconds[part, "this project"]) for part, _ in works}
    rows = [
        [
            part,
            name,
            f"{1e3 * statistics.median(taken) / BATCH:.1f}",
            f"{1e3 * min(taken) / BATCH:.1f} to {1e3 * max(taken) / BATCH:.1f}",
            f"{statistics.median(np.array(taken) / ours[part]):.2f}",
        ]
        for (part, name), taken in sorted(seconds.items(), key=lambda item: item[0][0])
    ]
    print(tabulate(rows, ["", "", "ms/image", "range", "ratio"], tablefmt="github"))
    print(f"sgemm: {min(rates):.0f} to {max(rates):.0f} GFLOP/s")


def here(
    works: dict[tuple[str, str], Work], graph: MetaGraph, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Add this project's work; returns the features."""
    backbone = Backbone(graph, "pool5")
    forward = Compiled(backbone)
    works["forward, pool5", "this project"] = lambda: forward(images).numpy()
    frozen, last = backbone.split("pool4")
    activations = np.asarray(Compiled(frozen)(images))
    for part, layer, inputs in (
        ("step, pool4", last, activations),
        ("step, none", Backbone(graph, "pool5"), images),
    ):
        model = keras.Sequential([layer, Head(NUM_CLASSES)])
        model(inputs[:1])
        group = ParameterGroup(make_optimizer("adam", RATE), model.trainable_variables)
        trainer = Trainer(model, [group])
        works[part, "this project"] = lambda t=trainer, x=inputs: t.train_step(x, labels)
    return np.asarray(forward(images))


def stock_keras(
    works: dict[tuple[str, str], Work], graph: MetaGraph, images: np.ndarray, labels: np.ndarray
) -> None:
    """The same network of stock layers."""
    network = to_keras(graph, "pool5")
    forward = tf.function(lambda x: network(x, training=False))
    works["forward, pool5", "Keras"] = lambda: forward(images).numpy()
    layers = [keras.Input(images.shape[1:]), network, keras.layers.Dense(NUM_CLASSES)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(RATE), loss)
    works["step, none", "Keras"] = lambda: model.train_on_batch(images, labels)


def pytorch(
    works: dict[tuple[str, str], Work], graph: MetaGraph, images: np.ndarray, labels: np.ndarray
) -> None:
    """The same network in PyTorch: as it is, channels last, and compiled."""
    import torch

    def blocks() -> list[torch.nn.Sequential]:
        """Blocks 1 to 4, and block 5, with the weights of the model."""
        weights = iter(Backbone(graph, "pool5").get_weights())
        parts: list[list[torch.nn.Module]] = [[], []]
        for block, count in enumerate((2, 2, 3, 3, 3)):
            layers = parts[block == 4]
            for _ in range(count):
                kernel, bias = (torch.from_numpy(next(weights)) for _ in range(2))
                kernel = kernel.permute(3, 2, 0, 1)
                convolution = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
                with torch.no_grad():
                    convolution.weight.copy_(kernel)
                    convolution.bias.copy_(bias)
                layers += [convolution, torch.nn.ReLU()]
            layers.append(torch.nn.MaxPool2d(2))
        return [torch.nn.Sequential(*layers) for layers in parts]

    targets = torch.from_numpy(labels)

    def step(model: Any, inputs: torch.Tensor) -> Work:
        optimizer = torch.optim.Adam(model.parameters(), RATE)

        def work() -> float:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            return loss.item()

        return work

    def head() -> list[torch.nn.Module]:
        layers: list[torch.nn.Module] = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        return [*layers, torch.nn.Linear(512, NUM_CLASSES)]

    def prepare(module: Any, is_last: bool, is_compiled: bool) -> Any:
        if is_last:
            module = module.to(memory_format=torch.channels_last)
        return torch.compile(module) if is_compiled else module

    for name, is_last, is_compiled in (
        ("PyTorch", False, False),
        ("PyTorch, channels_last", True, False),
        ("PyTorch, channels_last, torch.compile", True, True),
    ):
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2))
        inputs = inputs.contiguous(
            memory_format=torch.channels_last if is_last else torch.contiguous_format
        )
        first, last = blocks()
        network = prepare(torch.nn.Sequential(first, last).eval(), is_last, is_compiled)

        def forward(network: Any = network, inputs: torch.Tensor = inputs) -> np.ndarray:
            with torch.no_grad():
                return network(inputs).mean((2, 3)).numpy()

        works["forward, pool5", name] = forward
        with torch.no_grad():
            activations = first(inputs)
        frozen = torch.nn.Sequential(blocks()[1], *head())
        works["step, pool4", name] = step(prepare(frozen, is_last, is_compiled), activations)
        full = torch.nn.Sequential(*blocks(), *head())
        works["step, none", name] = step(prepare(full, is_last, is_compiled), inputs)


def openvino(
    works: dict[tuple[str, str], Work], graph: MetaGraph, images: np.ndarray, labels: np.ndarray
) -> None:
    """Features by OpenVINO in float32; it does not train."""
    from transfer.quantization.frozen_graph import frozen
    from transfer.quantization.openvino import compiled, without_telemetry

    with without_telemetry():
        from openvino import convert_model

    layer, _ = (backbone := Backbone(graph, "pool5")).split(backbone.network.output)
    model = convert_model(frozen(layer, images.shape[1:]).graph.as_graph_def())
    forward = compiled(model)
    works["forward, pool5", "OpenVINO"] = lambda: forward(images).mean((1, 2))


if __name__ == "__main__":
    main()
