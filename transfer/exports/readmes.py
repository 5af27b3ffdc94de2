"""The README of each export: inputs, outputs, and example code."""

from __future__ import annotations

import inspect
import re
from typing import Any

from transfer.exports import preparing
from transfer.layers.classifier import Classifier

_META_GRAPH = """\
# {name}: a meta graph with preprocessing in the graph

Input `pixels:0`: float32 `[{batch}, height, width, {channels}]`, 0 to 255, of any size. Output
`probabilities:0`: float32 `[batch, {num_classes}]`, in the order of `labels.txt`.

```python
import numpy as np
import tensorflow.compat.v1 as tf
from PIL import Image, ImageOps

{read}

with tf.Graph().as_default(), tf.Session() as session:
    tf.train.import_meta_graph("model.meta").restore(session, "model")
    image = read("photo.jpg"){converted}
    pixels = np.array(image, np.float32).reshape(1, image.height, image.width, {channels})
    pixels = np.repeat(pixels, {repeats}, axis=0)
    probabilities = session.run("probabilities:0", {{"pixels:0": pixels}})[0]
labels = open("labels.txt", encoding="utf-8").read().splitlines()
print(labels[probabilities.argmax()], probabilities.max())
```
"""

_SAVED_MODEL = """\
# {name}: a SavedModel

* `serving_default` takes `image_bytes`, string `[batch]`: JPEG, PNG, GIF or BMP files,
  oriented by their metadata (EXIF, XMP), and WebP if TensorFlow can decode it; other formats are
  refused: decode them and use `pixels`;
* `pixels` takes `pixels`, uint8 `[batch, height, width, 3]`: RGB, of any size;
* both return `probabilities`, float32 `[batch, {num_classes}]`, and `label`, string `[batch]`;
* `labels` has no inputs and returns `labels`, string `[{num_classes}]`, in the order of the
  probabilities.

In Python:

```python
import tensorflow as tf

model = tf.saved_model.load("1")
files = tf.constant([open("photo.jpg", "rb").read()])
outputs = model.signatures["serving_default"](image_bytes=files)
print(outputs["label"][0].numpy().decode(), outputs["probabilities"][0].numpy().max())
```

With TensorFlow Serving; `1` is the version number, and this folder contains the versions:

```
docker run -p 8501:8501 -v "$PWD:/models/it" -e MODEL_NAME=it tensorflow/serving
b64=$(base64 < photo.jpg | tr -d '\\n')
curl http://localhost:8501/v1/models/it:predict \\
  -d "{{\\"instances\\": [{{\\"image_bytes\\": {{\\"b64\\": \\"$b64\\"}}}}]}}"
```
"""

_TFLITE = """\
# {name}: TFLite

Up to three files with the same inputs and outputs. Input: images, float32
`[batch, {height}, {width}, {channels}]` in 0 to 255, resized to cover {height}x{width} pixels and
center-cropped. Output: probabilities, float32 `[batch, {num_classes}]`, in the order of
`labels.txt`. `float16` has half the size of `float32`; `int8` has a quarter and computes in
integers.

```python
from ai_edge_litert.interpreter import Interpreter
{prepare}

interpreter = Interpreter("model_float32.tflite")
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], prepare("photo.jpg", {size}))
interpreter.invoke()
probabilities = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
labels = open("labels.txt", encoding="utf-8").read().splitlines()
print(labels[probabilities.argmax()], probabilities.max())
```
"""

_ONNX = """\
# {name}: ONNX

Input `pixels`: float32 `[batch, {height}, {width}, {channels}]` in 0 to 255, resized to cover
{height}x{width} pixels and center-cropped. Output `probabilities`: float32
`[batch, {num_classes}]`, in the order of `labels.txt`.

```python
import onnxruntime
{prepare}

session = onnxruntime.InferenceSession("model.onnx")
probabilities = session.run(["probabilities"], {{"pixels": prepare("photo.jpg", {size})}})[0][0]
labels = open("labels.txt", encoding="utf-8").read().splitlines()
print(labels[probabilities.argmax()], probabilities.max())
```
"""

_KERAS = """\
# {name}: a Keras model

Stock layers only, which Keras 3 runs on TensorFlow, JAX and PyTorch; no other package is needed.
Input: images, float32 `[batch, {height}, {width}, {channels}]` in 0 to 255, resized to cover
{height}x{width} pixels and center-cropped; the model normalizes them. Output: logits, float32
`[batch, {num_classes}]`, in the order of `labels.txt`, which is also inside `model.keras`, a zip
archive. To train it further, use a loss with `from_logits=True`.

```python
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # or jax, or torch
import keras
{prepare}

model = keras.models.load_model("model.keras")
logits = model.predict(prepare("photo.jpg", {size}), verbose=0)
probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))[0]
labels = open("labels.txt", encoding="utf-8").read().splitlines()
print(labels[probabilities.argmax()], probabilities.max())
```
"""

_TEMPLATES = {
    "meta_graph": _META_GRAPH,
    "saved_model": _SAVED_MODEL,
    "tflite": _TFLITE,
    "onnx": _ONNX,
    "keras": _KERAS,
}


def text(
    name: str,
    title: str,
    classifier: Classifier,
    metrics: dict[str, dict[str, float]],
    images: str,
    prepared_difference: float | None = None,
) -> str:
    """The README of an export.

    Args:
        name: name of the format.
        title: title of the model.
        classifier: the exported classifier.
        metrics: maps each file kind to the result of its comparison with the classifier.
        images: description of the images of the comparison.
        prepared_difference: maximum absolute difference of a probability where the code of the
            README decodes and resizes the images; ``None`` if it is not known.
    """
    preprocess = classifier.preprocess
    words: dict[str, Any] = {
        "name": title,
        "batch": classifier.backbone.network.batch_size or "batch",
        "repeats": classifier.backbone.network.batch_size or 1,
        "channels": preprocess.channels,
        "converted": "" if preprocess.channels == 3 else '.convert("L")',
        "num_classes": len(classifier.labels),
        "height": preprocess.height,
        "width": preprocess.width,
    }
    words["size"] = f"{preprocess.height}, {preprocess.width}"
    words["size"] += "" if preprocess.channels == 3 else ", gray=True"
    words["read"] = inspect.getsource(preparing.read).strip()
    words["prepare"] = (
        f"import numpy as np\nfrom PIL import Image, ImageOps\n\n\n{words['read']}\n\n\n"
        f"{inspect.getsource(preparing.prepare).strip()}"
    )
    rows = "".join(
        f"| {kind} | {row['megabytes']:.1f} | {row['max_difference']:.1g} "
        f"| {row['same_label']:.1%} |\n"
        for kind, row in metrics.items()
    )
    template = _TEMPLATES[name]
    if words["repeats"] == 1:
        template = re.sub(r" *pixels = np\.repeat\(pixels, {repeats}, axis=0\)\n", "", template)
    return (
        template.format(**words)
        + f"\nCompared with the model it was made from, on the same pixels of {images}:\n\n"
        + "| | MB | largest difference of a probability | equal labels |\n|---|---|---|---|\n"
        + rows
        + _of_files(name, prepared_difference)
    )


def _of_files(name: str, difference: float | None) -> str:
    """What to expect where the code of a README decodes and resizes the images."""
    if name == "saved_model":
        return (
            "\n`serving_default` decodes and resizes files as the model's own program does. The "
            "signature `pixels` resizes only.\n"
        )
    measured = ""
    if difference is not None:
        measured = (
            " From the files of these images, decoded and resized by the code above, the "
            f"probabilities of the model differ by up to {difference:.1g} from its own."
        )
    return (
        "\nThe export contains the normalization of pixels, not the decoding of files"
        f"{'' if name == 'meta_graph' else ' and not the resizing'}. The code above decodes with "
        "Pillow, whose pixels of a JPEG differ by a few gray levels from those of TensorFlow, with "
        f"which the model was trained; those of a PNG are the same.{measured}\n"
    )
