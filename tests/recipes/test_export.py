"""`vgg-transfer export`: each format is run by its own runtime and compared with the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import finetune
from conftest import TINY, save_vgg
from PIL import ExifTags, Image

from recipes.cli import main
from transfer import Card, Classifier, load_meta_graph, save_meta_graph
from transfer.exports import onnx, tflite
from transfer.exports.writing import export_run
from transfer.images.decoding import decode

KINDS = ["meta_graph", "saved_model", "tflite float32", "tflite float16", "tflite int8", "onnx"]
KINDS += ["keras"]
TOLERANCES = {"tflite float16": 0.02, "tflite int8": 0.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run and its exports."""
    from conftest import make_image_folder

    folder = tmp_path_factory.mktemp("exports")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="caffe")
    model = save_vgg(folder / "model" / "tiny", card=card)
    photos = make_image_folder(folder / "photos")
    assert finetune(folder / "run", model, photos, "--epochs", 20) == 0
    assert main(["export", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def photo(run, tmp_path):
    """A JPEG with an EXIF rotation, and the model's probabilities for it."""
    return on_its_side(run, tmp_path / "photo.jpg")


def probabilities(run, path):
    pixels = decode(tf.constant(path.read_bytes()))[None]
    return Classifier.load(run / "model").probabilities(pixels)[0].numpy()


def with_16_bits(path):
    """A gray PNG."""
    pixels = np.random.default_rng(0).integers(0, 2**15, (20, 31)).astype(np.uint16)
    Image.fromarray(pixels).save(path)
    return path


def on_its_side(run, path):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    with Image.open(run.parent / "photos" / "red" / "04.jpg") as image:
        image.save(path, exif=tags, quality=95)
    return path, probabilities(run, path)


def figures(run):
    return json.loads((run / "export" / "export.json").read_text())


@pytest.mark.slow
def test_exports_are_compared_with_model(run):
    found = figures(run)
    assert list(found["exports"]) == KINDS
    assert found["num_images"] > 0
    for kind, row in found["exports"].items():
        assert row["max_difference"] <= TOLERANCES.get(kind, 1e-5), kind
        assert row["same_label"] == 1.0
        assert row["images_per_s"] > 0
    sizes = {kind: row["megabytes"] for kind, row in found["exports"].items()}
    assert sizes["tflite int8"] < sizes["tflite float16"] < sizes["tflite float32"]


EACH_PROGRAM = """
import json, os, sys
for folder, code in json.loads(sys.argv[1]):
    os.chdir(folder)
    exec(compile(code, folder + "/README.md", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [["saved_model", "keras", "meta_graph"], ["tflite"], ["onnx"]],  # one import of TensorFlow
    ids=" ".join,
)
def test_readme_code_predicts_as_model(run, tmp_path, names):
    """Runs its Python code in the folder of the export, without this project, on a JPEG and a PNG
    with an EXIF rotation, and on a PNG with 16 bits."""
    photos = [on_its_side(run, tmp_path / f"photo.{kind}") for kind in ("jpg", "png")]
    path = with_16_bits(tmp_path / "16.png")
    photos.append((path, probabilities(run, path)))
    programs = []
    for name in names:
        text = (run / "export" / name / "README.md").read_text()
        assert f"| {next(k for k in KINDS if k.startswith(name))} |" in text
        code = text.partition("```python\n")[2].partition("```")[0]
        own = (code.replace("photo.jpg", str(path)) for path, _ in photos)
        programs += [(str(run / "export" / name), program) for program in own]
    result = subprocess.run(
        [sys.executable, "-P", "-c", EACH_PROGRAM, json.dumps(programs)], cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    labels = (run / "labels.txt").read_text().splitlines()
    for line, (path, expected) in zip(result.stdout.splitlines(), photos * len(names), strict=True):
        label, probability = line.split()
        assert label == labels[expected.argmax()]
        # Pillow decodes JPEGs a little differently.
        tolerance = 0.01 if path.suffix == ".jpg" else 1e-4
        assert float(probability) == pytest.approx(expected.max(), abs=tolerance)


@pytest.mark.slow
def test_saved_model_accepts_files_and_pixels(run, photo):
    path, expected = photo
    model = tf.saved_model.load(str(run / "export" / "saved_model" / "1"))
    data = tf.constant([path.read_bytes(), (run.parent / "photos/blue/01.png").read_bytes()])
    found = model.signatures["serving_default"](image_bytes=data)
    np.testing.assert_allclose(found["probabilities"][0], expected, atol=1e-6)
    assert found["label"].numpy().tolist() == [b"red", b"blue"]
    found = model.signatures["pixels"](pixels=decode(path.read_bytes())[None])
    np.testing.assert_allclose(found["probabilities"][0], expected, atol=1e-6)
    assert model.signatures["labels"]()["labels"].numpy().tolist() == [b"blue", b"red"]


@pytest.mark.slow
def test_exports_agree_with_predict(run, photo, capsys):
    path, expected = photo
    capsys.readouterr()
    assert main(["predict", str(run), str(path), "--format", "jsonl", "--top-k", "1"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["predictions"]
    assert best["probability"] == pytest.approx(expected.max(), abs=1e-6)


@pytest.mark.slow
def test_readme_says_what_its_decoding_changes(run):
    difference = figures(run)["max_difference_of_files"]
    assert 0 < difference < 0.05  # half of the photos are JPEGs
    for name in ("keras", "meta_graph", "tflite", "onnx"):
        text = (run / "export" / name / "README.md").read_text()
        assert f"differ by up to {difference:.1g} from its own" in text
    assert "differ by up to" not in (run / "export" / "saved_model" / "README.md").read_text()


@pytest.mark.slow
def test_run_whose_images_were_moved_is_exported(run, tmp_path, capsys):
    """On synthetic images, but without an int8 model."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(run.parent / "photos"), str(tmp_path / "no")))
    flags = ["--format", "keras,tflite"]
    assert main(["export", str(tmp_path / "run"), *flags]) == 0
    err = capsys.readouterr().err
    assert f"image folder {str(tmp_path / 'no')!r} does not exist; move them back, or put a" in err
    assert "compared with the model on synthetic images instead. There is no int8 TFLite" in err
    assert [*figures(tmp_path / "run")["exports"]] == ["keras", "tflite float32", "tflite float16"]
    text = (tmp_path / "run" / "export" / "keras" / "README.md").read_text()
    assert "of synthetic images:" in text


@pytest.mark.slow
def test_run_with_some_images_gone_is_exported_with_the_others(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    shutil.copytree(run.parent / "photos", tmp_path / "photos")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(run.parent), str(tmp_path)))
    first, *others = (tmp_path / "run" / "held_out.txt").read_text().splitlines()
    (tmp_path / "photos" / first).unlink()
    metrics, _ = export_run(tmp_path / "run", formats=["keras"])
    assert metrics["num_images"] == len(others)
    assert f"1 of the images that the run held out are gone, such as {first!r}" in caplog.text


@pytest.mark.slow
def test_model_in_run_folder_is_answered_with_the_folder(run, tmp_path, capsys):
    assert main(["export", str(run / "model")]) == 1
    assert f"is the model in the run folder {str(run)!r}; name that folder" in (
        capsys.readouterr().err
    )
    assert main(["export", str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_saved_model_rejects_undecodable_files(run, tmp_path):
    with Image.open(run.parent / "photos" / "red" / "04.jpg") as image:
        image.save(tmp_path / "photo.tiff")
    model = tf.saved_model.load(str(run / "export" / "saved_model" / "1"))
    data = tf.constant([(tmp_path / "photo.tiff").read_bytes()])
    with pytest.raises(tf.errors.InvalidArgumentError, match="Unknown image file format"):
        model.signatures["serving_default"](image_bytes=data)


@pytest.mark.slow
def test_exported_meta_graph_can_be_loaded(run):
    graph = load_meta_graph(run / "export" / "meta_graph" / "model")
    assert (graph.card.input, graph.card.preprocess) == ("pixels:0", "none")
    # Raises if the graph needs more than arithmetic.
    graph.network(graph.card.outputs["probabilities"], graph.card.input)


@pytest.mark.slow
def test_gray_network_is_exported(tmp_path, image_folder):
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 12, 12, 1], name="x")
        w = tf.compat.v1.get_variable("w", [144, 8], use_resource=False)
        tf.nn.relu(tf.matmul(tf.reshape(x, [-1, 144]), w), name="features")
    values = {"w": np.random.default_rng(0).normal(size=(144, 8)).astype(np.float32)}
    card = Card(input="x:0", tap="features:0", image_size=12, preprocess="unit")
    save_meta_graph(graph, tmp_path / "gray", values, card)
    assert finetune(tmp_path / "run", tmp_path / "gray", image_folder) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    assert list(figures(tmp_path / "run")["exports"]) == KINDS


@pytest.mark.slow
def test_export_with_different_results_is_not_kept(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx, "load", lambda path: lambda pixels: np.full((len(pixels), 2), 0.5))
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 1
    assert "onnx gives other results than the model" in capsys.readouterr().err
    assert [path.name for path in out.glob("[!.]*")] == ["export.json"]


@pytest.mark.slow
def test_rejected_export_does_not_stop_others(run, tmp_path, monkeypatch, capsys):
    load = tflite.load

    def wrong(path):
        return (lambda pixels: 1 - load(path)(pixels)) if "float16" in path.name else load(path)

    monkeypatch.setattr(tflite, "load", wrong)
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "tflite,saved_model", "--out", str(out)]) == 1
    assert "tflite float16 gives other results" in capsys.readouterr().err
    kept = json.loads((out / "export.json").read_text())["exports"]
    assert list(kept) == ["tflite float32", "tflite int8", "saved_model"]
    assert not (out / "tflite" / "model_float16.tflite").exists()
    assert (out / "tflite" / "model_int8.tflite").exists()


@pytest.mark.slow
def test_second_export_keeps_first_and_foreign_files(run, tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("meta_graph", "saved_model", "meta_graph"):
        assert main(["export", str(run), "--format", name, "--out", str(out)]) == 0
    found = json.loads((out / "export.json").read_text())["exports"]
    assert found.keys() == {"saved_model", "meta_graph"}
    (out / "tflite").mkdir()
    (out / "tflite" / "notes.txt").write_text("mine")
    assert main(["export", str(run), "--format", "tflite", "--out", str(out)]) == 1
    assert "is not an earlier export; choose another --out" in capsys.readouterr().err
    assert (out / "tflite" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_network_with_fixed_batch_size_is_exported(tmp_path, image_folder, capsys):
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [3, 12, 12, 3], name="x")
        w = tf.compat.v1.get_variable("w", [432, 8], use_resource=False)
        each = tf.constant([[0.0], [0.0], [0.0]])  # does not say that it is the same for all
        tf.nn.relu(tf.matmul(tf.reshape(x, [3, 432]), w) + each, name="features")
    values = {"w": np.random.default_rng(0).normal(size=(432, 8)).astype(np.float32)}
    card = Card(input="x:0", tap="features:0", image_size=12, preprocess="unit")
    save_meta_graph(graph, tmp_path / "fixed", values, card)
    assert finetune(tmp_path / "run", tmp_path / "fixed", image_folder) == 0
    assert Classifier.load(tmp_path / "run").backbone.network.batch_size == 3
    assert main(["export", str(tmp_path / "run"), "--format", "onnx,meta_graph"]) == 1
    assert "export it as saved_model" in capsys.readouterr().err
    assert list(figures(tmp_path / "run")["exports"]) == ["meta_graph"]
    text = (tmp_path / "run" / "export" / "meta_graph" / "README.md").read_text()
    assert "np.repeat(pixels, 3, axis=0)" in text


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--format", "onnx,pickle"], "'pickle' is unknown; choose from meta_graph, saved_model"),
    (["--num-images", "0"], "--num-images must be at least 1"),
])  # fmt: skip
def test_export_rejects_invalid_flags(run, flags, message, capsys):
    assert main(["export", str(run), *flags]) == 1
    assert message in capsys.readouterr().err


def test_missing_onnx_suggests_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'vgg-transfer\[onnx\]'"):
        onnx.check_installed()


@pytest.mark.slow
def test_resource_variables_and_convolutions_are_exported(tmp_path, image_folder):
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="torch")
    model = save_vgg(tmp_path / "vgg", TINY, convolutional=True, use_resource=True, card=card)
    assert finetune(tmp_path / "run", model, image_folder, "--freeze-until", "none") == 0
    assert main(["export", str(tmp_path / "run"), "--format", "tflite,onnx"]) == 0
    assert Path(tmp_path / "run" / "export" / "onnx" / "labels.txt").read_text() == "blue\nred\n"


def test_tflite_rejects_unknown_precision():
    with pytest.raises(ValueError, match="precision 'int4' is not known; choose from: float32"):
        tflite.convert(None, "int4")
