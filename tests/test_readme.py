"""The examples in the README run as they stand there."""

import re
from pathlib import Path

import pytest
import tensorflow as tf

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)


@pytest.mark.parametrize("example", EXAMPLES, ids=["tf1", "keras", "eager"])
def test_example(example, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    expected = re.findall(r"print\(.*\)  # (.*)$", example, re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[: len(expected)] == expected


def test_the_embedded_model_is_the_one_on_its_card():
    import hashlib

    from transfer import load_meta_graph

    graph = load_meta_graph(ROOT / "pretrained" / "vgg_small")
    for name, digest in graph.card.sha256.items():
        found = hashlib.sha256((ROOT / "pretrained" / name).read_bytes()).hexdigest()
        assert found == digest, name
    assert graph.card.eval["accuracy"] > 0.45
    assert graph.card.eval["top5"] > 0.7
    size = sum(p.stat().st_size for p in (ROOT / "pretrained").glob("vgg_small*"))
    assert size < 12e6
    assert tf.io.gfile.exists(str(ROOT / "pretrained" / graph.card.labels))
