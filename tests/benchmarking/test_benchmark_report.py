"""Statistics of the benchmark's report, by hand."""

import numpy as np
from conftest import TINY

from transfer.benchmarking import report
from transfer.graph import extract
from transfer.graph.cuts import list_cuts
from transfer.vgg import architectures


def test_accuracy_interval_covers_seeds_and_images():
    # Wilson: https://www.itl.nist.gov/div898/handbook/prc/section2/prc241.htm
    low, high = report.accuracy_interval([0.2], 20)
    np.testing.assert_allclose([low, high], [0.0807, 0.4160], atol=1e-4)
    low, high = report.accuracy_interval([0.8, 0.8, 0.8], 100)
    np.testing.assert_allclose([low, high], [0.7112, 0.8666], atol=1e-4)  # without deviation
    low, high = report.accuracy_interval([1.0, 1.0, 1.0], 20)
    np.testing.assert_allclose([low, high], [0.8389, 1], atol=1e-4)
    wide = report.accuracy_interval([0.49, 0.5, 0.51], 10**9)
    # Student's t for 2 degrees of freedom: 4.303
    np.testing.assert_allclose(
        wide, [0.5 - 4.303 * 0.01 / 3**0.5, 0.5 + 4.303 * 0.01 / 3**0.5], 1e-3
    )


def test_training_multiply_adds_by_hand():
    graph = architectures.build_graph(TINY, 10).as_graph_def(add_shapes=True)
    network = extract(graph, "fc7:0", "images:0", input_shape=(None, 16, 16, 3))
    cuts = list_cuts(network)
    conv1, conv2_1, conv2_2 = 16 * 16 * 9 * 3 * 8, 8 * 8 * 9 * 8 * 8, 8 * 8 * 9 * 8 * 16
    fc6, fc7 = 4 * 4 * 16 * 32, 32 * 32
    whole = conv1 + conv2_1 + conv2_2 + fc6 + fc7
    work = report.training_multiply_adds
    assert work("none", cuts) == 3 * whole - conv1
    assert work("pool2", cuts) == 3 * (fc6 + fc7) - fc6
    assert work("fc7", cuts) is None
    assert work("none", []) is None
