"""`convert` from Python; its results for each file format are tested in test_published.py."""

import errno

import numpy as np
import pytest
from published_files import NUM_CLASSES, SMALL, VALUES, write_caffe, write_frossard

from transfer import Backbone, convert, load_meta_graph


def test_converted_model_has_weights_of_file(tmp_path):
    write_frossard(tmp_path / "weights.npz")
    conversion = convert(tmp_path / "weights.npz", tmp_path / "models" / "vgg")
    assert (conversion.layout, conversion.num_classes) == ("frossard", NUM_CLASSES)
    assert conversion.num_parameters == sum(value.size for value in VALUES.values())
    assert conversion.card.tap == load_meta_graph(conversion.prefix).card.tap == "fc7:0"
    backbone = Backbone(conversion.prefix, "fc8")
    found = dict(zip(backbone.variable_names, backbone.graph_variables, strict=True))
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_assumptions_are_warnings(tmp_path):
    write_caffe(tmp_path / "faces.caffemodel")
    conversion = convert(tmp_path / "faces.caffemodel", tmp_path / "a")
    (warning,) = conversion.warnings
    assert f"images of its {NUM_CLASSES} classes had; give it with preprocess=MEAN" in warning
    assert conversion.card.preprocess is None
    means = {"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}
    conversion = convert(tmp_path / "faces.caffemodel", tmp_path / "b", preprocess=means)
    assert conversion.warnings == []
    assert (conversion.card.preprocess, conversion.why_preprocess) == (means, "as given")


@pytest.mark.parametrize("options, message", [
    ({"preprocess": "kaffe"}, "preprocess=kaffe: "),
    ({"spatial_order": "diagonal"}, "spatial_order='diagonal' is unknown; choose from auto, rows"),
])  # fmt: skip
def test_error_messages_name_arguments(tmp_path, options, message):
    write_frossard(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "weights.npz", tmp_path / "vgg", **options)
    assert not (tmp_path / "vgg.meta").exists()


def test_convert_never_overwrites_files(tmp_path):
    write_frossard(tmp_path / "weights.npz")
    convert(tmp_path / "weights.npz", tmp_path / "vgg")
    with pytest.raises(ValueError, match="is there already; choose another out=PREFIX"):
        convert(tmp_path / "weights.npz", tmp_path / "vgg")


def test_conversion_that_failed_leaves_no_files(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_frossard(tmp_path / "weights.npz")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("transfer.vgg.published.conversion.save_meta_graph", full)
        convert(tmp_path / "weights.npz", tmp_path / "vgg")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]


def test_unknown_size_of_images_is_warned_of_or_given(tmp_path):
    arrays = {k: v for k, v in VALUES.items() if k.startswith("conv")}
    width = arrays["conv5_2/biases"].size
    arrays |= {"fc8/weights": np.ones((width, 3), np.float32), "fc8/biases": np.ones(3, np.float32)}
    names = {"weights": "W", "biases": "b"}
    named = {f"{k.split('/')[0]}_{names[k.split('/')[1]]}": v for k, v in arrays.items()}
    np.savez(tmp_path / "a.npz", **named)
    options = {"pooling": "average", "preprocess": "caffe"}
    conversion = convert(tmp_path / "a.npz", tmp_path / "a", **options)
    assert conversion.card.image_size == SMALL.image_size
    assert "does not say the size of its images" in conversion.warnings[0]
    conversion = convert(tmp_path / "a.npz", tmp_path / "b", image_size=(96, 160), **options)
    assert (conversion.card.image_size, conversion.warnings) == ((96, 160), [])
    write_frossard(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match="image_size=96 does not fit its head"):
        convert(tmp_path / "weights.npz", tmp_path / "c", image_size=96)
