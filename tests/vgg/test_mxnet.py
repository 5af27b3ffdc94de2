"""Arrays of MXNet's files, whose layout has changed twice."""

import struct

import numpy as np
import pytest
from published_files import torch_norm_state

from transfer.vgg.published import mxnet, torch_vgg

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
HEADERS = {
    "no version": struct.pack("<III", 2, 2, 3),
    "version 1": struct.pack("<IIqq", 0xF993FAC8, 2, 2, 3),
    "version 2": struct.pack("<IiIqq", 0xF993FAC9, 0, 2, 2, 3),
}


def file_of(header, name):
    array = header + struct.pack("<3i", 1, 0, 0) + VALUES.tobytes()
    names = struct.pack("<QQ", 1, len(name)) + name
    return memoryview(mxnet.MAGIC + struct.pack("<Q", 1) + array + names)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_all_versions_are_read(header):
    arrays = mxnet.arrays(file_of(header, b"arg:conv1_1_weight"))
    np.testing.assert_array_equal(arrays["conv1_1.weight"], VALUES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"features.1.gamma", "features.1.weight"),
        (b"features.1.beta", "features.1.bias"),
        (b"aux:bn_moving_var", "bn.running_var"),
        (b"vgg0_batchnorm2_running_mean", "features.7.running_mean"),
        (b"mine_batchnorm2_gamma", "mine_batchnorm2.weight"),
    ],
)
def test_batch_norm_has_names_of_pytorch(name, expected):
    assert list(mxnet.arrays(file_of(HEADERS["version 2"], name))) == [expected]


def test_sparse_and_unknown_arrays_are_refused():
    for header in (struct.pack("<IiIqq", 0xF993FAC9, 1, 2, 2, 3), struct.pack("<III", 99, 2, 3)):
        with pytest.raises(ValueError, match="expected at most version 0xf993fac9, dense storage"):
            mxnet.arrays(file_of(header, b"a"))


def test_batch_norm_of_gluon_follows_its_convolution():
    """As ``net.export`` names them, which numbers the layers of each class."""
    state = torch_norm_state(1)
    convolutions = [key for key, values in state.items() if values.ndim == 4]
    names = {}
    for number, key in enumerate(convolutions):
        place = int(key.split(".")[1])
        names[f"features.{place}"] = f"arg:vgg1_conv{number}"
        names[f"features.{place + 1}"] = f"aux:vgg1_batchnorm{number}"
    data, labels = b"", b""
    for key, values in state.items():
        owner, _, part = key.rpartition(".")
        is_norm = f"{owner}.running_mean" in state
        part = {"weight": "gamma", "bias": "beta"}.get(part, part) if is_norm else part
        data += struct.pack(f"<IiI{values.ndim}q", 0xF993FAC9, 0, values.ndim, *values.shape)
        data += struct.pack("<3i", 1, 0, 0) + values.tobytes()
        name = f"{names[owner]}_{part}".encode()
        labels += struct.pack("<Q", len(name)) + name
    count = struct.pack("<Q", len(state))
    found = torch_vgg.interpret(
        mxnet.arrays(memoryview(mxnet.MAGIC + count + data + count + labels))
    )
    expected = torch_vgg.interpret(state)
    assert len(found.convolutions) == len(convolutions)
    for one, other in zip(found.convolutions, expected.convolutions, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
