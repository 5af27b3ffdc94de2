import numpy as np
import pytest
import tensorflow as tf

from transfer.vgg import architectures

PARAMETERS = {  # with 1000 classes; source: Keras Applications and torchvision, vgg_small by hand
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg_small": 2_556_504 + 800 * 513,  # 200 classes are embedded; 800 more columns and biases
}


def test_parameter_table_covers_all_architectures():
    assert PARAMETERS.keys() == architectures.ARCHITECTURES.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_num_parameters_equals_published_count(name):
    assert architectures.num_parameters(architectures.ARCHITECTURES[name], 1000) == PARAMETERS[name]


@pytest.mark.parametrize("name, count", [("vgg16", 14_714_688), ("vgg19", 20_024_384)])
def test_num_parameters_without_top_equals_keras(name, count):
    """Source: keras.applications with include_top=False."""
    assert architectures.num_parameters(architectures.ARCHITECTURES[name], None) == count
    graph = architectures.build_graph(architectures.ARCHITECTURES[name], None)
    with graph.as_default():
        variables = tf.compat.v1.global_variables()
    assert sum(int(np.prod(v.shape)) for v in variables) == count
    assert graph.get_tensor_by_name("pool5:0").shape.as_list() == [None, None, None, 512]


def test_images_smaller_than_fc6_kernel_are_zero_padded():
    """The only pixel after the last pooling is centred in the kernel of fc6."""
    architecture = architectures.Architecture(((4,),) * 2, 8, 12)  # fc6 has a 3 x 3 kernel
    values = architectures.random_weights(architecture, 5, convolutional=True)
    graph = architectures.build_graph(architecture, 5, convolutional=True, use_resource=True)
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    with graph.as_default(), tf.compat.v1.Session() as session:
        for variable in tf.compat.v1.global_variables():
            variable.load(values[variable.op.name], session)
        pool2, fc6 = session.run(["pool2:0", "fc6:0"], {"images:0": images})
    expected = pool2[:, 0, 0] @ values["fc6/weights"][1, 1] + values["fc6/biases"]
    assert fc6.shape == (2, 1, 1, 8)
    np.testing.assert_allclose(fc6[:, 0, 0], np.maximum(expected, 0), atol=1e-5)


@pytest.mark.parametrize("convolutional", [False, True])
def test_build_graph_uses_standard_tensor_names(convolutional):
    graph = architectures.build_graph(
        architectures.ARCHITECTURES["vgg16"], 1000, convolutional=convolutional
    )
    names = ["images", "conv1_1", "conv3_3", "conv5_3", "pool1", "pool5", "fc6", "fc7", "fc8"]
    for name in [*names, "prob", "keep_prob"]:
        assert graph.get_tensor_by_name(f"{name}:0").name == f"{name}:0"
    with graph.as_default():
        variables = tf.compat.v1.global_variables()
    assert sum(int(np.prod(v.shape)) for v in variables) == PARAMETERS["vgg16"]
    fc7 = graph.get_tensor_by_name("fc7:0").shape.as_list()
    assert fc7 == ([None, None, None, 4096] if convolutional else [None, 4096])


def test_architecture_rejects_too_small_image_size():
    with pytest.raises(ValueError, match="image size 16 is too small for 5 poolings"):
        architectures.Architecture(((8,),) * 5, 32, image_size=16)
