"""`vgg-transfer convert` and `pull`, from files of published weights to models."""

import hashlib
import http.server
import json
import re
import threading
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from commands import finetune, metrics
from conftest import SHARED
from published_files import (
    NUM_CLASSES,
    SMALL,
    VALUES,
    write_caffe,
    write_frossard,
    write_keras_legacy,
    write_slim,
    write_torch_zip,
)

from recipes.cli import main
from transfer import Backbone, Classifier, Preprocess, load_meta_graph
from transfer.exports.meta_graph import save_with_preprocessing
from transfer.vgg import architectures
from transfer.vgg.published import containers, download, layouts, origins

REAL = SHARED / "weights" / "vgg16_imagenet_notop.h5"


def convert(file, out, *flags):
    return main(["convert", str(file), "--out", str(out), *map(str, flags)])


@pytest.mark.slow
def test_converted_model_can_be_fine_tuned(tmp_path, image_folder, capsys):
    write_frossard(tmp_path / "weights.npz")
    out = tmp_path / "models" / "vgg"
    assert convert(tmp_path / "weights.npz", out) == 0
    printed = capsys.readouterr().out
    assert f"{NUM_CLASSES} classes" in printed and "layout: frossard; preprocess: slim" in printed
    card = json.loads((out.parent / "vgg.json").read_text())
    assert re.fullmatch(r"weights.npz, layout of frossard, sha256 [0-9a-f]{64}", card["source"]), (
        card["source"]
    )
    assert (card["preprocess"], card["image_size"], card["tap"]) == ("slim", 64, "fc7:0")
    values = load_meta_graph(out)
    backbone = Backbone(values, "fc8")
    for name, value in VALUES.items():
        weight = dict(zip(backbone.variable_names, backbone.graph_variables, strict=True))[name]
        np.testing.assert_array_equal(weight, value, err_msg=name)
    assert finetune(tmp_path / "run", out, image_folder) == 0
    assert metrics(tmp_path / "run")["cut"] == "fc7"


@pytest.mark.slow_variants
@pytest.mark.parametrize("size", [32, 64, 100])
def test_convolutional_model_accepts_any_image_size(tmp_path, size):
    write_frossard(tmp_path / "weights.npz")
    assert convert(tmp_path / "weights.npz", tmp_path / "dense") == 0
    assert convert(tmp_path / "weights.npz", tmp_path / "conv", "--convolutional") == 0
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    found = np.asarray(Backbone(load_meta_graph(tmp_path / "conv"), "fc7")(images))
    assert found.shape == (2, SMALL.fc)
    assert np.isfinite(found).all() and found.std() > 0
    if size == SMALL.image_size:
        expected = np.asarray(Backbone(load_meta_graph(tmp_path / "dense"), "fc7")(images))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_flags_override_detected_values(tmp_path, capsys):
    write_frossard(tmp_path / "weights.npz")
    (tmp_path / "names").write_text("".join(f"class {n}\n" for n in range(NUM_CLASSES)))
    flags = ["--preprocess", "torch", "--labels", tmp_path / "names"]
    assert convert(tmp_path / "weights.npz", tmp_path / "a", *flags) == 0
    card = json.loads((tmp_path / "a.json").read_text())
    assert card["preprocess"] == "torch"
    assert (tmp_path / card["labels"]).read_text().startswith("class 0\nclass 1\n")
    assert convert(tmp_path / "weights.npz", tmp_path / "a") == 1
    assert "is there already; choose another --out" in capsys.readouterr().err
    (tmp_path / "names").write_text("one\n")
    assert convert(tmp_path / "weights.npz", tmp_path / "b", *flags) == 1
    assert f"has 1 names; the model has {NUM_CLASSES} classes" in capsys.readouterr().err
    assert not (tmp_path / "b.meta").exists()


def test_unknown_file_has_no_origin_or_licence(tmp_path, capsys):
    write_keras_legacy(tmp_path / "mine.h5")
    assert convert(tmp_path / "mine.h5", tmp_path / "vgg") == 0
    printed = capsys.readouterr().out
    assert "origin and licence: unknown by the file's hash" in printed
    assert "warning: the file is not one that is known by its hash; preprocess caffe is" in printed
    card = json.loads((tmp_path / "vgg.json").read_text())
    assert "licence" not in card and "trained_on" not in card
    assert "the file has no class names; give them with --labels FILE" in printed
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    assert (tmp_path / card["labels"]).read_text().splitlines() == names


@pytest.mark.parametrize("known_by", ["md5", "sha256"])
def test_known_hash_gives_origin(tmp_path, monkeypatch, capsys, known_by):
    path = tmp_path / "weights.pth"
    write_torch_zip(path)
    origin = origins.Origin("the Caffe weights", "CC BY 4.0", "caffe")
    if known_by == "md5":
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(origins._BY_MD5, digest, origin)
    else:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(origins._BY_SHA256, digest[:8], origin)
    assert convert(path, tmp_path / "vgg") == 0
    assert "layout: torchvision; preprocess: caffe, as published" in capsys.readouterr().out
    card = json.loads((tmp_path / "vgg.json").read_text())
    assert (card["preprocess"], card["licence"]) == ("caffe", "CC BY 4.0")
    assert card["source"].startswith("weights.pth (the Caffe weights), layout of torchvision")


def test_hashes_of_published_files_are_known():
    caffe = origins.of_file("", "00b39a1b" + 56 * "0")
    assert (caffe.preprocess, caffe.trained_on) == ("caffe", "ImageNet")
    assert origins.of_file("", "397923af" + 56 * "0").preprocess == "torch"
    assert origins.of_file(download.PUBLISHED["vgg16"].entry.md5, "").preprocess == "caffe"
    assert origins.of_file(download.PUBLISHED["vgg19"].entry.md5, "").preprocess == "caffe"
    assert origins.of_file("", 64 * "0") is None


@pytest.mark.slow_variants
@pytest.mark.skipif(not REAL.is_file(), reason="no weights in ../shared")
@pytest.mark.parametrize(("flip", "expected"), [(False, "caffe"), (True, "slim")])
def test_first_convolution_of_oxford_is_recognized_in_any_file(tmp_path, flip, expected):
    """With PyTorch's names and axis order; the colour order is detected."""
    values = layouts.identify(containers.read(REAL)).values
    state, index = {}, 0
    for block in architectures.ARCHITECTURES["vgg16"].convolutions:
        for layer, _ in block:
            kernel = values[f"{layer}/weights"]
            kernel = kernel[:, :, ::-1] if flip and layer == "conv1_1" else kernel
            state[f"features.{index}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
            state[f"features.{index}.bias"] = values[f"{layer}/biases"]
            index += 2
        index += 1
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    assert convert(tmp_path / "a.safetensors", tmp_path / "vgg") == 0
    assert load_meta_graph(tmp_path / "vgg").card.preprocess == expected


def test_mean_is_not_assumed_for_other_classes(tmp_path, capsys, image_folder):
    write_caffe(tmp_path / "faces.caffemodel")
    assert convert(tmp_path / "faces.caffemodel", tmp_path / "vgg") == 0
    assert "nothing tells which mean the images of its 7 classes had" in capsys.readouterr().out
    assert "preprocess" not in json.loads((tmp_path / "vgg.json").read_text())
    assert finetune(tmp_path / "run", tmp_path / "vgg", image_folder) == 1
    assert "say which with --preprocess" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_custom_means_are_kept_in_card_run_and_prediction(tmp_path, image_folder):
    """The run's card, activations and exports use the preprocessing of the model's card."""
    means = {"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}
    write_caffe(tmp_path / "faces.caffemodel")
    flags = ["--preprocess", json.dumps(means)]
    assert convert(tmp_path / "faces.caffemodel", tmp_path / "vgg", *flags) == 0
    assert json.loads((tmp_path / "vgg.json").read_text())["preprocess"] == means
    assert finetune(tmp_path / "run", tmp_path / "vgg", image_folder) == 0
    graph = load_meta_graph(tmp_path / "run" / "model")
    assert graph.card.preprocess == means
    classifier = Classifier.load(tmp_path / "run" / "model")
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    expected = np.asarray(classifier.probabilities(pixels))
    by_hand = pixels[..., ::-1] - np.array(means["mean"], np.float32)
    found = Backbone(graph, graph.card.outputs["probabilities"])(by_hand)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shipped = save_with_preprocessing(tmp_path / "run" / "model", tmp_path / "shipped")
    assert shipped.preprocess == "none"
    found = Backbone(load_meta_graph(tmp_path / "shipped"), "probabilities")(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_convert_rejects_folder(tmp_path, capsys):
    for path in (tmp_path, "/"):
        assert convert(path, tmp_path / "out" / "vgg") == 1
        assert "is a folder; expected a file of weights" in capsys.readouterr().err


def test_convert_overwrites_no_file(tmp_path, capsys):
    write_slim(tmp_path / "vgg_16")
    before = (tmp_path / "vgg_16.index").read_bytes()
    assert convert(tmp_path / "vgg_16", tmp_path / "vgg_16") == 1
    assert "is there already; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "vgg_16.index").read_bytes() == before
    write_frossard(tmp_path / "weights.npz")
    (tmp_path / "names").write_text("".join(f"class {n}\n" for n in range(NUM_CLASSES)))
    flags = ["--labels", tmp_path / "names"]
    assert convert(tmp_path / "weights.npz", tmp_path / "out[1]" / "vgg", *flags) == 1
    assert not (tmp_path / "out[1]").exists()


def test_hash_covers_all_files_of_a_checkpoint(tmp_path):
    write_slim(tmp_path / "vgg_16")
    data = [(tmp_path / f"vgg_16.{end}").read_bytes() for end in ("index", "data-00000-of-00001")]
    assert convert(tmp_path / "vgg_16", tmp_path / "out" / "vgg") == 0
    card = json.loads((tmp_path / "out" / "vgg.json").read_text())
    assert card["source"].endswith(hashlib.sha256(b"".join(data)).hexdigest())
    assert "licence" not in card  # seven classes: custom weights


def test_spatial_order_is_for_matconvnet_only(tmp_path, capsys):
    write_frossard(tmp_path / "weights.npz")
    flags = ["--spatial-order", "columns"]
    assert convert(tmp_path / "weights.npz", tmp_path / "vgg", *flags) == 1
    assert "only MatConvNet's files come in two orders" in capsys.readouterr().err


def test_convert_rejects_other_networks_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "page.h5").write_bytes(b"<html>404</html>")
    assert convert(tmp_path / "page.h5", tmp_path / "out" / "vgg") == 1
    assert "cannot be read: it is a web page" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def keras_vgg(monkeypatch, tmp_path):
    """A small version of Keras' VGG16: same layers and names, fewer channels."""

    def model(weights):
        net = inputs = keras.Input((64, 64, 3))
        for number, block in enumerate(SMALL.blocks, 1):
            for index, width in enumerate(block, 1):
                net = keras.layers.Conv2D(
                    width, 3, activation="relu", padding="same", name=f"block{number}_conv{index}"
                )(net)
            net = keras.layers.MaxPooling2D()(net)
        net = keras.layers.Flatten()(net)
        net = keras.layers.Dense(SMALL.fc, activation="relu", name="fc1")(net)
        net = keras.layers.Dense(SMALL.fc, activation="relu", name="fc2")(net)
        net = keras.layers.Dense(NUM_CLASSES, activation="softmax", name="predictions")(net)
        found = keras.Model(inputs, net)
        if weights:
            values = [VALUES[f"{n}/{p}"] for n in LAYERS for p in ("weights", "biases")]
            found.set_weights(values)
        return found

    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return model


LAYERS = [name.split("/")[0] for name in VALUES if name.endswith("/weights")]


@pytest.mark.slow_variants
@pytest.mark.parametrize("suffix", [".h5", ".keras", ".weights.h5"])
def test_converted_keras_file_equals_keras(tmp_path, keras_vgg, suffix):
    model = keras_vgg(True)
    path = tmp_path / f"model{suffix}"
    (model.save_weights if "weights" in suffix else model.save)(path)
    assert convert(path, tmp_path / "vgg") == 0
    graph = load_meta_graph(tmp_path / "vgg")
    photos = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    ours = np.asarray(Backbone(graph, "prob")(Preprocess("caffe", 64)(photos)))
    inputs = keras.applications.vgg16.preprocess_input(photos.copy())
    np.testing.assert_allclose(ours, model(inputs), atol=1e-4)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``data``, with support for range requests."""

    data = b""
    requests = ()
    cut_after = None  # bytes, then the connection is closed
    has_length = True

    def do_GET(self):
        start = int(re.search(r"bytes=(\d+)-", self.headers["Range"])[1])
        Handler.requests += (self.headers["Range"],)
        if start >= len(self.data):
            self.send_error(416)
            return
        self.send_response(206)
        if self.has_length:
            self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        self.wfile.write(self.data[start:][: Handler.cut_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch, keras_vgg):
    write_keras_legacy(tmp_path / "published.h5")
    Handler.data = (tmp_path / "published.h5").read_bytes()
    Handler.requests = ()
    Handler.cut_after = None
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    entry = replace(
        download.PUBLISHED["vgg16"].entry,
        url=f"http://127.0.0.1:{running.server_port}/vgg16_weights.h5",
        md5=download.file_md5(tmp_path / "published.h5"),
        num_classes=NUM_CLASSES,
        network="vgg_small",
    )
    weights = download.Weights(entry, keras_vgg)
    monkeypatch.setitem(download.PUBLISHED, "vgg16", weights)
    yield weights
    running.shutdown()
    running.server_close()


def test_pull_downloads_converts_and_verifies(tmp_path, server, capsys):
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 0
    assert "probabilities differ from Keras' by at most" in capsys.readouterr().out
    assert server.path.read_bytes() == Handler.data
    assert load_meta_graph(tmp_path / "vgg16").card.preprocess == "caffe"
    assert main(["pull", "vgg16", "--out", str(tmp_path / "again")]) == 0
    assert len(Handler.requests) == 1  # the second time it was there
    state = tf.train.get_checkpoint_state(str(tmp_path))
    assert [Path(p).name for p in state.all_model_checkpoint_paths] == ["vgg16", "again"]


@pytest.mark.parametrize("has_length", [True, False])
def test_pull_stops_at_size_of_weights(tmp_path, server, monkeypatch, capsys, has_length):
    monkeypatch.setattr(download.Weights, "max_bytes", len(Handler.data) - 1)
    monkeypatch.setattr(Handler, "has_length", has_length)
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 1
    assert "so it is not the published file" in capsys.readouterr().err
    part = server.path.with_name(f"{server.path.name}.part")
    assert not part.exists() or part.stat().st_size < len(Handler.data)


@pytest.mark.parametrize("digits, message", [(8, ""), (0, "unverified"), (None, "its SHA-256")])
def test_pull_verifies_by_digits_of_sha256(tmp_path, server, monkeypatch, capsys, digits, message):
    found = download.file_sha256(tmp_path / "published.h5")
    sha256 = "0" * 8 if digits is None else found[:digits]
    entry = replace(server.entry, md5="", sha256=sha256, licence="BSD", preprocess="torch")
    monkeypatch.setitem(download.PUBLISHED, "vgg16", download.Weights(entry))
    status = main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")])
    printed = capsys.readouterr()
    assert status == (digits is None) and message in printed.out + printed.err
    if status == 0:
        card = load_meta_graph(tmp_path / "vgg16").card
        assert (card.preprocess, card.licence) == ("torch", "BSD" if digits else None)


def test_pull_list_shows_what_is_known(capsys):
    assert main(["pull", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("vgg19_bn-torchvision ")]
    assert "74.218" in line and "first 8 digits" in line and "BSD-3-Clause" in line
    assert any("unverified" in line for line in lines)


def test_download_does_not_follow_link(tmp_path, server):
    part, theirs = server.path.with_name(f"{server.path.name}.part"), tmp_path / "theirs"
    part.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    part.symlink_to(theirs)
    download.download(server)
    assert server.path.read_bytes() == Handler.data
    assert theirs.read_bytes() == b"theirs"


def test_interrupted_download_is_resumed(tmp_path, server):
    part = server.path.with_name(f"{server.path.name}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(Handler.data[:1000])
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 0
    assert Handler.requests == ("bytes=1000-",)
    assert server.path.read_bytes() == Handler.data
    assert not part.exists()


def test_download_survives_closed_connection(tmp_path, server, capsys):
    Handler.cut_after = 1000
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 1
    assert f"cut after 1,000 of {len(Handler.data):,} bytes" in capsys.readouterr().err
    Handler.cut_after = None
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 0
    assert Handler.requests == ("bytes=0-", "bytes=1000-")


def test_existing_output_is_refused_before_download(tmp_path, server, capsys):
    (tmp_path / "vgg16.json").write_text("{}")
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert Handler.requests == ()


def test_download_does_not_wait_for_dns(server, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: released.wait(60))
    assert main(["pull", "vgg16"]) == 1
    released.set()
    assert "no answer within 0.2 s" in capsys.readouterr().err


def test_download_with_wrong_hash_is_refused(tmp_path, server, capsys):
    Handler.data = b"<html>moved</html>"
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 1
    assert "is not the published file (its MD5 differs)" in capsys.readouterr().err
    assert not server.path.exists()
    assert not (tmp_path / "vgg16.meta").exists()


def test_conversion_that_differs_from_keras_is_refused(tmp_path, server, monkeypatch, capsys):
    wrong = replace(server, model=lambda weights: lambda x, training: np.zeros((2, NUM_CLASSES)))
    monkeypatch.setitem(download.PUBLISHED, "vgg16", wrong)
    out = tmp_path / "models" / "vgg16"
    assert main(["pull", "vgg16", "--out", str(out)]) == 1
    assert "in a probability; expected at most 0.0001" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_pull_without_network_suggests_convert(tmp_path, server, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert main(["pull", "vgg16", "--out", str(tmp_path / "vgg16")]) == 1
    error = capsys.readouterr().err
    assert "cannot download" in error and "Name or service not known" in error
    assert "vgg-transfer convert FILE --out PREFIX" in error


@pytest.mark.slow
def test_any_model_becomes_a_native_keras_model(tmp_path, capsys):
    """A meta graph, and published weights."""
    write_frossard(tmp_path / "weights.npz")
    sources = {
        "graph.keras": ("pretrained/vgg_small.meta", "fc7", "pretrained/vgg_small"),
        "published.keras": (tmp_path / "weights.npz", "prob", None),
    }
    images = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
    for name, (source, tap, prefix) in sources.items():
        out = tmp_path / "out" / name
        assert convert(source, out, "--tap", tap) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(out)
        model = keras.models.load_model(out)
        assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
        archive = zipfile.ZipFile(out)
        card = json.loads(archive.read("card.json"))
        assert (card["image_size"], card["tap"]) == (64, f"{tap}:0")
        assert card["preprocess"] == ("torch" if prefix else "slim")
        if prefix:
            np.testing.assert_allclose(model(images), Backbone(prefix, tap)(images), rtol=1e-5)
        assert convert(source, out) == 1
        assert "is there already; choose another --out" in capsys.readouterr().err


def test_flags_of_native_keras_models_are_for_these(tmp_path, capsys):
    write_frossard(tmp_path / "weights.npz")
    assert convert(tmp_path / "weights.npz", tmp_path / "vgg", "--tap", "fc7") == 1
    assert "--tap fc7 is for a native Keras model: --out FILE.keras" in capsys.readouterr().err
    assert convert("pretrained/vgg_small", tmp_path / "v.keras", "--preprocess", "tf") == 1
    assert "--preprocess tf is for files of published weights" in capsys.readouterr().err
    assert not (tmp_path / "v.keras").exists()
