import pytest

from transfer import open_source
from transfer.data.joined import Member, join
from transfer.images.preprocess import Preprocess


@pytest.mark.parametrize("kind", ["folder", "csv", "tfds", "joined"])
def test_no_pipeline_is_tuned(kind, image_folder, digits_dir, tmp_path):
    """The end of an iteration would wait for the thread that tunes the pipeline."""
    if kind == "tfds":
        source = open_source("digits", data_dir=digits_dir)
    elif kind == "csv":
        files = sorted(image_folder.rglob("*.png"))
        rows = [f"{file},{file.parent.name}" for file in files]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
        source = open_source(csv=tmp_path / "labels.csv")
    else:
        source = open_source(image_folder=image_folder)
    train, held_out = source.train_and_eval_splits()
    if kind == "joined":
        members = [Member(name, train, held_out) for name in ("first", "second")]
        train, held_out = join(members, source.class_names)
    for split in (train, held_out):
        batches = split.batches(Preprocess("none", 8), 2, shuffle_seed=0, view_seed=0)
        assert batches.dataset().options().autotune.enabled is False
        assert split.encoded().options().autotune.enabled is False
