"""The commands and Python examples in the README run unchanged and print the documented output."""

import glob
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tensorflow as tf
from commands import largest_difference, metrics
from conftest import make_image_folder
from PIL import Image
from served_runs import started
from sklearn.datasets import load_digits

from recipes.cli import main
from transfer import open_source

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.M)


@pytest.fixture
def _a_clone(tmp_path, monkeypatch):
    """A working folder with the files that the examples use."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_digits(tmp_path, monkeypatch):
    """400 of the 1,797 digits, prepared in a folder of the test."""
    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:400], target=digits.target[:400])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    open_source("digits")  # prints as it prepares them


def run(example, capsys):
    expected = re.findall(r"print\(.*\)  # (.*)$", example, re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[: len(expected)] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("_a_clone", "few_digits")
def test_fine_tuning_example_equals_command_bit_for_bit(tmp_path, capsys):
    run(EXAMPLES[0], capsys)
    flags = ["--freeze-until", "pool4", "--epochs", "2", "--out", "command"]
    assert main(["finetune", *flags]) == 0
    assert largest_difference(tmp_path / "runs/digits/model", tmp_path / "command/model") == 0
    ours, theirs = metrics(tmp_path / "runs/digits"), metrics(tmp_path / "command")
    assert ours["eval"] == theirs["eval"]
    assert ours["eval"]["num_examples"] == 80
    assert (tmp_path / "exported" / "keras").is_dir()


@pytest.mark.usefixtures("_a_clone")
@pytest.mark.parametrize("example", EXAMPLES[1:], ids=["tf1", "keras"])
def test_example_prints_documented_output(example, capsys):
    run(example, capsys)


@pytest.mark.slow
def test_the_first_five_commands_work_in_order(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"^## The first five minutes\n.*?```\n(.*?)```", README, re.DOTALL | re.M)
    first, *commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert first == ["make", "demo"]
    assert re.search(r"^demo:.*\n\t.*vgg-transfer finetune$", (ROOT / "Makefile").read_text(), re.M)
    assert len(commands) == 4
    assert {program for program, *_ in commands} == {".venv/bin/vgg-transfer"}
    make_image_folder(tmp_path / "photos")
    (tmp_path / "new").mkdir()
    for number, path in enumerate(sorted((tmp_path / "photos").glob("*/*"))[::9]):
        Image.open(path).convert("RGB").save(tmp_path / "new" / f"{number}.jpg")
    (predict,) = re.findall(r"`vgg-transfer (predict [^`]*)`", README)
    monkeypatch.chdir(tmp_path)
    *jobs, serve = [arguments for _, *arguments in commands]
    for arguments in (*jobs, predict.split()):
        words = [path for word in arguments for path in sorted(glob.glob(word)) or [word]]
        assert main(words) == 0, words
    predicted = capsys.readouterr().out.splitlines()[-len([*tmp_path.glob("new/*")]) :]
    assert all(line.startswith("new/") for line in predicted)
    assert serve == ["serve", "runs/photos"]
    with started(tmp_path / serve[1]) as (url, _):
        page = httpx.get(url, trust_env=False).text
    assert "<title>vgg-transfer</title>" in page
    assert '"labels": ["blue", "red"]' in page


def test_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_embedded_model_matches_its_card():
    import hashlib

    from transfer import load_meta_graph

    graph = load_meta_graph(ROOT / "pretrained" / "vgg_small")
    for name, digest in graph.card.sha256.items():
        actual = hashlib.sha256((ROOT / "pretrained" / name).read_bytes()).hexdigest()
        assert actual == digest, name
    assert graph.card.eval["accuracy"] > 0.45
    assert graph.card.eval["top5"] > 0.7
    size = sum(p.stat().st_size for p in (ROOT / "pretrained").glob("vgg_small*"))
    assert size < 12e6
    assert tf.io.gfile.exists(str(ROOT / "pretrained" / graph.card.labels))
