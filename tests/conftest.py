"""Fixtures: small networks and images, without downloads.

Real datasets and meta graphs are used from ``../shared`` if that folder exists; otherwise, tests
that need them are skipped.
"""

from __future__ import annotations

import ctypes.util
import functools
import gc
import hashlib
import logging
import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as on the command line

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from dead_workers import pytest_configure  # noqa: F401
from PIL import Image

from transfer import Card, save_meta_graph
from transfer.vgg import architectures

tf1 = tf.compat.v1

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = architectures.Architecture(blocks=((8,), (8, 16)), fc=32, image_size=16)
NUM_CLASSES = 10
VARIANTS = {
    "dense-reference": {"convolutional": False, "use_resource": False},
    "dense-resource": {"convolutional": False, "use_resource": True},
    "conv-reference": {"convolutional": True, "use_resource": False},
    "conv-resource": {"convolutional": True, "use_resource": True},
}


def save_vgg(
    prefix: Path,
    architecture: architectures.Architecture = TINY,
    *,
    convolutional: bool = False,
    use_resource: bool = False,
    num_classes: int = NUM_CLASSES,
    card: Card | None = None,
) -> Path:
    graph = architectures.build_graph(
        architecture, num_classes, convolutional=convolutional, use_resource=use_resource
    )
    values = architectures.random_weights(architecture, num_classes, convolutional=convolutional)
    save_meta_graph(graph, prefix, values, card)
    return prefix


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow parameter sets, and run files with many slow tests first, to balance the
    workers."""
    seen = set()
    for item in items:
        if item.get_closest_marker("slow_variants"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("slow")
            seen.add(test)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("-m") == "not slow":  # xdist does not count them
        terminalreporter.write_line("Slow tests were left out; `make test-all` runs them.")


def pytest_collection_finish() -> None:
    """Freeze imported objects: traversing them is most of ``keras.backend.clear_session``."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use an empty activation cache: activations of an earlier session would hide errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _log_of_the_library() -> Iterator[None]:
    """Undo what the command line does to the library's logger, which would hide its messages from
    ``caplog`` in later tests."""
    logger = logging.getLogger("transfer")
    yield
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def saved_vgg(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``save_vgg`` that copies the files of an equal network if one was saved before."""
    folder = tmp_path_factory.mktemp("networks")

    def saved(prefix: Path, **options: Any) -> Path:
        chosen = repr((prefix.name, sorted(options.items())))
        key = hashlib.sha256(chosen.encode()).hexdigest()
        if not (folder / key).is_dir():
            save_vgg(folder / key / prefix.name, **options)
        shutil.copytree(folder / key, prefix.parent, dirs_exist_ok=True)
        return prefix

    return saved


@pytest.fixture(params=VARIANTS)
def tiny_vgg(request: pytest.FixtureRequest, tmp_path: Path, saved_vgg: Callable) -> Path:
    """Checkpoint prefix of a small VGG with random weights, for both kinds of fc layers and
    variables."""
    return saved_vgg(tmp_path / "vgg" / "tiny", **VARIANTS[request.param])


@pytest.fixture(scope="session")
def tiny_card() -> Card:
    return Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``model`` and ``image_folder``, which all tests share: what a run has computed from
    them, later runs find in the caches."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(autouse=True)
def _shared_files_are_only_read(
    request: pytest.FixtureRequest, shared_folder: Path
) -> Iterator[None]:
    """A change would affect the tests that follow."""

    def states() -> dict[Path, tuple[int, int]]:
        found = {path: path.lstat() for path in shared_folder.rglob("*")}
        return {path: (state.st_mtime_ns, state.st_size) for path, state in found.items()}

    if not {"model", "image_folder"} & {*request.fixturenames}:
        yield
        return
    before = states()
    yield
    assert before.items() <= states().items(), "use own_model or own_image_folder"


@pytest.fixture(scope="session")
def model(shared_folder: Path, tiny_card: Card, saved_vgg: Callable) -> Path:
    """Checkpoint prefix of a small VGG with a card, as the commands need it, to be read only."""
    return saved_vgg(shared_folder / "model" / "tiny", card=tiny_card)


@pytest.fixture
def own_model(tmp_path: Path, tiny_card: Card, saved_vgg: Callable) -> Path:
    """The same network, for tests that change its files."""
    return saved_vgg(tmp_path / "model" / "tiny", card=tiny_card)


@pytest.fixture(scope="session")
def run_of(
    tmp_path_factory: pytest.TempPathFactory, model: Path, image_folder: Path
) -> Callable[..., Path]:
    """Folder of a finished run of ``model`` on ``image_folder`` with the given flags, made once;
    tests that write to it copy it."""
    from commands import finetune

    @functools.cache
    def run(*flags: Any) -> Path:
        out = tmp_path_factory.mktemp("finished") / "run"
        assert finetune(out, model, image_folder, *flags) == 0
        return out

    return run


@pytest.fixture(scope="session")
def finished_run(run_of: Callable[..., Path]) -> Path:
    """Folder of a finished run on ``image_folder``, for tests that only read it."""
    return run_of()


@pytest.fixture(scope="module")
def copy_of_finished_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, for the tests of a module that write to it."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """``evaluate`` without its page, whose plots take most of the time."""
    monkeypatch.setattr("transfer.evaluation.report.write", lambda *_: None)


def make_run(folder: Path, *flags: Any, preprocess: str = "unit") -> tuple[Path, Path, Path]:
    """Fine-tune a small VGG on images made in a folder; its model, photos and run folder."""
    from commands import finetune

    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess=preprocess)
    model = save_vgg(folder / "model" / "tiny", card=card)
    photos = make_image_folder(folder / "photos")
    assert finetune(folder / "run", model, photos, *flags) == 0
    return model, photos, folder / "run"


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).random((5, 16, 16, 3), np.float32)


def graph_def_of(build) -> tf1.GraphDef:
    graph = tf.Graph()
    with graph.as_default():
        build()
    return graph.as_graph_def(add_shapes=True)


def branched() -> None:
    x = tf1.placeholder(tf.float32, [None, 4], name="x")
    a = tf.nn.relu(x, name="a")
    b = tf.tanh(a, name="b")
    tf.add(b, a, name="tap")
    tf.sigmoid(b, name="aside")


class StockSession:
    """A stock TF1 program: ``import_meta_graph``, ``Saver.restore``, ``Session.run``."""

    def __init__(self, prefix: Path):
        self.graph = tf.Graph()
        with self.graph.as_default():
            saver = tf1.train.import_meta_graph(f"{prefix}.meta")
            self.session = tf1.Session(graph=self.graph)
            saver.restore(self.session, str(prefix))

    def run(self, fetches: Any, feeds: dict[str, Any] | None = None) -> Any:
        return self.session.run(fetches, feeds)


@pytest.fixture
def stock_session() -> Callable[[Path], StockSession]:
    return StockSession


def make_image_folder(root: Path, images_per_class: int = 12, size: int = 20) -> Path:
    """Images of two classes that differ by colour, in all common image formats."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(images_per_class):
            pixels = generator.integers(0, 80, (size, size + number, 3)).astype(np.uint8)
            pixels[..., 0 if label else 2] += 150
            image = Image.fromarray(pixels)
            suffix = ".png" if number % 2 else ".jpg"
            (image.convert("RGBA") if number % 4 == 1 else image).save(
                folder / f"{number:02d}{suffix}"
            )
    return root


@pytest.fixture(scope="session")
def image_folder(shared_folder: Path) -> Path:
    """Images of two classes, to be read only."""
    return make_image_folder(shared_folder / "photos")


@pytest.fixture
def own_image_folder(tmp_path: Path) -> Path:
    """The same images, for tests that change them."""
    return make_image_folder(tmp_path / "photos")


@pytest.fixture
def smooth_folder(tmp_path: Path) -> Path:
    """60 images of two classes with similar neighbouring pixels, as in photos."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "smooth" / name).mkdir(parents=True)
        for number in range(30):
            pixels = generator.integers(0, 255, (5, 6, 3)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC)
            image.save(tmp_path / "smooth" / name / f"{number:02d}.png")
    return tmp_path / "smooth"


@pytest.fixture
def splits(smooth_folder: Path) -> tuple[Any, Any]:
    """Training and held-out images of ``smooth_folder``, half of which a head gets wrong."""
    from transfer.data.sources import open_source

    return open_source(image_folder=str(smooth_folder)).train_and_eval_splits()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tfds data directory with the embedded digits, prepared once."""
    from transfer.data.sources import open_source

    directory = tmp_path_factory.mktemp("tfds")
    open_source("digits", data_dir=str(directory))
    return directory


@pytest.fixture
def shared_tfds() -> str:
    if not (SHARED / "tfds").is_dir():
        pytest.skip("needs prepared datasets in ../shared/tfds")
    return str(SHARED / "tfds")


@pytest.fixture
def shared_wild() -> Path:
    if not (SHARED / "wild").is_dir():
        pytest.skip("needs meta graphs in ../shared/wild")
    return SHARED / "wild"


@pytest.fixture(scope="session")
def shared_vgg16() -> Path:
    path = SHARED / "weights" / "vgg16_imagenet_notop.h5"
    if not path.is_file():
        pytest.skip("needs the convolutions of VGG16 in ../shared/weights")
    return path


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The differences that conversions to Keras layers found, in order."""
    from transfer.layers.native import checking, conversion

    found: list[Any] = []
    compare = checking.compare
    monkeypatch.setattr(conversion, "compare", lambda *args: found.append(compare(*args)))
    return found


@pytest.fixture
def memory_is_returned() -> Iterator[None]:
    """Returns freed memory to the system after a test with large networks: glibc keeps it, and two
    processes with several gigabytes each do not fit into small machines."""
    yield
    keras.backend.clear_session()
    gc.collect()
    if library := ctypes.util.find_library("c"):
        trim = getattr(ctypes.CDLL(library), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
