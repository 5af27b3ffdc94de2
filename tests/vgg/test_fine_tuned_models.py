"""Models that users fine-tuned in Keras and PyTorch: converted, they predict, evaluate and train on
as the original."""

import importlib.util
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

from recipes.cli import main
from transfer import Classifier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("memory_is_returned", "no_report")]

SIZE = 64
CLASSES = ["blue", "green", "red"]
L = keras.layers

# In a process of its own: TensorFlow and PyTorch's training do not share one.
TORCH = """
import pathlib, sys
import numpy as np, torch
folder = pathlib.Path(sys.argv[1])
data = np.load(folder / "data.npz")
nn = torch.nn
torch.manual_seed(0)
layers, channels = [], 3
for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
    if width:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        nn.init.kaiming_normal_(layers[-2].weight, mode="fan_out", nonlinearity="relu")
        channels = width
    else:
        layers.append(nn.MaxPool2d(2, 2))
class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(2048, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 3)
        )
    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
net = VGG()
mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
images = ((torch.from_numpy(data["images"]) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
loss = nn.functional.cross_entropy(net(images), torch.from_numpy(data["labels"]))
loss.backward()
optimizer.step()
with torch.no_grad():
    np.save(folder / "expected.npy", torch.softmax(net.eval()(images), -1).numpy())
classes = {name: number for number, name in enumerate(["blue", "green", "red"])}
torch.save({"epoch": 1, "model_state_dict": net.state_dict(), "class_to_idx": classes,
            "optimizer_state_dict": optimizer.state_dict()}, folder / "model.pth")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, one folder a class."""
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for channel, name in zip((2, 1, 0), CLASSES, strict=True):
        (path / name).mkdir()
        for number in range(6):
            pixels = generator.integers(0, 120, (SIZE, SIZE, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def images(folder):
    files = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file in files])
    return files, pixels, np.array([CLASSES.index(file.parent.name) for file in files])


@pytest.fixture(scope="module")
def model(images):
    """VGG16 of Keras Applications with its preprocessing inside, as in Keras' tutorials."""
    keras.utils.set_random_seed(0)
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    base.trainable = False
    inputs = keras.Input((SIZE, SIZE, 3))
    net = keras.applications.vgg16.preprocess_input(L.RandomFlip()(inputs))
    net = L.GlobalAveragePooling2D()(base(net, training=False))
    net = L.Dropout(0.3)(L.Dense(16, activation="relu")(net))
    found = keras.Model(inputs, L.Dense(3, activation="softmax")(net))
    found.compile("adam", "sparse_categorical_crossentropy")
    _, pixels, labels = images
    for _ in range(2):
        found.train_on_batch(pixels, labels)
    return found


def assert_serves(path, out, expected, images, folder, capsys, *flags):
    """The converted model has these probabilities, in Python and on the command line."""
    (out.parent / "labels.txt").write_text("\n".join(CLASSES))
    flags = (*flags, "--labels", str(out.parent / "labels.txt"))
    assert main(["convert", str(path), "--out", str(out), *flags]) == 0
    files, pixels, labels = images
    found = np.asarray(Classifier.load(out).probabilities(pixels))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    capsys.readouterr()
    assert main(["predict", str(out), str(files[0]), str(files[-1]), "--format", "jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    top = [line["predictions"][0] for line in lines]
    assert [one["label"] for one in top] == [CLASSES[n] for n in expected.argmax(1)[[0, -1]]]
    found = [one["probability"] for one in top]
    np.testing.assert_allclose(found, expected.max(1)[[0, -1]], atol=1e-4)
    assert main(["evaluate", str(out), "--image-folder", str(folder)]) == 0
    accuracy = np.mean(expected.argmax(1) == labels)
    assert f"accuracy {accuracy:.4f} on {len(labels)}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
def test_fine_tuned_keras_model(tmp_path, model, images, folder, capsys, name):
    path = tmp_path / name
    (model.save_weights if "weights" in name else model.save)(path)
    # Weights alone know neither the preprocessing nor the size.
    flags = ["--preprocess", "caffe", "--image-size", str(SIZE)] if "weights" in name else []
    expected = model.predict(images[1], verbose=0)
    assert_serves(path, tmp_path / "vgg", expected, images, folder, capsys, *flags)


def test_converted_model_is_fine_tuned(tmp_path, model, folder, capsys):
    model.save(tmp_path / "model.keras")
    assert main(["convert", str(tmp_path / "model.keras"), "--out", str(tmp_path / "vgg")]) == 0
    command = ["finetune", "--model", str(tmp_path / "vgg"), "--image-folder", str(folder)]
    assert main([*command, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert main(["predict", str(tmp_path / "run"), str(folder / "red" / "0.png")]) == 0


def test_fine_tuned_torch_checkpoint(tmp_path, images, folder, capsys):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch: pip install 'vgg-transfer[references]'")
    np.savez(tmp_path / "data.npz", images=images[1], labels=images[2])
    subprocess.run([sys.executable, "-c", TORCH, str(tmp_path)], check=True, capture_output=True)
    expected = np.load(tmp_path / "expected.npy")
    assert_serves(tmp_path / "model.pth", tmp_path / "vgg", expected, images, folder, capsys)
