"""Flipped kernels of Theano: told by the file, by its first convolution, or by the caller."""

import h5py
import numpy as np
import pytest
from published_files import (
    CONNECTED,
    CONVOLUTIONS,
    biases,
    kernel,
    outputs_first,
    write_frossard,
    write_keras_legacy,
    write_lasagne,
    write_theano,
    write_theano_numbered,
)

from transfer.vgg.published import containers, keras_model, layouts, origins


def identify(path, **options):
    return layouts.identify(containers.read(path), **options)


def assert_convolutions(found, is_flipped=False):
    for name in CONVOLUTIONS:
        expected = kernel(name)[::-1, ::-1] if is_flipped else kernel(name)
        np.testing.assert_array_equal(found.values[f"{name}/weights"], expected, err_msg=name)


def test_backend_of_file_decides(tmp_path):
    path = tmp_path / "a.h5"
    for backend, is_flipped in (("theano", False), ("tensorflow", True)):
        write_theano(path)
        with h5py.File(path, "a") as file:
            file.attrs["backend"] = backend
        found = identify(path)
        assert_convolutions(found, is_flipped)  # the kernels in the file are flipped
        np.testing.assert_array_equal(found.values["fc6/weights"], kernel("fc6"))
        with pytest.raises(ValueError, match=f"those of {backend} are known"):
            identify(path, kernels="flipped")


def test_channels_last_kernels_of_theano_are_flipped(tmp_path):
    write_keras_legacy(tmp_path / "a.h5")
    assert_convolutions(identify(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["backend"] = "theano"
    found = identify(tmp_path / "a.h5")
    assert_convolutions(found, is_flipped=True)
    assert found.num_classes is None
    assert "whether a model for Theano is flattened channels first" in found.notes[0]


@pytest.mark.parametrize("write", [
    write_theano,
    write_theano_numbered,
    lambda path: write_lasagne(path, **{"mean value": np.zeros(3, np.float32)}),
])  # fmt: skip
def test_unknown_kernels_are_refused_unless_told(tmp_path, write):
    write(tmp_path / "a")
    with pytest.raises(ValueError, match="kernels=flipped: .* kernels=unflipped: "):
        identify(tmp_path / "a")
    found = [identify(tmp_path / "a", kernels=told) for told in ("flipped", "unflipped")]
    first, second = (one.values["conv2_1/weights"] for one in found)
    np.testing.assert_array_equal(first, second[::-1, ::-1])
    np.testing.assert_array_equal(found[0].values["fc6/weights"], kernel("fc6"))


def test_names_tell_keras_1_with_theano_from_tensorflow(tmp_path):
    write_keras_legacy(tmp_path / "a.h5")  # names of TensorFlow
    assert_convolutions(identify(tmp_path / "a.h5"))
    theirs = {"convolution2d": ["convolution2d_{}_W", "convolution2d_{}_b"]}
    theirs["layer"] = ["param_0", "param_1"]
    for group, names in theirs.items():
        path = tmp_path / f"{group}.h5"
        with h5py.File(path, "w") as file:
            for number, layer in enumerate(CONVOLUTIONS, 1):  # tf_dim_ordering_th_kernels
                values = kernel(layer)[::-1, ::-1], biases(layer)
                for name, value in zip(names, values, strict=True):
                    file[f"{group}_{number}/{name.format(number)}"] = value
        with pytest.raises(ValueError, match="kernels=flipped: .*th_kernels in their name"):
            identify(path)
        assert_convolutions(identify(path, kernels="flipped"))


def test_first_convolution_of_oxford_tells_whether_kernels_are_flipped(tmp_path, monkeypatch):
    monkeypatch.setattr(
        origins, "convention_of", lambda k: "caffe" if (k == kernel("conv1_1")).all() else None
    )
    write_theano_numbered(tmp_path / "flipped.h5")
    assert_convolutions(identify(tmp_path / "flipped.h5"))
    with h5py.File(tmp_path / "unflipped.h5", "w") as file:
        for number, layer in enumerate(CONVOLUTIONS + CONNECTED):
            values = outputs_first(layer)
            file[f"layer_{number}/param_0"] = values if layer in CONVOLUTIONS else values.T
            file[f"layer_{number}/param_1"] = biases(layer)
    assert_convolutions(identify(tmp_path / "unflipped.h5"))


def test_unnamed_layers_of_keras_1_are_read(tmp_path):
    numbers = {"convolution2d": 0, "dense": 0}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for layer in CONVOLUTIONS + CONNECTED:
            kind = "convolution2d" if layer in CONVOLUTIONS else "dense"
            numbers[kind] += 1
            name = f"{kind}_{numbers[kind]}"
            values = outputs_first(layer)
            values = values[:, :, ::-1, ::-1] if layer in CONVOLUTIONS else values.T
            file[f"{name}/{name}_W"], file[f"{name}/{name}_b"] = values, biases(layer)
    found = identify(tmp_path / "a.h5", kernels="flipped")
    assert_convolutions(found)
    np.testing.assert_array_equal(found.values["fc6/weights"], kernel("fc6"))
    assert found.num_classes is not None


def test_option_is_for_files_that_do_not_say(tmp_path):
    write_frossard(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="it is a npz file, and they are known"):
        identify(tmp_path / "a.npz", kernels="unflipped")
    whole = containers.Container("HDF5", {}, keras_model.Model([], [], []), backend="")
    with pytest.raises(ValueError, match="it is a HDF5 file, and they are known"):
        layouts.identify(whole, kernels="flipped")
