"""Checkpoints of PyTorch, as people save them: weights are found, nothing is executed.

PyTorch itself writes and computes the truth where it is installed (the extra ``references``).
"""

import argparse
import pathlib
from collections import OrderedDict

import numpy as np
import pytest
from published_files import (
    CONNECTED,
    CONVOLUTIONS,
    NUM_CLASSES,
    SMALL,
    VALUES,
    biases,
    torch_names,
    torch_norm_state,
    torch_state,
    write_torch_legacy,
    write_torch_zip,
)

from transfer.vgg.published import containers, layouts, torch_vgg
from transfer.vgg.published.unpickle import UnsafePickleError

BASE = {name: value for name, value in VALUES.items() if name.startswith("conv")}


def read(path, **options):
    return layouts.identify(containers.read(path), **options)


def assert_same(found, expected=VALUES):
    for name, value in expected.items():
        np.testing.assert_array_equal(found.values[name], value, err_msg=name)


def renamed(prefix="", features="features.", classifier="classifier."):
    state = OrderedDict()
    for name, values in torch_state().items():
        name = name.replace("features.", features).replace("classifier.", classifier)
        state[prefix + name] = values
    return state


@pytest.mark.parametrize(
    "state",
    [
        *(renamed(prefix) for prefix in ("module.", "_orig_mod.", "backbone.", "student.vgg16.")),
        renamed("model._orig_mod.module."),
        renamed(features="features.module."),
        renamed("net.", features="encoder."),
        renamed(classifier="fc."),
    ],
    ids=lambda state: next(iter(state)),
)
def test_names_before_layers_do_not_matter(tmp_path, state):
    write_torch_zip(tmp_path / "a.pth", state)
    found = read(tmp_path / "a.pth")
    assert_same(found)
    assert found.architecture == SMALL and found.left_out == []


@pytest.mark.parametrize("prefix", ["", "features.0."])
def test_sequence_of_features_alone_is_taken(tmp_path, prefix):
    state = {
        name.replace("features.", prefix): values
        for name, values in torch_state().items()
        if name.startswith("features")
    }
    write_torch_zip(tmp_path / "a.pth", state)
    found = read(tmp_path / "a.pth")
    assert_same(found, BASE)
    assert found.num_classes is None
    named = {f"{layer}.weight": torch_state()[f"{n}.weight"] for layer, n in torch_names().items()}
    named |= {f"{layer}.bias": biases(layer) for layer in CONVOLUTIONS + CONNECTED}
    write_torch_zip(tmp_path / "b.pth", named)
    assert_same(read(tmp_path / "b.pth"))


def test_preprocessing_follows_names_and_kind_of_head(tmp_path):
    named = {f"{layer}.weight": torch_state()[f"{n}.weight"] for layer, n in torch_names().items()}
    named |= {f"{layer}.bias": biases(layer) for layer in CONVOLUTIONS + CONNECTED}
    base = {name: values for name, values in named.items() if name.startswith("conv")}
    ssd = {k[9:]: v for k, v in torch_state().items() if k.startswith("features.")}
    channels = VALUES[f"{CONVOLUTIONS[-1]}/biases"].size
    fc6 = np.zeros((16, channels, 3, 3), "f4")
    ssd |= {"31.weight": fc6, "31.bias": np.zeros(16, "f4")}
    ssd |= {"33.weight": np.zeros((16, 16, 1, 1), "f4"), "33.bias": np.zeros(16, "f4")}
    decoder = {f"decoder.center.{n}.0.weight": fc6[:, :16] if n else fc6 for n in (0, 1)}
    for name, state, preprocess in (
        ("gatys", base, "caffe"),
        ("pytorch-mcn", named, "slim"),
        ("ssd", ssd, torch_vgg.FEATURES_MEAN),
        ("torchvision", torch_state() | decoder, "torch"),  # of a U-Net
    ):
        write_torch_zip(tmp_path / name, state)
        layout = read(tmp_path / name).layout
        assert (layout.name, layout.preprocess) == (name, preprocess)


def test_classifier_beside_its_features_is_their_head(tmp_path):
    state = torch_state()
    parts = {
        part: {k[len(part) + 1 :]: v for k, v in state.items() if k.startswith(part)}
        for part in ("features", "classifier")
    }
    arrays = {f"{part}/{key}": v for part, one in parts.items() for key, v in one.items()}
    vgg = torch_vgg.interpret(arrays)
    assert vgg.head is not None and vgg.left_out == []
    np.testing.assert_array_equal(vgg.head.connected[-1].kernel, state["classifier.6.weight"].T)
    # Of two, none is the head for certain.
    arrays |= {f"critic/{key}": v for key, v in parts["classifier"].items()}
    vgg = torch_vgg.interpret(arrays)
    assert vgg.head is None and vgg.left_out == ["classifier/*", "critic/*"]


def test_weights_of_classes_in_a_loss_do_not_belong_to_the_head():
    """As Lightning saves ``self.criterion = nn.CrossEntropyLoss(weight)``."""
    state = {f"model.{key}": values for key, values in torch_state().items()}
    vgg = torch_vgg.interpret(state | {"criterion.weight": np.ones(NUM_CLASSES, "f4")})
    assert vgg.head is not None and vgg.left_out == ["criterion.weight"]
    vgg = torch_vgg.interpret(state | {"scale.weight": np.ones(NUM_CLASSES, "f4")})
    assert vgg.head is None


def test_unknown_arrays_of_a_layer_are_refused():
    scale = {"features.0.gamma": np.ones(64, "f4")}
    with pytest.raises(ValueError, match=r"its array features.0.gamma .*kind is not known"):
        torch_vgg.interpret(torch_state() | scale)
    lora = {"features.0.lora_A.default.weight": np.ones((8, 3, 3, 3), "f4")}
    with pytest.raises(ValueError, match="an adapter .LoRA.*merge_and_unload"):
        torch_vgg.interpret(torch_state() | lora)
    vgg = torch_vgg.interpret(torch_state() | {"queue": np.ones(64, "f4")})
    assert vgg.left_out == ["queue"]


def test_nan_classifier_is_left_out_and_mean_is_that_of_its_features():
    state = torch_state()
    state = {k: v * np.float32("nan") if "classifier" in k else v for k, v in state.items()}
    vgg = torch_vgg.interpret(state)
    assert vgg.head is None and "NaN" in vgg.notes[0]
    assert len(vgg.left_out) == 6


def test_style_transfer_encoder_and_other_networks_are_refused(tmp_path):
    state = {"0.weight": np.zeros((3, 3, 1, 1), "f4"), "0.bias": np.zeros(3, "f4")}
    state |= {"2.weight": np.zeros((64, 3, 3, 3), "f4"), "2.bias": np.zeros(64, "f4")}
    with pytest.raises(ValueError, match="1x1 convolution of colours.*pads by reflection"):
        torch_vgg.interpret(state)
    state = {"conv1.weight": np.zeros((64, 3, 7, 7), "f4")}
    state |= {"layer1.0.conv1.weight": np.zeros((64, 64, 3, 3), "f4")}
    with pytest.raises(ValueError, match="it is a ResNet with 2 convolutions.*takes VGGs only"):
        torch_vgg.interpret(state)


def test_features_of_a_cut_classifier_are_not_classes(monkeypatch):
    monkeypatch.setattr(torch_vgg, "_FEATURES", SMALL.fc)
    state = {k: v for k, v in torch_state().items() if not k.startswith("classifier.6")}
    vgg = torch_vgg.interpret(state)
    assert vgg.head is None and "those of fc7" in vgg.notes[0]


def test_convolutions_without_biases_take_them_from_batch_norm():
    state = torch_norm_state(1)
    names = [k for k, v in state.items() if v.ndim == 4]
    without = {k: v for k, v in state.items() if k.replace("bias", "weight") not in names or
               k.endswith("weight")}  # fmt: skip
    zeros = {k: v if k in without else np.zeros_like(v) for k, v in state.items()}
    found, expected = torch_vgg.interpret(without), torch_vgg.interpret(zeros)
    for one, other in zip(found.convolutions, expected.convolutions, strict=True):
        np.testing.assert_array_equal(one[1], other[1])
    one = {k: v for k, v in torch_state().items() if k != "features.0.bias"}
    with pytest.raises(ValueError, match="layer features.0 has arrays .* expected a kernel"):
        torch_vgg.interpret(one)


def test_layers_without_place_for_relu_are_refused():
    state = {}
    for number, (name, values) in enumerate(torch_state().items()):
        if name.startswith("features"):
            gap = 1 if number < 4 else 3
            state[f"f.{number // 2 * gap}.{name.rpartition('.')[2]}"] = values
    with pytest.raises(ValueError, match=r"f.0 is directly followed by another one"):
        torch_vgg.interpret(state)


# With PyTorch

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def network(torch, head, norm=False):
    layers, channels = [], 3
    for block in SMALL.blocks:
        for width in block:
            layers.append(torch.nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
            layers += [torch.nn.BatchNorm2d(width)] * norm + [torch.nn.ReLU()]
            channels = width
        layers.append(torch.nn.MaxPool2d(2))
    net = torch.nn.Module()
    net.features, net.classifier = torch.nn.Sequential(*layers), torch.nn.Sequential(*head)
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                torch.nn.init.uniform_(values, 0.5, 1.5, generator=generator)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, generator=generator)
    return net.eval()


def outputs(torch, net, images):
    with torch.no_grad():
        values = net.features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        return net.classifier(values.flatten(1)).numpy()


def heads(torch):
    nn, flat = torch.nn, 256 * 4
    return {
        "one": [nn.Linear(flat, 3)],
        "two": [nn.Linear(flat, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 3)],
        "four": [nn.Linear(flat, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7),
                 nn.ReLU(), nn.Linear(7, 3)],
        "linear": [nn.Linear(flat, 20), nn.Linear(20, 3)],
        "norm": [nn.BatchNorm1d(flat), nn.Linear(flat, 20), nn.BatchNorm1d(20), nn.ReLU(),
                 nn.Linear(20, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["one", "two", "four", "linear", "norm"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "bn"])
def test_heads_give_outputs_of_pytorch(tmp_path, torch, kind, norm):
    from transfer import Backbone, convert

    net = network(torch, heads(torch)[kind], norm)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    state = {f"model.{key}": value for key, value in net.state_dict().items()}
    saved = {"state_dict": state, "class_to_idx": {name: i for i, name in enumerate(CLASSES)}}
    torch.save(saved, tmp_path / "a.pth")
    conversion = convert(tmp_path / "a.pth", tmp_path / "vgg")
    assert conversion.num_classes == 3 and conversion.left_out == []
    assert (tmp_path / conversion.card.labels).read_text().split() == CLASSES
    expected = outputs(torch, net, images)
    found = np.asarray(Backbone(conversion.prefix, conversion.card.outputs["logits"])(images))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_checkpoint_of_training_is_read_and_not_executed(tmp_path, torch):
    net = network(torch, heads(torch)["one"])
    expected = {k: v.numpy() for k, v in net.state_dict().items()}
    deep = {}
    for _ in range(30):
        deep = {"inner": deep, "path": pathlib.Path("/x"), 0.5: [np.float64(1)] * 3}
    optimizer = torch.optim.Adam(net.parameters())
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in expected.items()})
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"args": argparse.Namespace(lr=np.float64(0.1)), "deep": deep},
        "loops": {"fit_loop": deep},
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "weights": {"class": torch.ones(3)},
    }
    for is_zip in (True, False):
        torch.save(checkpoint, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_zip)
        found = read(tmp_path / "a.ckpt")
        kernel = expected["features.0.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(found.values["conv1_1/weights"], kernel)
        assert found.num_classes == 3 and found.left_out == []


def test_average_of_weights_is_preferred_and_reported(tmp_path, torch):
    net = network(torch, heads(torch)["one"])
    state = net.state_dict()
    average = {k: v * 2 for k, v in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth")
    raw = read(tmp_path / "a.pth", leave_out=["state_dict_ema/*"])
    assert "of state_dict_ema are taken, of state_dict, state_dict_ema" in found.notes[0]
    name = "conv1_1/weights"
    np.testing.assert_array_equal(found.values[name], raw.values[name] * 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_types_and_strides_of_pytorch_are_read(tmp_path, torch, dtype):
    net = network(torch, heads(torch)["one"]).to(getattr(torch, dtype))
    net.to(memory_format=torch.channels_last)
    assert not net.features[3].weight.is_contiguous()
    for is_zip in (True, False):
        torch.save(net.state_dict(), tmp_path / "a", _use_new_zipfile_serialization=is_zip)
        found = read(tmp_path / "a")
        expected = net.features[3].weight.detach().float().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(found.values["conv2_1/weights"], expected)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_whole_models_are_refused_with_way_out(tmp_path, torch):
    net = network(torch, heads(torch)["one"])
    for is_zip in (True, False):
        torch.save(net, tmp_path / "a", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ValueError, match=r"whole model \(torch.nn.modules.module.Module\).*"
                           r"weights_only=False\).state_dict\(\)"):  # fmt: skip
            containers.read(tmp_path / "a")
        torch.save({"net": net}, tmp_path / "a", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ValueError, match=r"\['net'\].state_dict\(\), 'weights.pth'"):
            containers.read(tmp_path / "a")
    torch.jit.save(torch.jit.script(net.features), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"TorchScript.*torch.jit.load\('FILE'\).state_dict"):
        containers.read(tmp_path / "b.pt")
    assert issubclass(UnsafePickleError, ValueError)


def test_legacy_names_are_read_without_pytorch(tmp_path):
    write_torch_legacy(tmp_path / "a", renamed("module."))
    assert_same(read(tmp_path / "a"))
