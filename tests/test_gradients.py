"""Gradients of marked convolutions against TensorFlow's own."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import graph_def_of

from transfer import gradients as gradients_module
from transfer.gradients import with_fast_gradients

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
    found, kinds = gradients(with_fast_gradients(plain), images, kernel)
    assert b"EXPLICIT" in kinds
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}])
def test_other_convolutions_are_left_alone(options):
    graph_def = convolution(3, "SAME", **options)
    assert with_fast_gradients(graph_def) == graph_def


def test_a_graph_for_a_gpu_is_left_alone(monkeypatch):
    graph_def = convolution(3, "SAME")
    assert with_fast_gradients(graph_def) != graph_def
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert with_fast_gradients(graph_def) == graph_def


def test_with_avx512_it_is_left_alone(monkeypatch):
    graph_def = convolution(3, "SAME")
    monkeypatch.setattr(gradients_module, "has_avx512", lambda: True)
    assert with_fast_gradients(graph_def) == graph_def


@pytest.mark.parametrize("found", [["AVX2"], ["AVX512F", "AVX512_SKX"], ["X86_V3", "X86_V4"]])
def test_avx512_by_its_names(monkeypatch, found):
    monkeypatch.undo()
    config = {"SIMD Extensions": {"baseline": ["SSE2"], "found": found}}
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert gradients_module.has_avx512() == (len(found) == 2)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="asks Linux what there is")
def test_avx512_is_what_linux_says(monkeypatch):
    monkeypatch.undo()
    assert gradients_module.has_avx512() == ("avx512f" in Path("/proc/cpuinfo").read_text())


def test_the_graph_that_is_given_stays_as_it_is():
    graph_def = convolution(3, "SAME")
    before = graph_def.SerializeToString(deterministic=True)
    with_fast_gradients(graph_def)
    assert graph_def.SerializeToString(deterministic=True) == before
