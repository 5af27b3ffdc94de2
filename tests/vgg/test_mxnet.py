"""Arrays of MXNet's files, whose layout has changed twice."""

import struct

import numpy as np
import pytest

from transfer.vgg.published import mxnet

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
    ],
)
def test_batch_norm_has_names_of_pytorch(name, expected):
    assert list(mxnet.arrays(file_of(HEADERS["version 2"], name))) == [expected]


def test_sparse_and_unknown_arrays_are_refused():
    for header in (struct.pack("<IiIqq", 0xF993FAC9, 1, 2, 2, 3), struct.pack("<III", 99, 2, 3)):
        with pytest.raises(ValueError, match="expected at most version 0xf993fac9, dense storage"):
            mxnet.arrays(file_of(header, b"a"))
