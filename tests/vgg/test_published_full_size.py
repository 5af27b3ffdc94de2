"""Full-size VGG16 from each file format, compared with the outputs of the original software.

Keras Applications, tf-slim and PyTorch (where it is installed: the extra ``references``) compute by
themselves; for the other layouts, written here as they are documented, Keras' model of the same
weights is the truth.
"""

import keras
import numpy as np
import published_files
import pytest
import tensorflow as tf
from keras.applications.imagenet_utils import preprocess_input
from published_files import WRITERS, torch_state, write_torch_legacy, write_torch_zip

from recipes.cli import main
from transfer import Backbone, Preprocess, load_meta_graph
from transfer.vgg import architectures

tf1 = tf.compat.v1
VGG16 = architectures.ARCHITECTURES["vgg16"]
NUM_CLASSES = 1000
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3)).astype(np.uint8)
# Preprocessing according to the documentation of each source, independent of our cards.
SLIM_MEANS = np.array([123.68, 116.78, 103.94], np.float32)  # vgg_preprocessing.py
PREPARE = {
    "caffe": lambda x: preprocess_input(x.astype(np.float32), mode="caffe"),
    "torch": lambda x: preprocess_input(x.astype(np.float32), mode="torch"),
    "slim": lambda x: x.astype(np.float32) - SLIM_MEANS,
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("memory_is_returned")]


@pytest.fixture(scope="module")
def values():
    """Weights for which activations and logits of images in 0..255 are of the order of 1, so that
    differences of 1e-4 are significant."""
    found = architectures.random_weights(VGG16, NUM_CLASSES)
    found["conv1_1/weights"] *= np.float32(0.02)
    return found


@pytest.fixture(scope="module")
def model(values):
    found = keras.applications.VGG16(weights=None)
    found.set_weights(list(values.values()))
    return found


@pytest.fixture(scope="module")
def expected(model):
    """fc7 and prob of the picture for each preprocessing."""
    outputs = [model.get_layer("fc2").output, model.output]
    both = keras.Model(model.input, outputs)
    return {
        mode: [np.asarray(x) for x in both(prepare(PICTURE))] for mode, prepare in PREPARE.items()
    }


@pytest.fixture(autouse=True)
def _writers_of_full_size(monkeypatch, values):
    layers = [name.split("/")[0] for name in values if name.endswith("/weights")]
    full_size = {
        "SMALL": VGG16,
        "VALUES": values,
        "CONVOLUTIONS": layers[:-3],
        "WINDOW": VGG16.pooled_size,
        "CHANNELS": 512,
    }
    for name, value in full_size.items():
        monkeypatch.setattr(published_files, name, value)


def assert_converted_equals(path, expected, out):
    assert main(["convert", str(path), "--out", str(out)]) == 0
    graph = load_meta_graph(out)
    assert (graph.card.image_size, graph.card.tap) == (224, "fc7:0")
    names = (out.parent / graph.card.labels).read_text().splitlines()
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet tissue")
    network = Backbone(graph, "prob")
    assert network.count_params() == 138_357_544
    fc7, rest = network.split("fc7")
    found = np.asarray(fc7(Preprocess(graph.card.preprocess, graph.card.image_size)(PICTURE)))
    scale = np.abs(expected[0]).max()
    np.testing.assert_allclose(found, expected[0], atol=min(1e-4, 1e-4 * scale))
    np.testing.assert_allclose(rest(found), expected[1], rtol=1e-3)


TORCH = {
    "torch": (write_torch_zip, "torch"),
    "torch, before 1.6": (write_torch_legacy, "torch"),
}


# Files of 550 MB. All layouts and ways to read them are tested small, in test_published.py.
@pytest.mark.parametrize("kind", ["keras", "matconvnet", "caffe", "tfmodel", "torch"])
def test_documented_layout_gives_original_outputs(tmp_path, expected, kind):
    writer, *_, mode = (WRITERS | TORCH)[kind]
    writer(tmp_path / "weights")
    assert_converted_equals(tmp_path / "weights", expected[mode], tmp_path / "vgg")


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_keras_file_gives_outputs_of_keras(tmp_path, model, expected, suffix):
    path = tmp_path / f"model{suffix}"
    model.save(path)
    assert_converted_equals(path, expected["caffe"], tmp_path / "vgg")


@pytest.mark.filterwarnings("ignore")  # tf-slim is from 2020
def test_tf_slim_checkpoint_gives_outputs_of_tf_slim(tmp_path, values):
    slim_vgg = pytest.importorskip("tf_slim.nets.vgg")
    with tf.Graph().as_default(), tf1.Session() as session:
        images = tf1.placeholder(tf.float32, [None, 224, 224, 3])
        logits, ends = slim_vgg.vgg_16(images, is_training=False)
        for variable in tf1.global_variables():
            layer, part = variable.op.name.split("/")[-2:]
            variable.load(values[f"{layer}/{part}"].reshape(variable.shape), session)
        tf1.train.Saver().save(session, str(tmp_path / "vgg_16.ckpt"), write_meta_graph=False)
        fc7 = tf.reshape(ends["vgg_16/fc7"], [-1, 4096])
        expected = session.run([fc7, tf.nn.softmax(logits)], {images: PREPARE["slim"](PICTURE)})
    assert_converted_equals(tmp_path / "vgg_16.ckpt", expected, tmp_path / "vgg")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
def test_pytorch_file_gives_outputs_of_pytorch(tmp_path, values, is_zip):
    torch = pytest.importorskip("torch")
    layers, channels = [], 3
    for block in VGG16.convolutions:
        for _, width in block:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
        layers.append(torch.nn.MaxPool2d(2))
    fc, size = VGG16.fc, VGG16.pooled_size
    network = torch.nn.Module()
    network.features = torch.nn.Sequential(*layers)
    network.classifier = torch.nn.Sequential(
        *(torch.nn.Linear(channels * size**2, fc), torch.nn.ReLU(), torch.nn.Dropout()),
        *(torch.nn.Linear(fc, fc), torch.nn.ReLU(), torch.nn.Dropout()),
        torch.nn.Linear(fc, NUM_CLASSES),
    )
    network.eval()
    network.load_state_dict({k: torch.from_numpy(v) for k, v in torch_state().items()})
    path = tmp_path / "vgg16.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    with torch.no_grad():
        # torchvision.transforms: to 0..1, then Normalize with the statistics of ImageNet.
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        images = (torch.from_numpy(PICTURE) / 255 - mean) / std
        images = images.permute(0, 3, 1, 2).contiguous()
        fc7 = network.classifier[:5](network.features(images).flatten(1))
        expected = [fc7.numpy(), torch.softmax(network.classifier[5:](fc7), -1).numpy()]
    assert_converted_equals(path, expected, tmp_path / "vgg")
