"""Images are added to a finished run whose head was solved for."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import make_image_folder
from PIL import Image

from recipes import finetune_request
from recipes.cli import main
from recipes.finetune_flags import FinetuneConfig
from transfer import Classifier, evaluate, fine_tune, grow, open_source, predict
from transfer.activations import store
from transfer.finetuning.grow import grown_request
from transfer.finetuning.options import FineTuneOptions
from transfer.runs import run_data, run_folder
from transfer.runs.growth import Growth


def add_class(folder, name="green", count=8, start=0):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = np.random.default_rng(number).integers(0, 60, (20, 20, 3)).astype(np.uint8)
        pixels[..., 1] += 150
        Image.fromarray(pixels).save(folder / name / f"g{number:02d}.png")
    return folder


def splits_of(folder):
    return open_source(image_folder=str(folder), min_classes=1).train_and_eval_splits()


def files_of(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_card, saved_vgg):
    """A run on photos of two classes, and a folder with a third one."""
    folder = tmp_path_factory.mktemp("grow")
    graph = saved_vgg(folder / "model" / "tiny", card=tiny_card)
    photos = make_image_folder(folder / "photos")
    add_class(folder / "more")
    fine_tune(graph, *splits_of(photos), run_dir=folder / "run", cache_dir=folder / "cache")
    return folder


@pytest.fixture(scope="module")
def grown(place):
    before, counts = files_of(place / "run"), Counter()
    with pytest.MonkeyPatch.context() as patch:
        compute = store.stream

        def counting(prefix, batches, **options):
            for rows, labels in compute(prefix, batches, **options):
                counts["computed"] += len(rows)
                yield rows, labels

        patch.setattr(store, "stream", counting)
        result = grow(
            place / "run",
            *splits_of(place / "more"),
            run_dir=place / "grown",
            cache_dir=place / "cache",
        )
    assert files_of(place / "run") == before  # the run is never changed
    return result, counts


def test_only_new_images_pass_through_the_network(grown):
    result, counts = grown
    assert counts["computed"] == 8
    assert result.metrics["activations"] == {"computed": 8, "found": 24}


def test_old_classes_come_first_and_their_held_out_images_stay(place, grown):
    result, _ = grown
    assert result.classifier.labels == ["blue", "red", "green"]
    held_out = (place / "run" / "held_out.txt").read_text().splitlines()
    assert (place / "grown" / "held_out.txt").read_text().splitlines()[: len(held_out)] == held_out
    trained = (place / "grown" / "training.txt").read_text().splitlines()
    assert trained[:20] == (place / "run" / "training.txt").read_text().splitlines()
    assert not {*trained} & {*held_out}
    assert {name.split("/")[0] for name in trained[20:]} == {"more"}


def test_metrics_say_how_old_and_new_classes_fare(place, grown):
    result, _ = grown
    old = json.loads((place / "run" / "metrics.json").read_text())
    growth = result.metrics["growth"]
    assert growth["images"] == {
        "kept": 20, "added": 6, "held_out_added": 2, "already_there": 0
    }  # fmt: skip
    assert growth["old_classes"]["num_examples"] == old["eval"]["num_examples"] == 4
    assert growth["old_classes"]["accuracy_before"] == old["eval"]["accuracy"]
    is_right = result.logits.argmax(-1) == run_data.joined_splits(result.run_dir)[1].labels
    assert growth["old_classes"]["accuracy_after"] == is_right[:4].mean()
    assert [entry["name"] for entry in growth["old_classes"]["classes"]] == ["blue", "red"]
    assert growth["new_classes"]["num_examples"] == 2
    assert growth["new_classes"]["accuracy"] == is_right[4:].mean()


@pytest.mark.slow
def test_grown_run_is_the_run_on_all_images(place, grown):
    """The head is the one of a run on both folders from the beginning."""
    result, _ = grown
    train, held_out = run_data.joined_splits(result.run_dir)
    anew = fine_tune(
        place / "model" / "tiny", train, held_out, run_dir=place / "anew", cache="memory"
    )
    assert np.abs(anew.logits - result.logits).max() < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_grown_run_is_evaluated_predicted_and_exported(place, grown):
    result, _ = grown
    assert main(["evaluate", str(result.run_dir)]) == 0
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    assert metrics["evaluation"]["accuracy"] == metrics["eval"]["accuracy"]
    assert metrics["evaluation"]["loss"] == metrics["eval"]["loss"]  # to the last bit
    _, held_out = run_data.open_data(result.run_dir).train_and_eval_splits()
    assert evaluate(result.classifier, held_out)["loss"] == metrics["eval"]["loss"]
    (answer,) = predict(result.classifier, [place / "more" / "green" / "g00.png"])
    assert answer.label == "green"
    assert main(["export", str(result.run_dir), "--format", "meta_graph"]) == 0


@pytest.mark.slow
def test_images_are_added_again(place, grown):
    result, _ = grown
    add_class(place / "third", "dark", start=20)
    again = grow(
        result.run_dir,
        *splits_of(place / "third"),
        run_dir=place / "again",
        cache_dir=place / "cache",
    )
    assert again.metrics["activations"] == {"computed": 8, "found": 32}
    assert again.classifier.labels == ["blue", "red", "green", "dark"]
    assert again.metrics["growth"]["old_classes"]["num_examples"] == 6
    train, held_out = run_data.joined_splits(again.run_dir)
    assert (len(train), len(held_out)) == (32, 8)


@pytest.mark.slow
def test_grown_run_is_calibrated(place, tmp_path):
    splits, out = splits_of(place / "more"), {"run_dir": tmp_path / "run"}
    cache = {"cache_dir": place / "cache"}
    whole = grow(place / "run", *splits, run_dir=tmp_path / "whole", calibrate=True, **cache)
    plain = grow(place / "run", *splits, **out, **cache)
    later = grow(place / "run", *splits, **out, calibrate=True, resume=True, **cache)
    assert "calibration" not in plain.metrics
    assert later.metrics["calibration"] == whole.metrics["calibration"]
    np.testing.assert_array_equal(later.logits, whole.logits)
    again = grow(later.run_dir, *splits_of(add_class(tmp_path / "third", "dark", start=40)),
                 run_dir=tmp_path / "again", **cache)  # fmt: skip
    assert "calibration" in again.metrics


@pytest.mark.slow
def test_folder_that_grew_adds_only_what_is_new(place, tmp_path):
    """The same folder with a new class and copies of old images under other names."""
    shutil.copytree(place / "photos", tmp_path / "photos")
    add_class(tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "red" / "00.jpg", tmp_path / "photos" / "red" / "copy.jpg")
    result = grow(
        place / "run", *splits_of(tmp_path / "photos"), run_dir=tmp_path / "run", cache="memory"
    )
    images = result.metrics["growth"]["images"]
    assert images["already_there"] == 25
    assert images["added"] + images["held_out_added"] == 8
    assert result.classifier.labels == ["blue", "red", "green"]
    held_out = (place / "run" / "held_out.txt").read_text().splitlines()
    trained = (tmp_path / "run" / "training.txt").read_text().splitlines()
    assert not {name.removeprefix("photos/") for name in trained} & {*held_out}


@pytest.mark.slow
def test_manifest_is_added_through_the_command(place, tmp_path, capsys):
    """``--config`` of the new run repeats it."""
    lines = [f"{path},green" for path in sorted((place / "more" / "green").iterdir())]
    (tmp_path / "more.csv").write_text("\n".join(["path,label", *lines, ""]))
    flags = ["finetune", "--add", place / "run", "--csv", tmp_path / "more.csv"]
    flags += ["--cache-dir", place / "cache", "--out"]
    assert main([*map(str, flags), str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("added 6 images to 20 training images")
    assert any(line.startswith("new classes: accuracy ") for line in lines)
    again = ["finetune", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again"]
    assert main([*map(str, again)]) == 0
    runs = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again")]
    assert runs[0]["eval"] == runs[1]["eval"]


def refusal(place, folder, tmp_path, run="run", **options):
    with pytest.raises((ValueError, OSError)) as error:
        grow(place / run, *splits_of(folder), run_dir=tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    return str(error.value)


@pytest.mark.slow
def test_conflicts_and_missing_images_are_refused(place, tmp_path):
    more = place / "more"
    assert "leave out preprocess=caffe (the run has unit)" in refusal(
        place, more, tmp_path, preprocess="caffe"
    )
    assert "leave out epochs=3" in refusal(place, more, tmp_path, epochs=3)
    assert "leave out solver=lbfgs (the run has ridge)" in refusal(
        place, more, tmp_path, solver="lbfgs"
    )
    assert "24 are already in it" in refusal(place, place / "photos", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        grow(tmp_path / "nothing", *splits_of(more))
    for name in ("run", "photos", "model"):
        shutil.copytree(place / name, tmp_path / name)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(place), str(tmp_path)))
    for path in (tmp_path / "photos" / "blue").iterdir():
        path.rename(path.with_suffix(".txt"))
    (tmp_path / "photos" / "red" / "05.png").rename(tmp_path / "gone.png")
    assert "13 of the 24 images of the run in" in refusal(tmp_path, more, tmp_path)
    shutil.rmtree(tmp_path / "photos" / "blue")
    shutil.copytree(place / "photos" / "blue", tmp_path / "photos" / "blue")
    shutil.copy(tmp_path / "photos" / "red" / "01.png", tmp_path / "photos" / "red" / "05.png")
    assert "are not those that provenance.json has hashes of" in refusal(tmp_path, more, tmp_path)
    shutil.rmtree(tmp_path / "photos")
    message = refusal(tmp_path, more, tmp_path)
    assert f"{str(tmp_path / 'photos')!r} does not exist; move them back, or put a link" in message
    config.write_text(config.read_text().replace("solver: ridge", "solver: gradient"))
    assert "repeat it with solver=ridge" in refusal(tmp_path, more, tmp_path)


def copy_as_bmp(place, role, folder, count):
    """The same pixels as of images of the run, in other files; returns their names without
    suffix."""
    names = (place / "run" / f"{role}.txt").read_text().splitlines()[:count]
    for name in names:
        target = (folder / name).with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(place / "photos" / name) as image:
            image.convert("RGB").save(target)
    return {name.partition(".")[0] for name in names}


def test_copies_are_on_the_side_of_the_images_of_the_run(place, tmp_path, caplog):
    held_out = copy_as_bmp(place, "held_out", tmp_path / "other", 4)
    trained = copy_as_bmp(place, "training", tmp_path / "other", 10)
    add_class(tmp_path / "other")
    splits = splits_of(tmp_path / "other")
    assert {name.partition(".")[0] for name in splits[0].names} & held_out
    assert {name.partition(".")[0] for name in splits[1].names} & trained
    with caplog.at_level("INFO"):
        request = grown_request(place / "run", *splits, FineTuneOptions(cache="off"))
    added = [name.removeprefix("other/").partition(".")[0] for name in request.train.names[20:]]
    added_held_out = {
        name.removeprefix("other/").partition(".")[0] for name in request.held_out.names[4:]
    }
    assert trained < {*added} and held_out < added_held_out
    assert len(added) + len(added_held_out) == 22
    assert request.growth.num_added == (len(added), len(added_held_out))
    assert "10 images of 'other' look like copies of training images of the run" in caplog.text
    assert "4 images of 'other' look like copies of images that the run held out" in caplog.text


def test_copies_of_held_out_images_alone_are_not_added(place, tmp_path):
    copy_as_bmp(place, "held_out", tmp_path / "other", 4)
    assert "0 are already in it, and 4 look like copies of images that it held out" in refusal(
        place, tmp_path / "other", tmp_path
    )


def test_groups_of_copies_are_moved_as_a_whole(place, tmp_path):
    copy_as_bmp(place, "held_out", tmp_path / "other", 1)
    (copied,) = (tmp_path / "other").glob("*/*.bmp")
    add_class(tmp_path / "other")
    rows = [f"{copied},red,a", *(f"{tmp_path}/other/green/g{n:02d}.png,green,a" for n in range(3))]
    rows += [f"{tmp_path}/other/green/g{n:02d}.png,green,b{n}" for n in range(3, 8)]
    (tmp_path / "more.csv").write_text("\n".join(["path,label,group", *rows, ""]))
    source = open_source(csv=str(tmp_path / "more.csv"))
    request = grown_request(
        place / "run", source.split("train[:8]"), source.split("train[8:]"),
        FineTuneOptions(cache="off"),
    )  # fmt: skip
    assert request.growth.num_added == (4, 5)


def test_images_like_both_sides_of_the_run_are_left_out(place, tmp_path, caplog):
    """A group with a copy of a training image and one of a held-out image."""
    copy_as_bmp(place, "held_out", tmp_path / "other", 1)
    copy_as_bmp(place, "training", tmp_path / "other", 1)
    add_class(tmp_path / "other")
    copies = sorted((tmp_path / "other").glob("*/*.bmp"))
    rows = [f"{path},{path.parent.name},a" for path in copies]
    rows += [f"{tmp_path}/other/green/g{n:02d}.png,green,b{n}" for n in range(8)]
    (tmp_path / "more.csv").write_text("\n".join(["path,label,group", *rows, ""]))
    source = open_source(csv=str(tmp_path / "more.csv"))
    splits = source.split("train[:8]"), source.split("train[8:]")
    request = grown_request(place / "run", *splits, FineTuneOptions(cache="off"))
    assert request.growth.num_added == (6, 2)
    assert "2 images of 'more' look like copies both of training images" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["red", "green"])
def test_one_image_is_added(place, tmp_path, capsys, name):
    add_class(tmp_path / "one", name, count=1, start=30)
    flags = ["finetune", "--add", place / "run", "--image-folder", tmp_path / "one"]
    assert main([*map(str, flags), "--cache", "off", "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert f"1 new images of '{name}' are trained on, and none is held out" in captured.err
    assert "added 1 images to 20 training images" in captured.out


@pytest.mark.slow
def test_images_that_are_gone_are_left_out(place, tmp_path, caplog):
    for name in ("run", "photos"):
        shutil.copytree(place / name, tmp_path / name)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "photos"), str(tmp_path / "photos")))
    for role in ("held_out", "training"):
        names = (tmp_path / "run" / f"{role}.txt").read_text().splitlines()
        (tmp_path / "photos" / names[0]).unlink()
    result = grow(
        tmp_path / "run", *splits_of(place / "more"), run_dir=tmp_path / "grown", cache="memory"
    )
    assert "2 of the 24 images of the run in" in caplog.text
    growth = result.metrics["growth"]
    assert growth["images"]["kept"] == 19
    assert growth["old_classes"]["num_examples"] == 3
    _, held_out = run_data.joined_splits(result.run_dir)
    before = evaluate(
        Classifier.load(tmp_path / "run"), run_data.members(tmp_path / "run", [])[0].held_out
    )
    assert growth["old_classes"]["accuracy_before"] == before["accuracy"]
    assert len(held_out) == 5


def test_placeholders_are_fed_as_in_the_run(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    with (tmp_path / "run" / "config.yaml").open("a") as config:
        config.write("feed:\n- keep_prob=1.0\nrename:\n- weights=kernel\n")
    request = grown_request(tmp_path / "run", *splits_of(place / "more"), FineTuneOptions())
    assert request.feeds == {"keep_prob": 1.0}
    assert request.origin["feed"] == ["keep_prob=1.0"]
    assert request.origin["rename"] == ["weights=kernel"]


@pytest.mark.parametrize(
    ("of_run", "added", "expected"),
    [
        ({"image_folder": "a", "group_by": r"p(\d)"}, {"image_folder": "b"}, r"p(\d)"),
        ({"image_folder": "a", "group_by": r"p(\d)"}, {"csv": "b.csv"}, None),
        ({"csv": "a.csv", "group_by": "patient"}, {"csv": "b.csv"}, "patient"),
        ({"csv": "a.csv", "group_by": "group"}, {"csv": "b.csv"}, None),  # if it has this column
        ({"csv": "a.csv", "group_by": "group"}, {"image_folder": "b"}, None),
        ({"csv": "a.csv", "group_by": "group"}, {"dataset": "digits"}, None),
        ({"csv": "a.csv", "group_by": "group"}, {"csv": "b.csv", "group_by": "eye"}, "eye"),
    ],
)
def test_groups_of_the_run_are_those_of_images_of_the_same_kind(
    tmp_path, monkeypatch, of_run, added, expected
):
    opened = []

    def open_images(config, **_):
        opened.append(config.group_by)
        raise InterruptedError

    monkeypatch.setattr(finetune_request, "_splits", open_images)
    (tmp_path / "config.yaml").write_text(run_folder.to_yaml({"solver": "ridge", **of_run}))
    with pytest.raises(InterruptedError):
        finetune_request.grown(FinetuneConfig(**added), tmp_path)
    assert opened == [expected]


def test_another_network_is_refused(place, tmp_path, tiny_card, saved_vgg):
    other = saved_vgg(tmp_path / "other" / "tiny", card=tiny_card, convolutional=True)
    assert "the network is not that of the run" in refusal(
        place, place / "more", tmp_path, graph=other
    )


@pytest.mark.slow
def test_runs_that_listed_no_training_images_are_added_to(place, tmp_path):
    """Runs of earlier versions, also with ``shots_per_class``: the images are drawn again."""
    fine_tune(
        place / "model" / "tiny",
        *splits_of(place / "photos"),
        run_dir=tmp_path / "run",
        shots_per_class=5,
        solver="ridge",
        cache_dir=place / "cache",
    )
    listed = (tmp_path / "run" / "training.txt").read_text().splitlines()
    (tmp_path / "run" / "training.txt").unlink()
    assert [*run_data.joined_splits(tmp_path / "run")[0].names] == listed
    result = grow(
        tmp_path / "run",
        *splits_of(place / "more"),
        run_dir=tmp_path / "grown",
        cache_dir=place / "cache",
    )
    assert result.metrics["growth"]["images"]["kept"] == 10


def test_comparison_counts_each_class_on_its_images(tmp_path):
    growth = Growth(tmp_path, ["a", "b"], [], num_held_out=4, num_added=(9, 3), num_known=0)
    labels = np.array([0, 0, 1, 1, 0, 2, 2])
    before = np.eye(2)[[0, 1, 1, 1, 0, 0, 0]]
    after = np.eye(4)[[0, 0, 2, 1, 1, 2, 0]]
    found = growth.compare(["a", "b", "c", "d"], labels, before, after)
    assert found["old_classes"] == {
        "num_examples": 4,
        "accuracy_before": 0.75,
        "accuracy_after": 0.75,
        "classes": [
            {"name": "a", "num_examples": 2, "recall_before": 0.5, "recall_after": 1.0},
            {"name": "b", "num_examples": 2, "recall_before": 1.0, "recall_after": 0.5},
        ],
    }
    assert found["new_classes"] == {
        "num_examples": 2,
        "accuracy": 0.5,
        "classes": [
            {"name": "c", "num_examples": 2, "recall": 0.5},
            {"name": "d", "num_examples": 0, "recall": None},
        ],
    }
