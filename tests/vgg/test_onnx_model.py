"""Converted ONNX models give onnxruntime's outputs; files that are not a chain are refused."""

import pathlib
import re

import numpy as np
import pytest
from published_files import NUM_CLASSES, SMALL, VALUES

from transfer import Backbone, convert
from transfer.models.saver import file_sha256
from transfer.vgg.published import containers, layouts, limits, onnx_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
GENERATOR = np.random.default_rng(0)
SIZE, WIDTH = 64, SMALL.blocks[-1][-1]


class Writer:
    """Writes a small VGG node by node."""

    def __init__(self, channels_last=False):
        shape = ["n", SIZE, SIZE, 3] if channels_last else ["n", 3, SIZE, SIZE]
        self.image = helper.make_tensor_value_info("images", 1, shape)
        self.nodes, self.weights, self.last = [], [], "images"

    def constant(self, value, raw=True):
        name = f"w{len(self.weights)}"
        value = np.ascontiguousarray(value)
        tensor = numpy_helper.from_array(value, name)
        if not raw:
            tensor = helper.make_tensor(name, 1, value.shape, value.ravel())
        self.weights.append(tensor)
        return name

    def add(self, kind, *constants, first=None, **attributes):
        output = f"t{len(self.nodes)}"
        inputs = [first, self.last] if first else [self.last]
        inputs += [c if isinstance(c, str) else self.constant(c) for c in constants]
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        self.last = output

    def base(self, norm=False):
        for block in SMALL.convolutions:
            for name, width in block:
                kernel = VALUES[f"{name}/weights"].transpose(3, 2, 0, 1)
                biases = [] if norm else [VALUES[f"{name}/biases"]]
                self.add("Conv", kernel, *biases, kernel_shape=[3, 3], pads=[1] * 4)
                if norm:
                    beta, mean = GENERATOR.normal(size=(2, width)).astype("f4")
                    gamma, variance = GENERATOR.uniform(0.5, 1.5, (2, width)).astype("f4")
                    self.add("BatchNormalization", gamma, beta, mean, variance, epsilon=1e-4)
                self.add("Relu")
            self.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])

    def dense(self, inputs, outputs, kind):
        kernel = GENERATOR.normal(size=(inputs, outputs)).astype("f4") / inputs**0.5
        bias = GENERATOR.normal(size=outputs).astype("f4")
        if kind == "gemm":
            self.add("Gemm", kernel.T, bias, transB=1)
        elif kind == "transpose":  # as older torch exporters write a Linear
            self.nodes.append(helper.make_node("Transpose", [self.constant(kernel.T)], ["w.T"]))
            self.add("MatMul", "w.T")
            self.add("Add", bias)
        else:
            self.add("MatMul", self.constant(kernel, raw=False))
            self.add("Add", bias)

    def save(self, path):
        output = helper.make_tensor_value_info(self.last, 1, None)
        graph = helper.make_graph(self.nodes, "vgg", [self.image], [output], self.weights)
        opset = [helper.make_opsetid("", 13)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        path.write_bytes(model.SerializeToString())
        return path


def assert_same(path, out, images, tap="prob", **options):
    """``images``: NCHW, as the file takes them."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"images": images})[0]
    conversion = convert(path, out, **options)
    channels_last = images if images.shape[-1] == 3 else images.transpose(0, 2, 3, 1)
    found = np.asarray(Backbone(conversion.prefix, tap, pooling=None)(channels_last))
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return conversion


IMAGES = GENERATOR.normal(size=(2, 3, SIZE, SIZE)).astype("f4")


@pytest.mark.parametrize("norm, dense", [(True, "gemm"), (False, "transpose"), (False, "matmul")])
def test_flatten_head_gives_outputs_of_onnxruntime(tmp_path, norm, dense):
    writer = Writer()
    writer.base(norm)
    writer.add("AveragePool", kernel_shape=[1, 1])  # torchvision's adaptive pooling
    writer.add("Flatten", axis=1)
    writer.dense(WIDTH * 4, 16, dense)
    writer.add("Relu")
    writer.dense(16, NUM_CLASSES, "gemm")
    writer.add("Softmax", axis=1)
    found = assert_same(writer.save(tmp_path / "m.onnx"), tmp_path / "vgg", IMAGES)
    assert (found.layout, found.num_classes) == ("onnx", NUM_CLASSES)
    assert (found.card.tap, found.card.image_size, found.left_out) == ("fc6:0", SIZE, [])


def test_channels_last_graph_with_preprocessing(tmp_path):
    writer = Writer(channels_last=True)
    writer.add("Gather", np.array([2, 1, 0]), axis=3)
    writer.add("Sub", np.array([103.939, 116.779, 123.68], "f4"))
    writer.add("Transpose", perm=[0, 3, 1, 2])
    writer.base()
    writer.add("GlobalAveragePool")
    writer.add("Transpose", perm=[0, 2, 3, 1])
    writer.add("Squeeze", np.array([1, 2]))
    writer.dense(WIDTH, 2, "matmul")
    writer.add("Softmax", axis=1)
    path = writer.save(tmp_path / "m.onnx")
    pixels = GENERATOR.uniform(0, 255, (2, SIZE, SIZE, 3)).astype("f4")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    conversion = convert(path, tmp_path / "vgg")
    assert conversion.card.preprocess == "caffe"
    inputs = pixels[..., ::-1] - np.array([103.939, 116.779, 123.68], "f4")
    found = np.asarray(Backbone(conversion.prefix, "prob")(inputs))
    np.testing.assert_allclose(found, session.run(None, {"images": pixels})[0], atol=1e-5)


@pytest.mark.parametrize("slices", [
    ([-1], [-(2**31)], [3], [-1]),
    ([0, 10**9], [10**9, -(10**9)], [0, 3], [1, -1]),  # as tf2onnx
    ([0, 0, 0, 2**31 - 1], [2**31 - 1] * 3 + [-(2**31)], [0, 1, 2, 3], [1, 1, 1, -1]),
])  # fmt: skip
def test_slice_that_reverses_channels_is_read(tmp_path, slices):
    writer = Writer(channels_last=True)
    writer.add("Slice", *map(np.array, slices))
    writer.add("Transpose", perm=[0, 3, 1, 2])
    writer.base()
    found = layouts.identify(containers.read(writer.save(tmp_path / "m.onnx")))
    assert found.preprocess == {"mean": [0.0], "std": [1.0], "order": "BGR"}
    writer.nodes[0].input[4] = writer.constant(np.array([-2] * len(slices[0])))
    with pytest.raises(ValueError, match=r"\(Slice\) stands before its first convolution"):
        layouts.identify(containers.read(writer.save(tmp_path / "m.onnx")))


def test_patterns_of_arrays_are_for_files_of_arrays(tmp_path):
    writer = Writer()
    writer.base()
    container = containers.read(pathlib.Path(writer.save(tmp_path / "m.onnx")))
    with pytest.raises(ValueError, match="leave_out is for files that have arrays alone"):
        layouts.identify(container, leave_out=["*"])
    with pytest.raises(ValueError, match="only MatConvNet's files come in two orders"):
        layouts.identify(container, columns_first=True)


def test_base_is_taken_without_head(tmp_path):
    writer = Writer()
    writer.base()
    writer.add("Conv", GENERATOR.normal(size=(4, WIDTH, 1, 1)).astype("f4"), kernel_shape=[1, 1])
    path = writer.save(tmp_path / "m.onnx")
    conversion = convert(path, tmp_path / "vgg")
    assert conversion.num_classes is None
    assert "(Conv2D)" in conversion.notes[0]


def test_external_data_beside_the_file_are_read(tmp_path):
    writer = Writer()
    writer.base()
    writer.save(tmp_path / "one.onnx")
    model = onnx.load(tmp_path / "one.onnx")
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "m.onnx.data"}
    onnx.save_model(model, tmp_path / "m.onnx", **options)
    found, expected = (
        layouts.identify(containers.read(tmp_path / name)).values for name in ("m.onnx", "one.onnx")
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    data = tmp_path / "m.onnx.data"
    card = convert(tmp_path / "m.onnx", tmp_path / "vgg").card
    assert card.source.endswith(f"sha256 {file_sha256(tmp_path / 'm.onnx', data)}")
    data.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="lies in 'm.onnx.data'; put that file beside it"):
        containers.read(tmp_path / "m.onnx")
    data.symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="is a symbolic link and not followed; copy both files"):
        containers.read(tmp_path / "m.onnx")
    data.unlink()
    data.write_bytes((tmp_path / "moved").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is outside of 'm.onnx.data', or overlaps another"):
        containers.read(tmp_path / "m.onnx")


def test_constant_in_a_file_beside_is_read(tmp_path):
    values = np.arange(6, dtype="f4")
    (tmp_path / "c").write_bytes(values.tobytes())
    tensor = onnx.TensorProto(data_type=1, dims=[6], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="c")
    node = onnx.helper.make_node("Constant", [], ["x"], value=tensor)
    side_files = onnx_file.SideFiles(tmp_path)
    found = onnx_file.node_of(memoryview(node.SerializeToString()), side_files)
    np.testing.assert_array_equal(found.attributes["value"], values)
    assert side_files.paths == [tmp_path / "c"]


def test_side_files_are_limited_together(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 30)
    side_files = onnx_file.SideFiles(tmp_path)
    for name in "cd":
        (tmp_path / name).write_bytes(bytes(20))
    side_files.read("w", {"location": "c"})
    with pytest.raises(ValueError, match="would take over 30 bytes"):
        side_files.read("w", {"location": "d"})


@pytest.mark.parametrize("place, message", [
    ({"location": "../../etc/passwd"}, "'w0' lies in another file"),
    ({"location": "/etc/passwd"}, "'w0' lies in another file"),
    ({}, "'w0' lies in another file"),
    ({"location": "m.onnx", "offset": "-1"}, "'w0' is at '-1' of 'm.onnx'"),
    ({"location": "m.onnx", "length": str(2**60)}, "'w0' is outside of 'm.onnx'"),
])  # fmt: skip
def test_external_data_elsewhere_are_refused(tmp_path, place, message):
    writer = Writer()
    writer.base()
    weight = writer.weights[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in place.items():
        weight.external_data.add(key=key, value=value)
    with pytest.raises(ValueError, match=message):
        containers.read(writer.save(tmp_path / "m.onnx"))


def test_array_of_several_nodes_is_refused(tmp_path):
    """Each use might copy it."""
    writer = Writer()
    writer.base()
    name = writer.constant(np.zeros((WIDTH, WIDTH), "f4"))
    writer.add("GlobalAveragePool")
    writer.add("Flatten")
    for _ in range(3):
        writer.add("MatMul", name)
    with pytest.raises(ValueError, match="is used by several nodes"):
        containers.read(writer.save(tmp_path / "m.onnx"))


def test_split_batch_norm_and_sliced_channels_as_tf2onnx_writes_them(tmp_path):
    writer = Writer(channels_last=True)
    parts = []
    for channel in (2, 1, 0):
        writer.last = "images"
        writer.add("Slice", *(np.array([n]) for n in (channel, channel + 1, 3)))
        parts.append(writer.last)
    writer.last = parts[0]
    writer.add("Concat", *parts[1:], axis=3)
    writer.add("Transpose", perm=[0, 3, 1, 2])
    writer.base()
    writer.add("GlobalAveragePool")
    writer.add("Squeeze", np.array([2, 3]))
    writer.dense(WIDTH, 16, "matmul")
    writer.add("Relu")
    for kind in ("Mul", "Sub"):
        writer.add(kind, GENERATOR.uniform(0.5, 2, 16).astype("f4"))
    writer.dense(16, 3, "matmul")
    path = writer.save(tmp_path / "m.onnx")
    pixels = GENERATOR.normal(size=(2, SIZE, SIZE, 3)).astype("f4")
    expected = onnxruntime.InferenceSession(path).run(None, {"images": pixels})[0]
    conversion = convert(path, tmp_path / "vgg")
    assert conversion.card.preprocess["order"] == "BGR"
    found = np.asarray(Backbone(conversion.prefix, "fc7")(pixels[..., ::-1]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_damaged_files_raise_value_error_only(tmp_path):
    writer = Writer()
    writer.base()
    data = writer.save(tmp_path / "m.onnx").read_bytes()
    for position in [*range(0, 300, 7), *GENERATOR.integers(0, len(data), 20)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(GENERATOR.integers(8))
        (tmp_path / "m.onnx").write_bytes(damaged)
        try:
            containers.read(tmp_path / "m.onnx")
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes", "reason"),
    [
        ("Reshape", [np.array([-1, WIDTH, 4, 1])], {}, "begins with .*Reshape to other axes"),
        ("Flatten", [], {"axis": 2}, "begins with .*Flatten to other axes"),
        ("Cast", [], {"to": 6}, "Cast"),
    ],
    ids=["reshape", "flatten", "cast to integers"],
)
def test_head_that_changes_axes_or_types_is_left_out(tmp_path, kind, inputs, attributes, reason):
    writer = Writer()
    writer.base()
    writer.add(kind, *inputs, **attributes)
    writer.add("Flatten")
    writer.dense(WIDTH * 16, 2, "gemm")
    found = layouts.identify(containers.read(pathlib.Path(writer.save(tmp_path / "m.onnx"))))
    assert found.num_classes is None and re.search(reason, found.notes[0])
