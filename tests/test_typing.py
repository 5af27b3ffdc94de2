"""mypy finds misuse of the Python API in programs, and nothing in correct ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import numpy as np

from transfer import Backbone, Classifier, Head, Preprocess, build_head, load_meta_graph
from transfer.models.plan import plan

graph = load_meta_graph("vgg.meta")
photos = np.zeros((2, 80, 80, 3), np.uint8)
preprocess = Preprocess("caffe", 224)
images = preprocess(photos)
images = preprocess(["a.jpg", "b.jpg"])
fc7 = Backbone(graph)(images)
print(fc7.shape, fc7.numpy().mean(), fc7 * 2 + 1, np.asarray(fc7))
several = Backbone("vgg.meta", tap=["pool4", "fc7"])(images)
print(several["pool4"].shape, [maps.dtype for maps in several.values()])
logits = build_head(fc7, num_classes=2, stop_gradient=True)
logits, probabilities = build_head(several, 2, return_probabilities=True)
logits = Head(2, hidden=[64])(several)
prefix, suffix = Backbone(graph, tap=["pool4", "fc7"]).split("pool3")
print(suffix(prefix(images))["fc7"].shape)
classifier = Classifier(Backbone(graph, pooling="max"), Head(2), preprocess, ["a", "b"])
print(classifier(photos).shape)

build_head(fc7, num_classes="2")  # error: arg-type
build_head("fc7", num_classes=2)  # error: arg-type
Backbone(graph, pooling="mean")  # error: arg-type
Backbone(graph, tap=7)  # error: arg-type
Preprocess("foo", 224)  # error: arg-type
Preprocess("caffe", "224")  # error: arg-type
plan("vgg.meta")  # error: arg-type
print(several.shape)  # error: attr-defined
print(several + 1)  # error: operator
print(fc7["fc7"].undefined)  # error: attr-defined
logits.append(1)  # error: attr-defined
Head("2")  # error: arg-type
preprocess(3)  # error: arg-type
print(suffix(prefix(images)).shape)  # error: attr-defined
"""


@pytest.mark.slow
def test_mypy_finds_planted_misuse_and_nothing_else(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    options = ["--config-file", "pyproject.toml", "--no-error-summary", "--no-pretty"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(program)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = {}
    for line in result.stdout.splitlines():
        match = re.fullmatch(r"(.*?):(\d+): error: .*\[([\w-]+)\]", line)
        if match:
            assert Path(match[1]).name == program.name, line
            found[int(match[2])] = match[3].replace("call-overload", "arg-type")
    expected = {
        number: line.partition("# error: ")[2]
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "# error: " in line
    }
    assert found == expected, result.stdout + result.stderr
