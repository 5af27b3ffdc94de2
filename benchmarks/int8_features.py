"""Time and accuracy of features in int8, compared with float32.

Computes the features of the same images in float32 and by each engine, alternating batch by batch,
so that other programs slow all of them down alike. Logistic regressions on the features then show
what int8 costs: on stratified splits, trained and tested on int8, and trained on int8 but tested on
float32, as when the classifier of an int8 run is used. Noise that is added to the float32 features
shows which error still leaves the accuracy unchanged.

    python benchmarks/int8_features.py --model vgg16 --dataset tf_flowers --data-dir DIR
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tabulate import tabulate

from transfer import Backbone, load_meta_graph, open_source
from transfer.activations.extraction import EXTRACTION_BATCH, Compiled
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.head import average_over_space
from transfer.quantization import engines, openvino
from transfer.quantization.agreement import feature_error
from transfer.quantization.calibration import CalibrationImages

FLOAT32 = "float32"
HEADERS = ("", "s/image", "CPU s", "ratio", "with calibration", "error", "accuracy", "on float32")
HEADERS += ("least p",)
NOISES = (0.1, 0.25, 0.5, 1.0)


def onnxruntime_int8(layer: GraphLayer[Any], images: np.ndarray) -> Callable[[Any], np.ndarray]:
    """onnxruntime, for comparison; it is no engine of the package."""
    import onnxruntime
    import tensorflow as tf
    import tf2onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._remaining = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._remaining, None)
            return None if image is None else {"images": image[None]}

    with tempfile.TemporaryDirectory() as folder:
        float32, int8 = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        spec = [tf.TensorSpec([None, *images.shape[1:]], tf.float32, "images")]
        run = tf.function(lambda images: layer(images), spec, autograph=False)
        tf2onnx.convert.from_function(run, spec, opset=17, output_path=str(float32))
        quantization.quantize_static(
            float32, int8, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True
        )
        session = onnxruntime.InferenceSession(str(int8), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": np.asarray(batch)})[0]


def accuracies(
    features: dict[str, np.ndarray], labels: np.ndarray, num_splits: int
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, float]]:
    """The accuracy on each split by the features of training and test, and for each engine the
    smallest p value of McNemar's exact test against float32."""
    splits = StratifiedShuffleSplit(num_splits, test_size=0.2, random_state=0)
    correct: dict[tuple[str, str], list[np.ndarray]] = {}
    for train, test in splits.split(labels[:, None], labels):
        for name, values in features.items():
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
            probe.fit(values[train], labels[train])
            for used in {name, FLOAT32}:
                found = probe.predict(features[used][test]) == labels[test]
                correct.setdefault((name, used), []).append(found)
    p_values = {}
    for name in features:
        pairs = zip(correct[FLOAT32, FLOAT32], correct[name, name], strict=True)
        only = [(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in pairs]
        p_values[name] = min(binomtest(a, a + b).pvalue if a + b else 1.0 for a, b in only)
    return {key: np.mean(found, axis=1) for key, found in correct.items()}, p_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tap", help="default: that of the model's card")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--calibration", type=int, default=32, help="images to calibrate on")
    parser.add_argument("--onnxruntime", action="store_true", help="also time onnxruntime in int8")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    backbone = Backbone(load_meta_graph(args.model), args.tap)
    preprocess = backbone.graph.preprocess(backbone.network.input)
    layer, _ = backbone.split(backbone.network.output)
    train, _ = open_source(args.dataset, data_dir=args.data_dir).train_and_eval_splits()
    calibration, _ = CalibrationImages(train, preprocess, args.seed).read()
    calibration = calibration[: args.calibration]

    makers: dict[str, Callable[..., Any]] = {"litert": engines.litert.quantize}
    if openvino.is_installed():
        makers["openvino"] = openvino.quantize
    if args.onnxruntime:
        makers["onnxruntime"] = onnxruntime_int8
    runs: dict[str, Callable[[Any], Any]] = {FLOAT32: Compiled(layer)}
    setup = {FLOAT32: 0.0}
    for name, make in makers.items():
        start = time.process_time()
        runs[name] = make(layer, calibration)
        setup[name] = time.process_time() - start
        print(f"{name}: calibrated on {len(calibration)} images, {setup[name]:.1f} CPU s")

    num_batches = -(-min(args.images, len(train)) // EXTRACTION_BATCH)
    seconds, cpu_seconds = (dict.fromkeys(runs, 0.0) for _ in range(2))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    labels: list[np.ndarray] = []
    batches = train.batches(preprocess, EXTRACTION_BATCH, shuffle_seed=args.seed)
    for number, (images, its_labels) in zip(range(num_batches), batches, strict=False):
        images = np.asarray(images)
        for name, run in runs.items():
            if number == 0:
                run(images)  # traces, allocates
            start, cpu_start = time.perf_counter(), time.process_time()
            outputs = np.asarray(run(images))
            seconds[name] += time.perf_counter() - start
            cpu_seconds[name] += time.process_time() - cpu_start
            rows[name].append(np.asarray(average_over_space(outputs)))
        labels.append(np.asarray(its_labels))
        print(f"batch {number + 1} of {num_batches}", end="\r", flush=True)
    of_images = np.concatenate(labels)
    features = {name: np.concatenate(parts) for name, parts in rows.items()}

    num_images = len(of_images)
    by_features, p_values = accuracies(features, of_images, args.splits)
    table = []
    for name in runs:
        table.append(
            [
                name,
                seconds[name] / num_images,
                cpu_seconds[name] / num_images,
                seconds[name] / seconds[FLOAT32],
                (cpu_seconds[name] + setup[name]) / cpu_seconds[FLOAT32],
                feature_error(features[FLOAT32], features[name]),
                100 * by_features[name, name].mean(),
                100 * by_features[name, FLOAT32].mean(),
                p_values[name],
            ]
        )
    print(f"{args.model}, {args.dataset}, {num_images} images of {preprocess.shape}")
    print(
        tabulate(
            table,
            HEADERS,
            floatfmt=("", ".4f", ".4f", ".2f", ".2f", ".3f", ".2f", ".2f", ".2g"),
            tablefmt="github",
        )
    )
    generator = np.random.default_rng(args.seed)
    spread = np.sqrt(np.mean((features[FLOAT32] - features[FLOAT32].mean(0)) ** 2))
    noisy = {
        f"noise {size}": features[FLOAT32]
        + generator.normal(0, size * spread, features[FLOAT32].shape)
        for size in NOISES
    }
    by_features, _ = accuracies({FLOAT32: features[FLOAT32], **noisy}, of_images, args.splits)
    for name in noisy:
        on_noise, on_float32 = by_features[name, name].mean(), by_features[name, FLOAT32].mean()
        print(f"{name}: accuracy {100 * on_noise:.2f}, on float32 {100 * on_float32:.2f}")


if __name__ == "__main__":
    main()
