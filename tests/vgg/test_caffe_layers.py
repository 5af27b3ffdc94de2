"""Caffe models that compute other features than a VGG are refused, or their heads left out."""

import contextlib
import re
from dataclasses import replace

import numpy as np
import pytest
from published_files import (
    CONNECTED,
    CONVOLUTIONS,
    NUM_CLASSES,
    SMALL,
    biases,
    field,
    outputs_first,
    varint,
)

from transfer.vgg.published import caffe, containers, layouts

CONVOLUTION, POOLING = (106, 10), (121, 19)  # fields of a layer, now and before 2015
KINDS = {"Convolution": 4, "Dropout": 6, "InnerProduct": 14, "Pooling": 17, "ReLU": 18, "LRN": 15}


def blob(values):
    shape = field(7, field(1, b"".join(map(varint, values.shape))))
    return shape + field(5, np.ascontiguousarray(values, "<f4").tobytes())


def settings(values):
    return b"".join(varint(number << 3) + varint(value) for number, value in values)


class Net:
    """Layers as ``Net::ToProto`` of Caffe writes them."""

    def __init__(self, is_old=False):
        self.is_old, self.last, self.data = is_old, "data", b""

    def add(self, name, kind, top=None, arrays=(), **params):
        at = (4, 5, 2, 3, 6) if self.is_old else (1, 2, 3, 4, 7)
        top = top or name
        layer = field(at[0], name.encode()) + field(at[2], self.last.encode())
        layer += field(at[3], top.encode())
        layer += settings([(5, KINDS[kind])]) if self.is_old else field(2, kind.encode())
        for fields, values in params.values():
            layer += field(fields[self.is_old], settings(values))
        layer += b"".join(field(at[4], blob(values)) for values in arrays)
        self.data += field(2 if self.is_old else 100, layer)
        self.last = top

    def convolution(self, name, arrays, kernel=3, pad=1, others=()):
        params = [(1, len(arrays[0])), (3, pad), (4, kernel), *others]
        self.add(name, "Convolution", arrays=arrays, convolution=(CONVOLUTION, params))

    def pooling(self, name, size=2, stride=2, others=()):
        values = [(1, 0), (2, size), (3, stride), *others]
        self.add(name, "Pooling", pooling=(POOLING, values))


def write(path, change="", is_old=False, tail=lambda net: None):
    """A VGG without a head; ``change`` is what it has otherwise."""
    net = Net(is_old)
    for number, block in enumerate(SMALL.convolutions, 1):
        for name, _ in block:
            others = [(18, 2)] if change == "dilation" and number == 5 else []
            others += [(16, 2)] if change == "hole" and number == 5 else []
            others += [(9, 1), (10, 0)] if change == "pad_w" and name == "conv2_1" else []
            pad = 100 if change == "pad" and name == "conv1_1" else 1
            pads = [] if change == "pad_w" and name == "conv2_1" else [(3, pad)]
            params = [(4, 3), *pads, *others]
            arrays = (outputs_first(name), biases(name))
            net.add(name, "Convolution", arrays=arrays, convolution=(CONVOLUTION, params))
            if change != "relu" or name != "conv2_1":
                net.add(f"relu{name[4:]}", "ReLU", top=name)
            if change == "lrn" and name == "conv3_1":
                net.add("norm3_1", "LRN", top=name)
        average = [(1, 1)] if change == "average" and number == 2 else []
        stride = 1 if change == "stride" and number == 4 else 2
        if number < 5:
            net.pooling(f"pool{number}", 2, stride, average)
    tail(net)
    path.write_bytes(field(1, b"VGG") + net.data)


@pytest.mark.parametrize("is_old", [False, True])
def test_plain_vgg_is_taken(tmp_path, is_old):
    write(tmp_path / "a", is_old=is_old, tail=lambda net: net.pooling("pool5"))
    found = layouts.identify(containers.read(tmp_path / "a"))
    assert (found.num_classes, found.notes, found.left_out) == (None, [], [])
    for name in CONVOLUTIONS:
        np.testing.assert_array_equal(
            found.values[f"{name}/weights"], outputs_first(name).transpose(2, 3, 1, 0)
        )


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("change, message", [
    ("pad", "conv1_1 has pad 100; expected 1"),  # FCN
    ("pad_w", "conv2_1 has pad 0; expected 1"),
    ("stride", "pool4 has stride 1; expected 2"),  # DeepLab
    ("dilation", "conv5_2 has dilation 2; expected 1"),
    ("hole", "conv5_2 has dilation 2; expected 1"),
    ("average", "pool2 has pool 1; expected 0"),
    ("lrn", "norm3_1 .* stands before its last convolution"),
    ("relu", "conv2_1 has no ReLU"),
])  # fmt: skip
def test_other_networks_are_refused_by_layer(tmp_path, change, message, is_old):
    write(tmp_path / "a", change, is_old)
    with pytest.raises(ValueError, match=message):
        containers.read(tmp_path / "a")


def fc_reduced(net, dilation=6, has_pool=True):
    """The layers of SSD and DeepLab behind conv5."""
    if has_pool:
        net.pooling("pool5", 3, 1, [(4, 1)])
    channels = SMALL.blocks[-1][-1]
    sizes = {"fc6": (16, channels, 3, 3), "fc7": (16, 16, 1, 1), "fc8_voc12": (4, 16, 1, 1)}
    for name, size in sizes.items():
        arrays = (np.ones(size, np.float32), np.ones(size[0], np.float32))
        is_dilated = name == "fc6" and dilation
        others = [(18, dilation)] if is_dilated else []
        pad = dilation if is_dilated else 0
        net.convolution(name, arrays, kernel=size[-1], pad=pad, others=others)
        if name in ("fc6", "fc7"):
            net.add(f"relu{name[2:]}", "ReLU", top=name)


@pytest.mark.parametrize("options, message", [
    ({}, "its pool5 has kernel_size 3; expected 2, .* equal up to conv5"),
    ({"has_pool": False}, "its layer fc6 has pad 6; expected 0"),
    ({"has_pool": False, "dilation": 0}, "there is no pooling between conv5_2 and fc6"),
])  # fmt: skip
def test_dilated_fc6_is_left_out(tmp_path, options, message):
    write(tmp_path / "a", tail=lambda net: fc_reduced(net, **options))
    found = layouts.identify(containers.read(tmp_path / "a"))
    assert found.num_classes is None and {"fc6", "fc7", "fc8"} <= {*found.left_out}
    assert re.search(message, found.notes[0])


def test_window_of_three_pixels_is_left_out_where_layers_are_not_defined(tmp_path):
    write(tmp_path / "a", tail=lambda net: fc_reduced(net, has_pool=False, dilation=0))
    found = layouts.identify(replace(containers.read(tmp_path / "a"), no_head=""))
    assert "a convolution, whose stride and dilation the file does not tell" in found.notes[0]


def test_layers_beside_the_convolutions_are_left_out(tmp_path):
    """The scales of SSD's conv4_3 and its further convolutions."""

    def tail(net):
        fc_reduced(net)
        width = SMALL.blocks[3][-1]
        net.last = "conv4_2"
        net.add("conv4_2_norm", "Normalize", arrays=(np.ones(width, np.float32),))
        net.last = "fc7"
        net.convolution("conv6_1", (np.ones((8, 16, 1, 1), np.float32), np.ones(8, np.float32)))

    write(tmp_path / "a", tail=tail)
    found = layouts.identify(containers.read(tmp_path / "a"))
    assert {"conv4_2_norm/0", "conv6_1/0", "conv6_1/1", "fc6"} <= {*found.left_out}
    np.testing.assert_array_equal(found.values["conv1_1/biases"], biases("conv1_1"))


def plain_head(net, change=""):
    if change != "pool":
        net.pooling("pool5")
    for name in CONNECTED:
        net.add(name, "InnerProduct", arrays=(outputs_first(name), biases(name)))
        if name == "fc6" and change == "norm":
            net.add("bn6", "BatchNorm", arrays=(np.ones(len(biases(name)), np.float32),) * 2)
        if name != "fc8" and change != "relu":
            net.add(f"relu{name[2:]}", "ReLU", top=net.last)
            net.add(f"drop{name[2:]}", "Dropout", top=net.last)


@pytest.mark.parametrize("is_old", [False, True])
def test_head_of_a_vgg_is_taken(tmp_path, is_old):
    write(tmp_path / "a", is_old=is_old, tail=plain_head)
    found = layouts.identify(containers.read(tmp_path / "a"))
    assert (found.num_classes, found.left_out) == (NUM_CLASSES, [])


@pytest.mark.parametrize("change, message", [
    ("norm", r"bn6 \(BatchNorm\) is none of a VGG's head"),
    ("relu", "its layer fc7 has no ReLU"),
    ("pool", "there is no pooling between conv5_2 and fc6"),
])  # fmt: skip
def test_other_heads_are_left_out(tmp_path, change, message):
    write(tmp_path / "a", tail=lambda net: plain_head(net, change))
    found = layouts.identify(containers.read(tmp_path / "a"))
    assert found.num_classes is None and {"fc6", "fc7", "fc8"} <= {*found.left_out}
    assert re.search(message, found.notes[0])


def test_last_convolution_of_another_kind_is_refused(tmp_path):
    write(tmp_path / "a", tail=lambda net: net.add("conv5_3", "LRN", arrays=(biases("conv5_2"),)))
    with pytest.raises(ValueError, match="its conv5_3 is a layer LRN, no Convolution"):
        containers.read(tmp_path / "a")


def test_damaged_definitions_raise_value_error_only(tmp_path):
    write(tmp_path / "a", tail=plain_head)
    data = (tmp_path / "a").read_bytes()
    generator = np.random.default_rng(0)
    places = [data.find(name.encode()) for name in (*CONVOLUTIONS, *CONNECTED, "pool", "relu")]
    for place in places:
        for offset in generator.integers(-20, 60, 3):
            damaged = bytearray(data)
            damaged[max(0, place + offset)] ^= 1 << int(generator.integers(8))
            with contextlib.suppress(ValueError):
                caffe.read(memoryview(bytes(damaged)))


def test_numbers_of_inputs_are_limited(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(field(1, b"VGG") + field(100, field(3, b"") * 1001))
    with pytest.raises(ValueError, match="has over 1,000 inputs or outputs"):
        containers.read(tmp_path / "a")
    monkeypatch.setattr(caffe, "_MAX_TENSORS", 20)
    write(tmp_path / "b")
    with pytest.raises(ValueError, match="its layers have over 20 inputs and outputs"):
        containers.read(tmp_path / "b")
