"""Published weights: files in every layout, written as by the original software, are read."""

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from published_files import (
    CONNECTED,
    CONVOLUTIONS,
    NUM_CLASSES,
    SMALL,
    VALUES,
    WRITERS,
    biases,
    kernel,
    torch_norm_state,
    torch_pickle,
    windowed,
    write_matconvnet,
    write_paddle,
    write_theano,
    write_theano_numbered,
    write_torch_legacy,
    write_torch_zip,
)

from transfer.vgg.published import containers, layouts, limits, matlab
from transfer.vgg.published.unpickle import UnsafePickleError

tf1 = tf.compat.v1


def assert_values(found):
    assert found.values.keys() == VALUES.keys()
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found.values[name], value, err_msg=name)
        assert found.values[name].dtype == np.float32


@pytest.mark.parametrize("writer, layout, preprocess", WRITERS.values(), ids=WRITERS)
def test_all_layouts_give_same_values(tmp_path, writer, layout, preprocess):
    path = tmp_path / "weights.of.no.telling.name"
    writer(path)
    names_no_backend = writer in (write_theano, write_theano_numbered)
    kernels = "flipped" if names_no_backend else "auto"
    found = layouts.identify(containers.read(path), kernels=kernels)
    assert_values(found)
    assert (found.layout.name, found.layout.preprocess) == (layout, preprocess)
    assert (found.name, found.num_classes) == ("vgg_small", NUM_CLASSES)
    assert found.architecture == SMALL


def test_paddle_state_in_a_checkpoint_is_read(tmp_path):
    write_paddle(tmp_path / "weights", lambda state: {"epoch": 1, "args": {"lr": 1}, "net": state})
    assert_values(layouts.identify(containers.read(tmp_path / "weights")))


def test_old_matconvnet_kernels_are_columns_first(tmp_path):
    write_matconvnet(tmp_path / "old", transposed=True, old=True)
    assert_values(layouts.identify(containers.read(tmp_path / "old")))
    write_matconvnet(tmp_path / "new", transposed=True)
    found = containers.read(tmp_path / "new")
    assert_values(layouts.identify(found, columns_first=True))


@pytest.mark.parametrize("writer", [write_torch_zip, write_torch_legacy])
def test_pytorch_files_are_read(tmp_path, writer):
    writer(tmp_path / "weights")
    found = layouts.identify(containers.read(tmp_path / "weights"))
    assert_values(found)
    assert (found.layout.name, found.layout.preprocess) == ("torchvision", "torch")


@pytest.mark.parametrize("rebuild", ["_rebuild_tensor", None])
def test_legacy_pytorch_tensors_are_read(tmp_path, rebuild):
    write_torch_legacy(tmp_path / "weights", rebuild=rebuild)
    assert_values(layouts.identify(containers.read(tmp_path / "weights")))


def test_batch_norm_is_folded(tmp_path):
    generator = np.random.default_rng(0)
    state = torch_norm_state(1)
    names = dict(zip(CONVOLUTIONS, [k for k in state if k.endswith("weight")][::2], strict=True))
    write_torch_zip(tmp_path / "bn", state)
    found = layouts.identify(containers.read(tmp_path / "bn"))
    assert found.num_classes is None
    x = generator.normal(size=(2, 6, 6, 24)).astype(np.float32)
    layer = "conv2_1"
    norm = names[layer].replace(".weight", "")
    norm = f"features.{int(norm.split('.')[1]) + 1}"
    net = tf.nn.conv2d(x, kernel(layer), 1, "SAME") + biases(layer)
    expected = tf.nn.batch_normalization(
        net, state[f"{norm}.running_mean"], state[f"{norm}.running_var"], state[f"{norm}.bias"],
        state[f"{norm}.weight"], 1e-5,
    )  # fmt: skip
    actual = tf.nn.conv2d(x, found.values[f"{layer}/weights"], 1, "SAME")
    actual += found.values[f"{layer}/biases"]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def batch_norm(x, mean, variance, beta, gamma, epsilon):
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def test_batch_norm_after_relu_of_pytorch_is_refused(tmp_path):
    write_torch_zip(tmp_path / "bn", torch_norm_state(1))
    layouts.identify(containers.read(tmp_path / "bn"))
    write_torch_zip(tmp_path / "bn", torch_norm_state(2))
    with pytest.raises(ValueError, match="batch norm features.2 does not directly follow .*0: "):
        layouts.identify(containers.read(tmp_path / "bn"))


@pytest.mark.parametrize("has_gamma", [True, False])
def test_batch_norm_of_slim_is_folded(tmp_path, has_gamma):
    generator = np.random.default_rng(0)
    norms = {}
    with tf.Graph().as_default(), tf1.Session() as session:
        variables = []
        for layer in CONVOLUTIONS + CONNECTED:
            scope = f"vgg_16/{layer[:5]}/{layer}" if layer in CONVOLUTIONS else f"vgg_16/{layer}"
            values = kernel(layer) if layer in CONVOLUTIONS else windowed(layer)
            variables.append(tf1.Variable(values, name=f"{scope}/weights", use_resource=False))
            if layer == "fc8":
                variables.append(
                    tf1.Variable(biases(layer), name=f"{scope}/biases", use_resource=False)
                )
                continue
            parts = ["beta", "moving_mean", "moving_variance"] + ["gamma"] * has_gamma
            norms[layer] = {}
            for part in parts:
                value = generator.uniform(0.5, 1.5, values.shape[-1]).astype(np.float32)
                norms[layer][part] = value
                name = f"{scope}/BatchNorm/{part}"
                variables.append(tf1.Variable(value, name=name, use_resource=False))
        session.run(tf1.variables_initializer(variables))
        tf1.train.Saver(variables).save(session, str(tmp_path / "bn"), write_meta_graph=False)
    found = layouts.identify(containers.read(tmp_path / "bn"))
    x = generator.normal(size=(2, 6, 6, 24)).astype(np.float32)
    norm = norms["conv2_1"]
    expected = batch_norm(
        tf.nn.conv2d(x, kernel("conv2_1"), 1, "SAME"), norm["moving_mean"],
        norm["moving_variance"], norm["beta"], norm.get("gamma", 1), 1e-3,
    )  # fmt: skip
    actual = tf.nn.conv2d(x, found.values["conv2_1/weights"], 1, "SAME")
    np.testing.assert_allclose(actual + found.values["conv2_1/biases"], expected, atol=1e-4)
    features = generator.normal(size=(2, SMALL.fc)).astype(np.float32)
    norm = norms["fc7"]
    expected = batch_norm(
        features @ kernel("fc7"), norm["moving_mean"], norm["moving_variance"], norm["beta"],
        norm.get("gamma", 1), 1e-3,
    )  # fmt: skip
    actual = features @ found.values["fc7/weights"] + found.values["fc7/biases"]
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_unrecognised_arrays_are_refused(tmp_path):
    arrays = {}
    for layer in CONVOLUTIONS + CONNECTED:
        arrays |= {f"{layer}_W": kernel(layer), f"{layer}_b": biases(layer)}
    np.savez(tmp_path / "a.npz", **arrays, norm1_1_scale=np.ones(24, np.float32))
    with pytest.raises(ValueError, match=r"norm1_1_scale \(24,\) belong to no layer of a VGG"):
        layouts.identify(containers.read(tmp_path / "a.npz"))
    found = layouts.identify(containers.read(tmp_path / "a.npz"), leave_out=["norm*"])
    assert_values(found)
    assert found.left_out == ["norm1_1_scale"]
    np.savez(
        tmp_path / "a.npz", **arrays, other_W=np.ones((512, 5), "f4"), other_b=np.ones(5, "f4")
    )
    found = layouts.identify(containers.read(tmp_path / "a.npz"))
    assert_values(found)
    assert found.left_out == ["other_W", "other_b"]


def test_matconvnet_mean_and_class_names_are_read(tmp_path):
    write_matconvnet(tmp_path / "plain")
    layers = scipy.io.loadmat(tmp_path / "plain", appendmat=False)["layers"]
    names = np.empty(NUM_CLASSES, object)
    names[:] = [f"Person {n}" for n in range(NUM_CLASSES)]
    mean = np.array([129.1863, 104.7624, 93.5940], np.float32)[None, None]
    meta = {"normalization": {"averageImage": mean}, "classes": {"description": names}}
    for content in (
        {"layers": layers, "meta": meta},
        {"net": {"layers": layers, "meta": meta}},
        {"layers": layers, **meta},
    ):
        scipy.io.savemat(tmp_path / "face.mat", content)
        found = layouts.identify(containers.read(tmp_path / "face.mat"))
        assert_values(found)
        np.testing.assert_allclose(found.preprocess["mean"], mean.ravel(), atol=1e-4)
        assert list(found.labels) == list(names)


def tower(levels=60):
    """Nested tuples, each of which contains the next one twice: exponential time to hash or
    print."""
    below = b"".join(b"q%c0h%ch%c\x86" % (n, n, n) for n in range(levels))
    return b")" + below


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}" + tower() + b"K\x01s.",
        b"\x80\x02}(" + tower() + b"K\x01u.",
        b"\x80\x02(" + tower() + b"K\x01d.",
        b"\x80\x04\x8f(" + tower() + b"\x90.",
        b"\x80\x04(" + tower() + b"\x91.",
    ],
    ids=["SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"],
)
def test_pickle_keys_with_slow_hash_are_refused(tmp_path, pickled):
    write_pickle(tmp_path / "a.npy", pickled)
    with pytest.raises(ValueError, match="has a tuple as a key"):
        containers.read(tmp_path / "a.npy")


def test_storage_key_with_slow_str_is_refused(tmp_path):
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        body = b"\x80\x02" + storage + tower() + b"X\x03\x00\x00\x00cpuK\x01tQ."
        archive.writestr("a/data.pkl", body)
    with pytest.raises(ValueError, match="a tuple instead of a string"):
        containers.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "name", ["torch\nFloatStorage", "torch\nFloatTensor", "collections\nOrderedDict"]
)
def test_pickle_cannot_change_stand_in_classes(tmp_path, name):
    body = b"\x80\x02c" + name.encode() + b"\n}S'code'\nS'<i4'\nsb."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", body)
    with pytest.raises(ValueError, match="sets the state of a"):
        containers.read(tmp_path / "a.pth")
    write_torch_zip(tmp_path / "weights")
    assert_values(layouts.identify(containers.read(tmp_path / "weights")))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "is damaged"),
        (b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b".", "is damaged"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**40), "is damaged"),
        (
            b"\x80\x02(X" + struct.pack("<I", 10**5) + b"a" * 10**5 + b"q\x000c_codecs\nencode\n"
            b"q\x010" + b"h\x01h\x00\x85R" * 1000 + b"t.",
            "encodes more bytes than the file has",
        ),
        (b"\x80\x02(" + b"N0" * 2 * 10**6 + b"t.", "operations"),
        (
            b"\x80\x02(" + b"K\x01N\x86" * 10**4 + b"lq\x000ccollections\nOrderedDict\nq\x010"
            b"(" + b"h\x01h\x00\x85R" * 1000 + b"t.",
            "operations",
        ),
        (
            b"\x80\x02(T" + struct.pack("<I", 10**5) + b"a" * 10**5 + b"q\x000"
            b"cnumpy\ndtype\nS'u1'\n\x85Rq\x010"
            + b"cnumpy\nndarray\n)\x81(NJ\xa0\x86\x01\x00\x85h\x01Nh\x00tb" * 100
            + b"t.",
            "more bytes than the file",
        ),
    ],
    ids=["bytearray", "bytes", "frame", "encode", "operations", "copies of lists", "of arrays"],
)
def test_pickle_memory_is_bounded_by_file_size(tmp_path, pickled, message):
    write_pickle(tmp_path / "a.npy", pickled)
    with pytest.raises(ValueError, match=message):
        containers.read(tmp_path / "a.npy")


@pytest.mark.parametrize("dimensions", [9, 4000, 20_000])
def test_arrays_with_too_many_dimensions_are_refused(tmp_path, dimensions):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * dimensions + b"), }\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(4)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("conv1_1_W.npy", data)
    with pytest.raises(ValueError, match=r"dimensions|too large|[Hh]eader"):
        containers.read(tmp_path / "a.npz")
    numbers = b"J\xff\xff\xff\x7f" * dimensions
    write_pickle(
        tmp_path / "a.npy",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01("
        + numbers + b"tcnumpy\ndtype\n(U\x02f4tR\x89U\x04abcdtb.",
    )  # fmt: skip
    with pytest.raises(ValueError, match="an array with an invalid shape"):
        containers.read(tmp_path / "a.npy")


def test_cyclic_hdf5_groups_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("a")
        for number in range(10):
            group[f"again{number}"] = group
    with pytest.raises(ValueError, match="under another name already"):
        containers.read(tmp_path / "a.h5")


def test_hdf5_arrays_without_stored_values_are_refused(tmp_path):
    for shape, message in (((10**12,), "would take over"), ((10**8,), "never written")):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("block1_conv1/kernel:0", shape, "f4", chunks=(10**6,))
        with pytest.raises(ValueError, match=message):
            containers.read(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("block1_conv1/kernel:0", (2 * 10**5,), "f4", chunks=(1,))[:1000] = 1
    with pytest.raises(ValueError, match="in 200,000 pieces"):
        containers.read(tmp_path / "a.h5")


def test_zip_directories_of_many_files_are_refused_in_zip64_as_well(tmp_path):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        for number in range(70_000):  # more than fit in a directory without ZIP64
            archive.writestr(f"{number:030d}", b"")
    data = bytearray((tmp_path / "a").read_bytes())
    data[-10:-6] = bytes(4)  # the size of the directory; that of ZIP64 counts
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="far more files than weights"):
        containers.read(tmp_path / "a")


def test_layers_between_others_are_refused_whatever_their_shape(tmp_path):
    arrays = {}
    for layer in CONVOLUTIONS + CONNECTED:
        arrays |= {f"{layer}_W": kernel(layer), f"{layer}_b": biases(layer)}
    np.savez(tmp_path / "a.npz", **arrays, prelu1_alpha=np.ones((1, 1, 64), "f4"))
    with pytest.raises(ValueError, match=r"prelu1_alpha \(1, 1, 64\) belong to no layer"):
        layouts.identify(containers.read(tmp_path / "a.npz"))
    scaled = {"fc9_W": np.ones((64, 64), "f4"), "fc9_scale": np.ones(64), "fc9_b": np.ones(64)}
    np.savez(tmp_path / "a.npz", **arrays, **scaled)
    with pytest.raises(ValueError, match=r"fc9_scale \(64,\).* belong to no layer"):
        layouts.identify(containers.read(tmp_path / "a.npz"))


def test_huge_sparse_safetensors_are_refused(tmp_path):
    count = 25 * 10**9
    entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    header = json.dumps({"features.0.weight": entry}).encode()
    with (tmp_path / "a").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    with pytest.raises(ValueError, match="would take over"):
        containers.read(tmp_path / "a")


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(kind, dims, content, name=b"net"):
    head = element(6, struct.pack("<II", kind, 0))
    return element(14, head + element(5, struct.pack("<2i", *dims)) + element(1, name) + content)


def test_matlab_sizes_beyond_the_file_are_refused(tmp_path):
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    nested = matrix(6, (1, 1), element(9, bytes(8)))
    for _ in range(20):
        nested = matrix(1, (1, 1), nested)
    packed = zlib.compress(nested)
    for content, message in (
        (nested, "nested over 12 deep"),
        (struct.pack("<II", 15, len(packed)) + packed, "nested over 12 deep"),
        (matrix(1, (2**31 - 1, 1), element(9, b"")), "2,147,483,647 elements in"),
        (
            matrix(2, (2**31 - 1, 1), element(5, struct.pack("<i", 1)) + element(1, b"a")),
            "2,147,483,647 elements in",
        ),
        (matrix(6, (2**20, 2**10), element(9, bytes(8))), r"\(1048576, 1024\) in 8 bytes"),
    ):
        (tmp_path / "a.mat").write_bytes(header + content)
        with pytest.raises(ValueError, match=message):
            containers.read(tmp_path / "a.mat")


@pytest.mark.slow
def test_empty_protobuf_fields_are_skipped_quickly(tmp_path):
    (tmp_path / "a.pb").write_bytes(b"\x0a\x00" * 10**6)
    with pytest.raises(ValueError, match="it is none of"):
        containers.read(tmp_path / "a.pb")
    (tmp_path / "a.caffemodel").write_bytes(b"\xa2\x06\x00" * 10**5)
    with pytest.raises(ValueError, match="has 100,000 layers"):
        containers.read(tmp_path / "a.caffemodel")


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/vgg-transfer-was-here",)


def test_pickle_payload_is_named_and_not_executed(tmp_path):
    np.save(tmp_path / "bad.npy", {"conv1_1": Payload()}, allow_pickle=True)
    with pytest.raises(ValueError, match="asks for posix.system, which is not data"):
        containers.read(tmp_path / "bad.npy")
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="asks for posix.system"):
        containers.read(tmp_path / "bad.pth")
    assert not os.path.exists("/tmp/vgg-transfer-was-here")
    assert issubclass(UnsafePickleError, ValueError)


def test_exponentially_nested_pickle_is_refused(tmp_path):
    laughs = []
    for _ in range(200):
        laughs = [laughs] * 10
    np.save(tmp_path / "a.npy", {"a": laughs}, allow_pickle=True)
    with pytest.raises(ValueError, match="holds over .* objects, or is nested"):
        containers.read(tmp_path / "a.npy")


def test_array_that_contains_itself_is_refused(tmp_path):
    array = np.empty((), object)
    array[()] = array
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="holds over .* objects"):
        containers.read(tmp_path / "a.npy")


def write_pickle(path, pickled):
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(np.empty((), object))
        np.lib.format.write_array_header_1_0(file, header)
        file.write(pickled)


def test_huge_memo_index_is_refused(tmp_path):
    write_pickle(tmp_path / "a.npy", b"\x80\x02]r" + struct.pack("<I", 2**26) + b".")
    with pytest.raises(ValueError, match="its memo index 67108864"):
        containers.read(tmp_path / "a.npy")


def test_pickle_list_in_place_of_string_is_refused(tmp_path):
    laugh = b"]" + b"".join(b"q%c(%s" % (n, b"h%c" % n * 10) for n in range(3)) + b"eee"
    write_pickle(tmp_path / "a.npy", b"\x80\x02c_codecs\nencode\n(" + laugh + b"tR.")
    with pytest.raises(ValueError, match="a list instead of a string|it is damaged"):
        containers.read(tmp_path / "a.npy")


def test_compressed_pytorch_bomb_is_not_decompressed(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    storages = {}
    data = torch_pickle({"features.0.weight": np.zeros((2**20, 1, 1, 1), np.float32)}, storages)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/data/0", storages["0"].tobytes())
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    for prefix in (b"", magic):
        (tmp_path / "bomb").write_bytes(prefix + archive.getvalue())
        with pytest.raises(ValueError, match="would take over|it is damaged"):
            containers.read(tmp_path / "bomb")


@pytest.mark.slow_variants
@pytest.mark.parametrize("writer", [*(w for w, _, _ in WRITERS.values()), write_torch_zip,
                                    write_torch_legacy])  # fmt: skip
def test_damaged_files_raise_value_error_only(tmp_path, writer):
    """Reading raises ``ValueError``, or succeeds if only a weight is damaged."""
    path = tmp_path / "weights"
    writer(path)
    if not path.exists():
        path = tmp_path / "weights.index"
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in [*range(0, 400, 40), *generator.integers(0, len(data), 8)]:
        damaged = bytearray(data)
        damaged[position % len(data)] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            containers.read(tmp_path / "weights")


def test_small_integers_count_as_float32(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", conv1_1_W=np.ones(300, np.uint8))
    assert containers.read(tmp_path / "a.npz").arrays["conv1_1_W"].dtype == np.uint8
    monkeypatch.setattr(limits, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="would take over 1,000 bytes"):
        containers.read(tmp_path / "a.npz")


def test_matlab_integers_are_not_expanded():
    """MATLAB writes a double array of whole numbers as bytes."""

    def element(kind, data):
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    double, dims = struct.pack("<II", 6, 0), struct.pack("<ii", 2, 3)
    array = element(6, double) + element(5, dims) + element(1, b"x") + element(2, bytes(range(6)))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    values = matlab.variables(memoryview(header + element(14, array)), 2**20)["x"]
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, [[0, 2, 4], [1, 3, 5]])


@pytest.mark.slow
def test_zip_bomb_is_not_decompressed(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(2100):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="would take over"):
        containers.read(tmp_path / "bomb")


def test_links_in_hdf5_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "target.h5", "w") as file:
        file["secret"] = np.ones(3)
    for link in (h5py.ExternalLink(tmp_path / "target.h5", "secret"), h5py.SoftLink("/x")):
        with h5py.File(tmp_path / "links.h5", "w") as file:
            file["block1_conv1"] = link
        with pytest.raises(ValueError, match="is a link to somewhere else"):
            containers.read(tmp_path / "links.h5")
    (tmp_path / "raw").write_bytes(bytes(400))
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset("w", (100,), "f4", external=[(str(tmp_path / "raw"), 0, 400)])
    with pytest.raises(ValueError, match="lies in another file"):
        containers.read(tmp_path / "raw.h5")


@pytest.mark.parametrize("writer", [*(w for w, _, _ in WRITERS.values()), write_torch_zip,
                                    write_torch_legacy])  # fmt: skip
def test_truncated_files_are_refused(tmp_path, writer):
    path = tmp_path / "weights"
    writer(path)
    if not path.exists():
        path = tmp_path / "weights.data-00000-of-00001"
    for share in (0.1, 0.5, 0.99):
        data = path.read_bytes()
        (tmp_path / "cut").mkdir(exist_ok=True)
        for other in tmp_path.glob("weights*"):
            (tmp_path / "cut" / other.name).write_bytes(other.read_bytes())
        (tmp_path / "cut" / path.name).write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError):
            layouts.identify(containers.read(tmp_path / "cut" / "weights"))


def test_other_networks_are_refused(tmp_path):
    arrays = {f"conv1_{n}_W": np.zeros((3, 3, 3, 8), np.float32) for n in (1, 2)}
    arrays |= {f"conv1_{n}_b": np.zeros(8, np.float32) for n in (1, 2)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"2 3x3 convolutions of widths \[8, 8\]; expected those"):
        layouts.identify(containers.read(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", resnet=np.zeros(3))
    with pytest.raises(ValueError, match="no known layout of a VGG has such names"):
        layouts.identify(containers.read(tmp_path / "b.npz"))
    np.save(tmp_path / "c.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"one array \(3, 4\); expected a dictionary"):
        containers.read(tmp_path / "c.npy")
    (tmp_path / "d").write_bytes(b"\0\1\2\3")
    with pytest.raises(ValueError, match="it is none of: Keras"):
        containers.read(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        containers.read(tmp_path / "e")


def test_non_finite_values_are_refused(tmp_path):
    arrays = {}
    for layer in CONVOLUTIONS + CONNECTED:
        arrays |= {f"{layer}_W": kernel(layer), f"{layer}_b": biases(layer) * np.nan}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="conv1_1/biases.* not finite"):
        layouts.identify(containers.read(tmp_path / "a.npz"))
