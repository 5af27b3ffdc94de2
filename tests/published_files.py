"""Write small weight files in the layouts of the original software."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import h5py
import numpy as np
import safetensors.numpy
import scipy.io
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from transfer.vgg import architectures

tf1 = tf.compat.v1
SMALL = architectures.ARCHITECTURES["vgg_small"]
NUM_CLASSES = 7
VALUES = architectures.random_weights(SMALL, NUM_CLASSES)
CONVOLUTIONS = [name for block in SMALL.convolutions for name, _ in block]
CONNECTED = ["fc6", "fc7", "fc8"]
WINDOW, CHANNELS = SMALL.pooled_size, SMALL.blocks[-1][-1]


def kernel(layer):
    return VALUES[f"{layer}/weights"]


def biases(layer):
    return VALUES[f"{layer}/biases"]


def windowed(layer):
    """The kernel of a fully connected layer in the shape of a convolution."""
    if layer == "fc6":
        return kernel(layer).reshape(WINDOW, WINDOW, CHANNELS, -1)
    return kernel(layer)[None, None]


def outputs_first(layer):
    """Kernels in the layout of PyTorch and Caffe: inputs of fc6 in the order channel, height,
    width."""
    if layer in CONVOLUTIONS:
        return np.ascontiguousarray(kernel(layer).transpose(3, 2, 0, 1))
    flat = windowed(layer).transpose(3, 2, 0, 1)
    return np.ascontiguousarray(flat.reshape(len(flat), -1))


def write_keras_legacy(path):
    """A file as published by keras.applications: one group per layer, with named arrays."""
    renamed = {
        f"fc{n}": name for n, name in zip((6, 7, 8), ("fc1", "fc2", "predictions"), strict=True)
    }
    with h5py.File(path, "w") as file:
        for layer in CONVOLUTIONS + CONNECTED:
            name = renamed.get(layer) or f"block{layer[4]}_conv{layer[6]}"
            file.create_group(name).create_dataset(f"{name}_W_1:0", data=kernel(layer))
            file[name].create_dataset(f"{name}_b_1:0", data=biases(layer))
        file.create_group("flatten")


def write_vgg_face(path):
    """A file of rcmalli/keras-vggface, as Keras 2 writes it."""
    with h5py.File(path, "w") as file:
        for layer in CONVOLUTIONS + CONNECTED:
            file[f"{layer}/{layer}/kernel:0"] = kernel(layer)
            file[f"{layer}/{layer}/bias:0"] = biases(layer)


def write_deepface(path):
    """Unnamed convolutions, also for the fully connected layers."""
    with h5py.File(path, "w") as file:
        for number, layer in enumerate(CONVOLUTIONS + CONNECTED, 1):
            name = f"conv2d_{number}"
            values = kernel(layer) if layer in CONVOLUTIONS else windowed(layer)
            file[f"{name}/{name}/kernel:0"] = values
            file[f"{name}/{name}/bias:0"] = biases(layer)


def flipped(layer):
    """A kernel as Keras 1 has it with Theano."""
    if layer in CONVOLUTIONS:
        return outputs_first(layer)[:, :, ::-1, ::-1]
    return outputs_first(layer).T


def write_theano(path):
    """A file of fchollet/deep-learning-models with th_kernels, of 2016: it names no backend."""
    renamed = {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}
    with h5py.File(path, "w") as file:
        for layer in CONVOLUTIONS + CONNECTED:
            name = renamed.get(layer) or f"block{layer[4]}_conv{layer[6]}"
            file[f"{name}/{name}_W"], file[f"{name}/{name}_b"] = flipped(layer), biases(layer)


def write_theano_of_keras_2(path):
    """The same with the backend, which Keras 2 writes into its files."""
    write_theano(path)
    with h5py.File(path, "a") as file:
        file.attrs["backend"] = b"theano"


def write_theano_numbered(path):
    """As the first one, without names; layers without weights are numbered as well."""
    with h5py.File(path, "w") as file:
        for number, layer in enumerate(CONVOLUTIONS + CONNECTED):
            file.create_group(f"layer_{2 * number}")
            file[f"layer_{2 * number + 1}/param_0"] = flipped(layer)
            file[f"layer_{2 * number + 1}/param_1"] = biases(layer)


def write_flaxmodels(path):
    """Kernels as in Keras, but the inputs of fc6 in PyTorch's order."""
    with h5py.File(path, "w") as file:
        for layer in CONVOLUTIONS + CONNECTED:
            values = kernel(layer) if layer in CONVOLUTIONS else outputs_first(layer).T
            file[f"{layer}/weight"] = values
            file[f"{layer}/bias"] = biases(layer)


def write_npz(path, separator, kernel_of, save=np.savez_compressed):
    arrays = {}
    for layer in CONVOLUTIONS + CONNECTED:
        arrays |= {f"{layer}{separator}W": kernel_of(layer), f"{layer}{separator}b": biases(layer)}
    with path.open("wb") as file:
        save(file, **arrays)


def write_frossard(path):
    write_npz(path, "_", kernel, np.savez)


def write_chainer(path):
    write_npz(path, "/", outputs_first)


def write_tensorpack(path):
    write_npz(path, "/", kernel)


def write_lasagne(path, **others):
    """A file of Lasagne's model zoo, or with other contents beside the weights."""
    values = []
    for layer in CONVOLUTIONS + CONNECTED:
        values += [outputs_first(layer) if layer in CONVOLUTIONS else outputs_first(layer).T]
        values += [biases(layer)]
    mean = np.array([103.939, 116.779, 123.68], np.float32)
    words = [f"class {number}" for number in range(NUM_CLASSES)]
    others = others or {"mean value": mean, "synset words": words, "model type": "vgg16"}
    with path.open("wb") as file:
        pickle.dump({"param values": values, **others}, file, protocol=2)


def write_mxnet(path, names=None):
    """Names of a symbolic model, or others by layer."""
    arrays, labels = b"", b""
    for layer in CONVOLUTIONS + CONNECTED:
        name = names[layer] + "." if names else f"arg:{layer}_"
        for part, values in (("weight", outputs_first(layer)), ("bias", biases(layer))):
            arrays += struct.pack("<IiI", 0xF993FAC9, 0, values.ndim)
            arrays += struct.pack(f"<{values.ndim}q3i", *values.shape, 1, 0, 0) + values.tobytes()
            text = (name + part).encode()
            labels += struct.pack("<Q", len(text)) + text
    count = struct.pack("<Q", 2 * len(CONVOLUTIONS + CONNECTED))
    path.write_bytes(struct.pack("<QQ", 0x112, 0) + count + arrays + count + labels)


def write_gluon(path):
    names = torch_names()
    last = int(names[CONVOLUTIONS[-1]].partition(".")[2])
    connected = {"fc6": f"features.{last + 3}", "fc7": f"features.{last + 5}", "fc8": "output"}
    write_mxnet(path, names | connected)


class PaddleTensor:
    """Is pickled as the pair of its name and array."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def __reduce__(self):
        return tuple, ((self.name, self.values),)


def write_paddle(path, saved=lambda state: state):
    """``saved``: the object that is saved, from the state of the model."""
    state = {}
    for name, values in torch_state().items():
        state[name] = PaddleTensor(f"p_{len(state)}", values.T if values.ndim == 2 else values)
    table = {name: tensor.name for name, tensor in state.items()}
    with path.open("wb") as file:
        pickle.dump(saved(state | {"StructuredToParameterName@@": table}), file, protocol=4)


def machrisaa():
    return {layer: [kernel(layer), biases(layer)] for layer in CONVOLUTIONS + CONNECTED}


def write_machrisaa(path):
    with path.open("wb") as file:
        np.save(file, machrisaa())


def write_machrisaa_of_python_2(path):
    """A pickle of protocol 2, in which bytes are latin1 text."""
    with path.open("wb") as file:
        array = np.empty((), object)
        array[()] = machrisaa()
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=2)


def torch_names():
    """features: a ReLU after each convolution, a pooling after each block."""
    index, names = 0, {}
    for block in SMALL.convolutions:
        for layer, _ in block:
            names[layer] = f"features.{index}"
            index += 2
        index += 1
    return names | {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}


def torch_state():
    state = OrderedDict()
    for layer, name in torch_names().items():
        state |= {f"{name}.weight": outputs_first(layer), f"{name}.bias": biases(layer)}
    return state


def write_timm(path):
    state = {}
    renamed = {"fc6": "pre_logits.fc1", "fc7": "pre_logits.fc2", "fc8": "head.fc"}
    for layer, name in torch_names().items():
        name = renamed.get(layer, name)
        values = outputs_first(layer)
        if layer in ("fc6", "fc7"):
            values = np.ascontiguousarray(windowed(layer).transpose(3, 2, 0, 1))
        state |= {f"{name}.weight": values, f"{name}.bias": biases(layer)}
    safetensors.numpy.save_file(state, path)


def write_matconvnet(path, transposed=False, old=False):
    layers = np.empty(len(CONVOLUTIONS + CONNECTED) + 1, object)
    for number, layer in enumerate(CONVOLUTIONS + CONNECTED):
        values = kernel(layer) if layer in CONVOLUTIONS else windowed(layer)
        if transposed:
            values = values.transpose(1, 0, 2, 3)
        entry = {"name": layer, "type": "conv"}
        if old:
            entry |= {"filters": values, "biases": biases(layer)[None]}
        else:
            pair = np.empty(2, object)
            pair[:] = [values, biases(layer)[None]]
            entry["weights"] = pair
        layers[number] = entry
    layers[-1] = {"name": "prob", "type": "softmax"}
    scipy.io.savemat(
        path,
        {"layers": layers, "meta": {"a": 1}},
        do_compression=SMALL.fc < 4096,  # takes half a minute at full size
        appendmat=False,
    )


def varint(number):
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def write_caffe(path, v1=True):
    """Encodes the protocol buffer by hand."""
    net = field(1, b"VGG_ILSVRC_16_layers")
    for layer in CONVOLUTIONS + CONNECTED:
        blobs = b""
        for values in (outputs_first(layer), biases(layer)):
            shape = (1,) * (4 - values.ndim) + values.shape
            if v1:
                blob = b"".join(varint(n << 3) + varint(s) for n, s in enumerate(shape, 1))
            else:
                blob = field(7, field(1, b"".join(map(varint, values.shape))))
            blob += field(5, values.astype("<f4").tobytes())
            blobs += field(6 if v1 else 7, blob)
        if layer in CONVOLUTIONS:  # pad 1, kernel_size 3
            blobs += field(10 if v1 else 106, b"\x18\x01\x20\x03")
            blobs += b"\x28\x04" if v1 else field(2, b"Convolution")
        net += field(2 if v1 else 100, field(4 if v1 else 1, layer.encode()) + blobs)
    path.write_bytes(net)


def write_tfmodel(path):
    with tf.Graph().as_default() as graph:
        for layer in CONVOLUTIONS + CONNECTED:
            tf.constant(kernel(layer), name=f"{layer}/{'filter' if 'conv' in layer else 'weight'}")
            tf.constant(biases(layer), name=f"{layer}/bias")
        tf.constant(0.5, name="dropout/rate")
    path.write_bytes(graph.as_graph_def().SerializeToString())


def write_slim(path):
    """A V2 checkpoint with the variables of tf-slim's vgg_16."""
    with tf.Graph().as_default(), tf1.Session() as session:
        variables = []
        for layer in CONVOLUTIONS + CONNECTED:
            scope = f"vgg_16/{layer[:5]}/{layer}" if layer in CONVOLUTIONS else f"vgg_16/{layer}"
            values = kernel(layer) if layer in CONVOLUTIONS else windowed(layer)
            for part, value in (("weights", values), ("biases", biases(layer))):
                variables.append(tf1.Variable(value, name=f"{scope}/{part}", use_resource=False))
        variables.append(tf1.Variable([123.68, 116.78, 103.94], name="vgg_16/mean_rgb"))
        variables.append(tf1.Variable(0, name="global_step", dtype=tf.int64))
        session.run(tf1.variables_initializer(variables))
        tf1.train.Saver(variables).save(session, str(path), write_meta_graph=False)


def write_tf2_checkpoint(path):
    """A checkpoint with the variables of ``model.save_weights`` of Keras 2."""
    graph = TrackableObjectGraph()
    root = graph.nodes.add()
    names, values = [], []
    for number, layer in enumerate(CONVOLUTIONS + CONNECTED):
        name = f"layer_with_weights-{number}"
        root.children.add(node_id=len(graph.nodes), local_name=name)
        node = graph.nodes.add()
        for part, value in (("kernel", kernel(layer)), ("bias", biases(layer))):
            node.children.add(node_id=len(graph.nodes), local_name=part)
            names.append(f"{name}/{part}/.ATTRIBUTES/VARIABLE_VALUE")
            values.append(value)
            graph.nodes.add().attributes.add(name="VARIABLE_VALUE", checkpoint_key=names[-1])
    names.append("_CHECKPOINTABLE_OBJECT_GRAPH")
    values.append(tf.constant(graph.SerializeToString()))
    tf.raw_ops.SaveV2(
        prefix=str(path), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
    )


WRITERS = {
    "keras": (write_keras_legacy, "keras", "caffe"),
    "vgg-face": (
        write_vgg_face,
        "vgg-face",
        {"mean": [93.5940, 104.7624, 129.1863], "order": "BGR"},
    ),
    "deepface": (write_deepface, "keras", "caffe"),
    "theano": (write_theano, "keras", "caffe"),
    "theano, Keras 2": (write_theano_of_keras_2, "keras", "caffe"),
    "theano, numbered": (write_theano_numbered, "keras 1, Theano", "caffe"),
    "flaxmodels": (write_flaxmodels, "flaxmodels", "torch"),
    "frossard": (write_frossard, "frossard", "slim"),
    "chainer": (write_chainer, "chainer", "caffe"),
    "tensorpack": (write_tensorpack, "tensorpack", "caffe"),
    "lasagne": (write_lasagne, "lasagne", "caffe"),
    "paddle": (write_paddle, "paddle", "torch"),
    "mxnet": (write_mxnet, "mxnet", "slim"),
    "gluon": (write_gluon, "mxnet", "torch"),
    "machrisaa": (write_machrisaa, "machrisaa", "caffe"),
    "machrisaa, Python 2": (write_machrisaa_of_python_2, "machrisaa", "caffe"),
    "timm": (write_timm, "timm", "torch"),
    "matconvnet": (write_matconvnet, "matconvnet", "slim"),
    "caffe, V1": (write_caffe, "caffe", "caffe"),
    "caffe": (lambda path: write_caffe(path, v1=False), "caffe", "caffe"),
    "tfmodel": (write_tfmodel, "tfmodel", "caffe"),
    "slim": (write_slim, "tf-slim", "slim"),
    "TF2 checkpoint": (write_tf2_checkpoint, "keras", "caffe"),
}


def torch_pickle(state, storages, rebuild="_rebuild_tensor_v2"):
    """Pickle of a state dictionary in protocol 2, encoded by hand; tensors do not share storages.

    ``rebuild`` names the function that makes a tensor; with ``None`` its class does, as in PyTorch
    0.1.
    """
    out = io.BytesIO()

    def text(value):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def number(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    out.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, values) in enumerate(state.items()):
        storages[str(key)] = values
        strides = [int(np.prod(values.shape[i + 1 :])) for i in range(values.ndim)]
        out.write(text(name))
        maker = f"ctorch._utils\n{rebuild}\n" if rebuild else "ctorch\nFloatTensor\n)\x81"
        out.write(maker.encode().replace(b"\xc2\x81", b"\x81") + b"((")
        out.write(text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu"))
        out.write(number(values.size))
        out.write((b"" if rebuild else b"N") + b"tQ" + number(0) + numbers(values.shape))
        out.write(numbers(strides))
        if rebuild == "_rebuild_tensor_v2":
            out.write(b"\x89ccollections\nOrderedDict\n)R")
        out.write(b"tR" if rebuild else b"tb")
    out.write(b"u.")
    return out.getvalue()


def write_torch_zip(path, state=None):
    storages = {}
    data = torch_pickle(state or torch_state(), storages)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vgg16/data.pkl", data)
        archive.writestr("vgg16/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"vgg16/data/{key}", values.tobytes())


def write_torch_legacy(path, state=None, rebuild="_rebuild_tensor_v2"):
    storages = {}
    data = torch_pickle(state or torch_state(), storages, rebuild)
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, protocol=2)
        pickle.dump(1001, file, protocol=2)
        pickle.dump({"protocol_version": 1001, "little_endian": True}, file, protocol=2)
        file.write(data)
        pickle.dump(list(storages), file, protocol=2)
        for values in storages.values():
            file.write(struct.pack("<q", values.size) + values.tobytes())


def torch_norm_state(gap):
    """Convolutions with a batch norm ``gap`` places after each."""
    generator = np.random.default_rng(0)
    state, index = OrderedDict(), 0
    for block in SMALL.convolutions:
        for layer, width in block:
            state[f"features.{index}.weight"] = outputs_first(layer)
            state[f"features.{index}.bias"] = biases(layer)
            for part in ("weight", "bias", "running_mean", "running_var"):
                values = generator.uniform(0.5, 1.5, width).astype(np.float32)
                state[f"features.{index + gap}.{part}"] = values
            index += 3
        index += 1
    return state
