"""Reuse of cached activations between runs, and `vgg-transfer cache`."""

import json
import shutil

import numpy as np
import pytest
from commands import finetune, largest_difference, metrics
from conftest import make_image_folder

from recipes.cli import main
from transfer import Backbone, extract_features, load_meta_graph, open_source
from transfer.activations import entry
from transfer.activations import features as features_module
from transfer.activations.entry import Entry
from transfer.activations.extraction import EXTRACTION_BATCH
from transfer.activations.store import ActivationStore, CachePolicy, ExtractionRequest
from transfer.core.distribution import Replicas
from transfer.data.image_arrays import ImageArrays, source_of_arrays
from transfer.images.preprocess import Preprocess
from transfer.runs import run_folder
from transfer.runs.evaluation import evaluate_run

NUM_TRAINING, NUM_HELD_OUT = 64, 16  # two batches, and one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images") / "photos", 40)


@pytest.fixture
def own_folder(tmp_path):
    """The same images, for tests that change them."""
    return make_image_folder(tmp_path / "photos", 40)


@pytest.fixture
def run(tmp_path, model, folder):
    """Fine-tunes with a cache of the test; returns the model and the numbers of computed and cached
    images."""

    def run(name, *flags, folder=folder):
        out = tmp_path / name
        flags = ["--cache-dir", tmp_path / "cache", "--epochs", 2, *flags]
        assert finetune(out, model, folder, *flags) == 0
        found = metrics(out)["activations"]
        return out / "model", (found["computed"], found["found"])

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, folder):
    """A folder with a run, as ``run`` makes it without flags, and its cache."""
    place = tmp_path_factory.mktemp("finished")
    flags = ["--cache-dir", place / "cache", "--epochs", 2]
    assert finetune(place / "run", model, folder, *flags) == 0
    return place


@pytest.fixture
def first(finished, tmp_path):
    """The model of a run whose activations are in the cache of the test."""
    shutil.copytree(finished / "cache", tmp_path / "cache")
    return finished / "run" / "model"


def rows_file(tmp_path, cut, num_images):
    """The rows file of the entry with ``num_images`` images."""
    for key in (tmp_path / "cache").glob("*/key.json"):
        index = key.with_name("index-00000.bin")
        record = 20  # a 16-byte id and a CRC
        if json.loads(key.read_text())["cut"] == cut and (
            index.stat().st_size == num_images * record
        ):
            return key.with_name("rows-00000.bin")
    raise AssertionError(f"no entry of {num_images} images at {cut}")


def test_second_run_reuses_activations(run, capsys):
    first, counts = run("first")
    assert counts == (80, 0)
    assert "activations at fc7: 0 images found, 80 to compute" in capsys.readouterr().err
    second, counts = run("second")
    assert counts == (0, 80)
    assert largest_difference(first, second) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--learning-rate", 0.5],
        ["--hidden", 8, "--dropout", 0.5],
        ["--seed", 7],
        ["--optimizer", "sgd", "--batch-size", 16, "--label-smoothing", 0.1],
        ["--solver", "lbfgs"],
        ["--shots-per-class", 5],
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.usefixtures("first")
def test_run_with_other_training_options_reuses_activations(run, flags):
    _, (computed, _) = run("second", *flags)
    assert computed == 0


@pytest.mark.slow_variants
@pytest.mark.parametrize(
    "flags",
    [
        ["--preprocess", "tf"],
        ["--tap", "pool2"],
        ["--freeze-until", "pool1"],
        ["--cache-dtype", "float16"],
        ["--random-weights"],
        ["--augment", "--views", 1],
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.usefixtures("first")
def test_options_that_affect_activations_change_the_key(run, flags):
    _, (computed, _) = run("second", *flags)
    assert computed >= NUM_TRAINING


@pytest.mark.slow
def test_changed_image_is_recomputed(run, own_folder):
    run("first", folder=own_folder)
    changed, other, *_ = sorted(own_folder.rglob("*.jpg"))
    changed.write_bytes(other.read_bytes())
    _, (computed, found) = run("second", folder=own_folder)
    assert 1 <= computed <= 32  # the batch that it is in
    assert found == 80 - computed


@pytest.mark.slow
def test_interrupted_extraction_is_resumed(run, tmp_path, model, folder, finished, monkeypatch):
    append = Entry.append
    calls = []

    def interrupted(entry, ids, rows):
        if entry.folder.parent.name in ("fingerprints", "samples"):
            return append(entry, ids, rows)
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return append(entry, ids, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "append", interrupted)
        flags = ["--cache-dir", tmp_path / "cache", "--epochs", 2]
        assert finetune(tmp_path / "cut-short", model, folder, *flags) == 130
    assert calls == [NUM_HELD_OUT, 32, 32]
    resumed, counts = run("resumed")
    assert counts == (32, 48)
    assert largest_difference(finished / "run" / "model", resumed) == 0


@pytest.mark.slow
def test_damaged_rows_are_recomputed(run, first, tmp_path):
    rows = rows_file(tmp_path, "fc7", NUM_TRAINING)
    damaged = bytearray(rows.read_bytes())
    damaged[5] ^= 1
    rows.write_bytes(damaged)
    second, counts = run("second")
    assert counts == (32, 48)
    assert largest_difference(first, second) == 0
    rows.write_bytes(rows.read_bytes()[: len(damaged) // 2])  # cut off
    third, (computed, _) = run("third")
    assert computed > 0
    assert largest_difference(first, third) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rows", "index"])
def test_rows_damaged_after_the_start_are_recomputed(
    run, first, tmp_path, monkeypatch, capsys, part
):
    """Large rows are verified when they are read; the result is the same to the last bit."""
    monkeypatch.setattr(entry, "_VERIFIED_AT_START", 0)
    for num_images in (NUM_TRAINING, NUM_HELD_OUT):
        path = rows_file(tmp_path, "fc7", num_images)
        path = path.with_name(path.name.replace("rows", part))
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1  # of the row, or its checksum
        path.write_bytes(damaged)
    second, counts = run("second")
    assert counts == (0, 80)
    assert capsys.readouterr().err.count("1 of the activations at fc7 in ") == 2
    assert largest_difference(first, second) == 0
    third, counts = run("third")  # the rows were appended
    assert counts == (0, 80)
    assert "computing them again" not in capsys.readouterr().err
    assert largest_difference(first, third) == 0


def test_damaged_rows_of_vanished_images_are_an_error(
    own_image_folder, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(entry, "_VERIFIED_AT_START", 0)
    backbone = Backbone(load_meta_graph(model))
    split = open_source(image_folder=str(own_image_folder)).split("train")
    directory = tmp_path / "cache"
    features = extract_features(backbone, split, Preprocess("unit", 16), cache_dir=directory)
    (path,) = directory.glob("*/rows-00000.bin")
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(damaged)
    again = extract_features(backbone, split, Preprocess("unit", 16), cache_dir=directory)
    np.testing.assert_array_equal(again.values, features.values)
    for rows in directory.glob("*/rows-00001.bin"):
        rows.unlink()
    # An image of the same batch changes after its id was read.
    assert len(split.ids) == len(split)
    monkeypatch.setattr(features_module, "replace", lambda split: split)
    (own_image_folder / split.names[1]).write_bytes(b"no image")
    with pytest.raises(OSError, match="1 of the activations .* cannot be computed again: 1 image"):
        extract_features(backbone, split, Preprocess("unit", 16), cache_dir=directory)


def test_features_of_maps_that_do_not_fit_in_memory_are_pooled_as_they_come(
    model, image_folder, monkeypatch
):
    split = open_source(image_folder=str(image_folder)).split("train")
    backbone = Backbone(load_meta_graph(model), "pool1")
    expected = extract_features(backbone, split, Preprocess("unit", 16), cache="memory")
    monkeypatch.setattr("transfer.core.measurement.available_memory_mb", lambda: 0.001)
    found = extract_features(backbone, split, Preprocess("unit", 16), cache="memory")
    np.testing.assert_array_equal(found.values, expected.values)


@pytest.mark.slow
def test_all_cache_modes_give_the_same_head(run, finished):
    """Cached and uncached training see the same images in the same order."""
    disk = finished / "run" / "model"
    memory, _ = run("memory", "--cache", "memory")
    off, counts = run("off", "--cache", "off")
    assert counts == (0, 0)
    assert largest_difference(disk, memory) == 0
    assert largest_difference(disk, off) < 1e-5


@pytest.mark.slow
def test_float16_cache_has_half_the_size(run, tmp_path):
    single, _ = run("single", "--freeze-until", "pool1")
    half, _ = run("half", "--freeze-until", "pool1", "--cache-dtype", "float16")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*/rows*.bin"))
    # The held-out images are in float32, computed once, so that metrics are those of the model.
    assert sizes == [n * 8 * 8 * 8 * b for n, b in ((16, 4), (64, 2), (64, 4))]
    assert 0 < largest_difference(single, half) < 0.01
    recorded = run_folder.read_json(half.parent / "metrics.json")["eval"]
    found = evaluate_run(half.parent)
    assert {name: found[name] for name in ("accuracy", "loss")} == {
        name: recorded[name] for name in ("accuracy", "loss")
    }


@pytest.mark.slow
def test_fresh_augmentation_is_not_cached(run, finished):
    augmented, counts = run("augmented", "--augment")
    assert counts == (NUM_HELD_OUT, 0)  # held-out images are not augmented
    assert largest_difference(augmented, finished / "run" / "model") > 1e-4


@pytest.mark.slow
def test_views_are_cached(run):
    two, counts = run("two", "--views", 2)
    assert counts == (NUM_HELD_OUT + 2 * NUM_TRAINING, 0)
    again, counts = run("again", "--views", 2)
    assert counts == (0, NUM_HELD_OUT + 2 * NUM_TRAINING)
    assert largest_difference(two, again) == 0
    _, counts = run("three", "--views", 3)
    assert counts == (NUM_TRAINING, NUM_HELD_OUT + 2 * NUM_TRAINING)


@pytest.mark.slow
def test_small_cache_limit_falls_back_to_memory(run, tmp_path, capsys):
    _, counts = run("run", "--cache-limit", 1e-6)
    assert counts == (80, 0)
    assert "raise the limit" in capsys.readouterr().err
    assert list((tmp_path / "cache").glob("*/rows*.bin")) == []


@pytest.mark.slow
def test_least_recently_used_activations_are_evicted(run, tmp_path):
    run("old", "--freeze-until", "pool1")  # 512 floats an image
    run("new", "--cache-limit", 12e-6)  # 32 floats an image, 10 kB
    assert not any(
        json.loads(path.read_text())["cut"] == "pool1"
        for path in (tmp_path / "cache").glob("*/key.json")
        if any(rows.stat().st_size > 1e5 for rows in path.parent.glob("rows*.bin"))
    )


@pytest.mark.slow
@pytest.mark.usefixtures("first")
def test_cache_list_and_clear(run, tmp_path, capsys):
    directory = tmp_path / "cache"
    run("pool1", "--freeze-until", "pool1", "--label-smoothing", 0)
    capsys.readouterr()
    assert main(["cache", "list", "--cache-dir", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert "fingerprints of photos" in "".join(lines)
    assert "samples of photos" in "".join(lines)
    assert "64 images  " in "".join(lines)
    assert "pool1 of tiny, photos train" in "".join(lines)
    assert lines[-1].startswith("6 entries, ")

    assert main(["cache", "list", "--json", "--cache-dir", str(directory)]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert sorted(entry["num_rows"] for entry in entries) == [4, 16, 16, 64, 64, 80]
    digest = next(e["digest"] for e in entries if e["num_rows"] == 64 and e["key"]["cut"] == "fc7")
    assert main(["cache", "clear", digest[:8], "--cache-dir", str(directory)]) == 0
    assert capsys.readouterr().out.startswith("1 entries deleted")
    _, counts = run("again")
    assert counts == (64, 16)

    capsys.readouterr()
    clear = ["cache", "clear", "--cache-dir", str(directory)]
    assert main([*clear, "--older-than-days", "1"]) == 0
    assert capsys.readouterr().out.startswith("0 entries deleted")
    assert main([*clear, "nonsense"]) == 1
    assert "no entry 'nonsense'" in capsys.readouterr().err
    assert main(clear) == 0
    assert capsys.readouterr().out.startswith("6 entries deleted")
    assert list(directory.rglob("rows*.bin")) == []


@pytest.mark.slow
def test_unusable_cache_folder_falls_back_to_memory(run, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    _, counts = run("run")
    assert counts == (80, 0)
    assert "keeping the activations in memory instead" in capsys.readouterr().err


@pytest.mark.slow
def test_replaced_images_are_recomputed(run, own_folder):
    """The held-out images change with the images; activations of other images are never used."""
    first, _ = run("first", folder=own_folder)
    shutil.rmtree(own_folder / "red")
    make_image_folder(own_folder.parent / "other", 40)
    shutil.move(own_folder.parent / "other" / "red", own_folder / "red")
    second, (computed, _) = run("second", folder=own_folder)
    assert computed >= 40
    assert np.isfinite(largest_difference(first, second))


@pytest.mark.parametrize("role", ["training", "held-out"])
def test_workers_fill_one_entry_that_any_number_of_workers_reads(model, folder, tmp_path, role):
    backbone = Backbone(load_meta_graph(model))
    layer, _ = backbone.split(backbone.network.output)
    split = open_source(image_folder=str(folder)).split("train")  # two whole batches and a half

    def stored(policy, worker=0, num_workers=1):
        replicas = Replicas(worker=worker, num_workers=num_workers)
        store = ActivationStore(
            layer,
            Preprocess("unit", 16),
            cut="fc7",
            model="tiny",
            policy=policy,
            replicas=replicas,
        )
        here = replicas.examples_of_worker(len(split), EXTRACTION_BATCH)
        (rows,) = store.rows([ExtractionRequest(role, split, None, here)])
        return here, rows[:], (store.num_extracted, store.num_found)

    _, expected, _ = stored(CachePolicy("memory"))
    disk = CachePolicy(directory=tmp_path / "cache")
    for worker, count in enumerate((48, 32)):
        here, rows, counts = stored(disk, worker, 2)
        assert counts == (count, 0)
        np.testing.assert_array_equal(rows, expected[here])
    assert len(list((tmp_path / "cache").glob("*/key.json"))) == 1
    for num_workers in (1, 3):
        here, rows, counts = stored(disk, num_workers - 1, num_workers)
        assert counts == (0, here.sum())
        np.testing.assert_array_equal(rows, expected[here])


def test_missing_images_are_counted_before_they_are_computed(model, tmp_path):
    _, held_out = open_source("digits").train_and_eval_splits()
    few = held_out.where(np.arange(len(held_out)) < 40)
    requests = [ExtractionRequest("held-out", few, None), ExtractionRequest("training", few, None)]
    layer, _ = Backbone(load_meta_graph(model)).split("pool1")

    def store(policy):
        return ActivationStore(layer, Preprocess("none", 16), cut="pool1", model="", policy=policy)

    on_disk = store(CachePolicy(directory=tmp_path))
    assert on_disk.num_missing(requests) == 80
    assert not [*tmp_path.iterdir()]
    on_disk.rows(requests[:1])
    assert on_disk.num_missing(requests) == on_disk.num_extracted == 40
    assert store(CachePolicy("memory")).num_missing(requests) == 80
    (tmp_path / "file").touch()
    assert store(CachePolicy(directory=tmp_path / "file")).num_missing(requests) == 80


@pytest.mark.slow
def test_cached_random_view_is_that_of_the_name(model, tmp_path):
    """A view is seeded by the name, which for arrays is the position."""
    backbone = Backbone(load_meta_graph(model))
    layer, _ = backbone.split(backbone.network.output)
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), np.uint8)

    def rows(images, policy, view_seed):
        labels = np.zeros(len(images), np.int64)
        split = source_of_arrays(ImageArrays(images), labels, ["a", "b"], "arrays").split("train")
        preprocess = Preprocess("unit", 16)
        store = ActivationStore(layer, preprocess, cut="fc7", model="tiny", policy=policy)
        (values,) = store.rows([ExtractionRequest("training", split, view_seed)])
        return values[:], store.num_found

    disk, memory = CachePolicy(directory=tmp_path / "cache"), CachePolicy("memory")
    _, count = rows(images, disk, 3)
    assert count == 0
    reverse, count = rows(images[::-1], disk, 3)
    assert count == 0
    np.testing.assert_array_equal(reverse, rows(images[::-1], memory, 3)[0])
    again, count = rows(images[::-1], disk, 3)
    assert count == 6
    np.testing.assert_array_equal(again, reverse)


def test_preprocessing_of_a_subclass_is_not_cached_on_disk(model, image_folder, tmp_path):
    """The key has the settings of a ``Preprocess`` only."""

    class Inverted(Preprocess):
        def call(self, images):
            return 255.0 - super().call(images)

    backbone = Backbone(load_meta_graph(model), "pool2")
    split = open_source(image_folder=str(image_folder)).split("train")
    found = [
        extract_features(backbone, split, kind("unit", 16), cache="disk", cache_dir=tmp_path).values
        for kind in (Preprocess, Inverted)
    ]
    assert np.abs(found[0] - found[1]).max() > 0.01
