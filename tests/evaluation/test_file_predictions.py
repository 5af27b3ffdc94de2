"""``predict`` from Python equals ``vgg-transfer predict``."""

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.cli import main
from transfer import Classifier, Prediction, predict
from transfer.core.escapes import printable
from transfer.data.unreadable import UnreadableImageError
from transfer.evaluation import file_predictions
from transfer.images.decoding import read_tensor
from transfer.images.preprocess import Preprocess


@pytest.fixture(scope="module")
def run(copy_of_finished_run):
    return copy_of_finished_run


def test_predictions_equal_those_of_the_command_line(run, image_folder, tmp_path, capsys):
    capsys.readouterr()
    words = [str(image_folder), "--format", "jsonl", "--top-k", "2"]
    assert main(["predict", str(run), *words, "--explain", str(tmp_path / "a")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    classifier = Classifier.load(run)
    found = list(predict(classifier, image_folder, top_k=2, explain=tmp_path / "b"))
    assert len(found) == 24
    for prediction, line in zip(found, lines, strict=True):
        top = [(item["label"], item["probability"]) for item in line["predictions"]]
        assert prediction == Prediction(Path(line["image"]), *top[0], top)
        assert 0 <= prediction.probability <= 1
    pictures = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "ab"]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 24
    assert (tmp_path / "a" / pictures[0][0]).read_bytes() == (
        tmp_path / "b" / pictures[0][0]
    ).read_bytes()


def test_model_and_images_may_be_paths(run, image_folder):
    (run / "other.meta").write_bytes(b"of the user")
    paths = [str(image_folder / "red" / "00.jpg"), image_folder / "blue"]
    found = list(predict(str(run), paths))
    assert [prediction.path for prediction in found[:2]] == [
        image_folder / "red" / "00.jpg",
        image_folder / "blue" / "00.jpg",
    ]
    assert len(found) == 13
    assert found == list(predict(run / "model", paths))
    assert all(len(prediction.top) == 2 for prediction in found)  # there are no more classes
    (run / "other.meta").unlink()


def test_unreadable_image_raises_without_handler(run, own_image_folder):
    bad, gone = own_image_folder / "bad.jpg", own_image_folder / "gone.jpg"
    bad.write_bytes(b"no image")
    good = own_image_folder / "red" / "00.jpg"
    predictions = predict(run, [good, bad], batch_size=1)
    assert next(predictions).path == good
    with pytest.raises(UnreadableImageError, match="bad.jpg.*it is not an image"):
        next(predictions)
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        list(predict(run, gone))
    failed = {}
    found = list(predict(run, [gone, good, bad], on_unreadable=failed.__setitem__))
    assert [prediction.path for prediction in found] == [good]
    assert failed.keys() == {gone, bad}
    assert isinstance(failed[gone], FileNotFoundError)


def test_ignored_files_are_logged(run, own_image_folder, caplog):
    (own_image_folder / "red" / "notes.txt").write_text("mine")
    with caplog.at_level("WARNING", "transfer"):
        assert len(list(predict(run, own_image_folder))) == 24
    assert "1 of 25 files ignored" in caplog.text


def test_folder_without_images_is_named(run, image_folder, tmp_path, caplog):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    photo = next(image_folder.rglob("*.png"))
    assert len([*predict(run, [tmp_path / "empty", photo])]) == 1
    assert f"no images in the folder '{tmp_path / 'empty'}'" in caplog.text


def test_paths_are_consumed_lazily(run, image_folder):
    def paths():
        for number in range(100):
            asked.append(number)
            yield image_folder / "red" / "00.jpg"

    asked = []
    assert len(list(islice(predict(run, paths(), batch_size=4), 4))) == 4
    assert len(asked) == 8


def test_invalid_counts_and_models_are_refused_immediately(run, tmp_path):
    with pytest.raises(ValueError, match="top k must be at least 1, got 0"):
        predict(run, [], top_k=0)
    with pytest.raises(ValueError, match="batch size must be at least 1"):
        predict(run, [], batch_size=0)
    with pytest.raises(FileNotFoundError):
        predict(tmp_path / "nothing", [])


def test_ties_are_in_label_order():
    found = file_predictions.most_probable(np.array([0.2, 0.4, 0.4]), ["a", "b", "c"], 2)
    assert [label for label, _ in found] == ["b", "c"]


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16 there")
def test_file_names_need_not_be_utf8(run, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(path)
    (found,) = predict(run, path)
    assert found.path == path
    line = file_predictions.as_json(printable(path), found.top)
    assert json.loads(line)["image"].endswith("caf\\udce9.png")


@pytest.mark.parametrize("channels, more", [(1, 2.5), (3, 0.5)])
def test_resizing_a_large_image_makes_no_float_copy(tmp_path, channels, more):
    """A float copy would take four times the memory; gray needs a third, twice, and some strips."""
    side = 6000
    Image.new("RGB", (side, side), (9, 90, 200)).save(tmp_path / "large.png")
    data = (tmp_path / "large.png").read_bytes()
    prepare = file_predictions.prepare_images(Preprocess("tf", 32, channels))
    prepare(np.zeros((9, 9, 3), np.uint8))
    image = read_tensor(data)
    before = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    except OSError:
        pytest.skip("the system does not tell")
    prepare(image)
    assert resident("VmHWM") - before < more * 3 * side**2


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
