"""Custom gradients of convolutions compared with TensorFlow's own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import SHARED, graph_def_of

from transfer import Backbone, load_meta_graph
from transfer.layers import gradients as gradients_module
from transfer.layers.gradients import with_cpu_gradients

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def _without_avx512(monkeypatch):
    monkeypatch.setattr(gradients_module, "has_avx512", lambda: False)


def convolution(size, padding, stride=1, dilation=1):
    def build():
        images = tf1.placeholder(tf.float32, [None, None, None, 3], name="images")
        kernel = tf1.placeholder(tf.float32, [size, size + 1, 3, 5], name="kernel")
        tf.nn.conv2d(images, kernel, stride, padding, dilations=dilation, name="convolution")

    return graph_def_of(build)


def gradients(graph_def, images, kernel):
    with tf.Graph().as_default() as graph:
        inputs = [tf.constant(images), tf.constant(kernel)]
        names = {"images:0": inputs[0], "kernel:0": inputs[1]}
        (outputs,) = tf.import_graph_def(graph_def, names, ["convolution:0"])
        first = tf.gradients(tf.reduce_sum(tf.sin(outputs)), inputs)
        second = tf.gradients(tf.reduce_sum(tf.square(first[1])), inputs)
        kinds = [op.get_attr("padding") for op in graph.get_operations() if "Filter" in op.type]
        with tf1.Session() as session:
            return session.run([*first, *second]), kinds


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_gradients_equal_tensorflows(size, padding):
    generator = np.random.default_rng(size)
    images = generator.normal(size=(2, 9, 11, 3)).astype(np.float32)
    kernel = generator.normal(size=(size, size + 1, 3, 5)).astype(np.float32)
    plain = convolution(size, padding)
    expected, _ = gradients(plain, images, kernel)
    found, kinds = gradients(with_cpu_gradients(plain), images, kernel)
    assert b"EXPLICIT" in kinds
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_dilated_convolutions_are_unchanged():
    graph_def = convolution(3, "SAME", dilation=2)
    assert with_cpu_gradients(graph_def) == graph_def


def test_graph_is_unchanged_with_gpu(monkeypatch):
    graph_def = convolution(3, "SAME")
    assert with_cpu_gradients(graph_def) != graph_def
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert with_cpu_gradients(graph_def) == graph_def


def test_graph_is_unchanged_with_avx512(monkeypatch):
    graph_def = convolution(3, "SAME")
    monkeypatch.setattr(gradients_module, "has_avx512", lambda: True)
    assert with_cpu_gradients(graph_def) == graph_def


@pytest.mark.parametrize("found", [["AVX2"], ["AVX512F", "AVX512_SKX"], ["X86_V3", "X86_V4"]])
def test_avx512_is_detected_by_all_its_numpy_names(monkeypatch, found):
    monkeypatch.undo()
    config = {"SIMD Extensions": {"baseline": ["SSE2"], "found": found}}
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert gradients_module.has_avx512() == (len(found) == 2)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="asks Linux what there is")
def test_avx512_detection_agrees_with_linux(monkeypatch):
    monkeypatch.undo()
    assert gradients_module.has_avx512() == ("avx512f" in Path("/proc/cpuinfo").read_text())


def test_input_graph_is_not_modified():
    graph_def = convolution(3, "SAME")
    before = graph_def.SerializeToString(deterministic=True)
    with_cpu_gradients(graph_def)
    assert graph_def.SerializeToString(deterministic=True) == before


def strided(transposed, channels, dtype, size=1):
    """A strided convolution, or its transpose, with images and a kernel."""
    kernel_shape = [size, size, channels, 8]
    shape = [8, 16, 16, 8] if transposed else [8, 32, 32, channels]

    def build():
        images = tf1.placeholder(dtype, [None, *shape[1:]], name="images")
        kernel = tf1.placeholder(dtype, kernel_shape, name="kernel")
        if transposed:
            larger = [tf.shape(images)[0], 32, 32, channels]
            tf.nn.conv2d_transpose(images, kernel, larger, 2, "SAME", name="convolution")
        else:
            tf.nn.conv2d(images, kernel, 2, "SAME", name="convolution")

    generator = np.random.default_rng(channels)
    return graph_def_of(build), generator.normal(size=shape), generator.normal(size=kernel_shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_kernel_gradient_of_strided_pointwise_convolution_is_correct(channels, transposed):
    """oneDNN's gradient is wrong below 8 channels, and crashes below 16 with AVX-512."""
    graph_def, images, kernel = strided(transposed, channels, tf.float32)
    found, _ = gradients(
        with_cpu_gradients(graph_def), images.astype(np.float32), kernel.astype(np.float32)
    )
    expected, _ = gradients(strided(transposed, channels, tf.float64)[0], images, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("size", "channels"), [(3, 4), (1, 16)])
def test_other_strided_convolutions_keep_tensorflows_gradient(size, channels):
    graph_def, images, kernel = strided(False, channels, tf.float32, size)
    images, kernel = images.astype(np.float32), kernel.astype(np.float32)
    expected, _ = gradients(graph_def, images, kernel)
    found, _ = gradients(with_cpu_gradients(graph_def), images, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


MINI_XCEPTION = SHARED / "faults" / "mini_xception" / "model.ckpt"


def mini_xception_gradients():
    """Gradients of all weights, in the training function, as full fine-tuning takes them."""
    graph = load_meta_graph(MINI_XCEPTION)
    backbone = Backbone(graph, "module4/add_3/add:0", input="Placeholder:0")
    images = np.random.default_rng(0).normal(size=(4, 48, 48, 1)).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.sin(backbone(images, training=True)))
    weights = backbone.trainable_variables
    return [gradient.numpy() for gradient in tape.gradient(loss, weights)]


@pytest.mark.slow
@pytest.mark.skipif(not MINI_XCEPTION.with_name("checkpoint").exists(), reason="no such model here")
def test_gradients_of_a_separable_network_equal_those_without_onednn(tmp_path):
    script = (
        "import sys, numpy; sys.path[:0] = sys.argv[2:]; import test_gradients as tests; "
        "numpy.savez(sys.argv[1], *tests.mini_xception_gradients())"
    )
    folders = [str(folder) for folder in Path(__file__).parents[:3]]
    command = [sys.executable, "-c", script, str(tmp_path / "gradients.npz"), *folders]
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    with np.load(tmp_path / "gradients.npz") as expected:
        for ours, name in zip(mini_xception_gradients(), expected.files, strict=True):
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-3 * scale)
