from __future__ import annotations

import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from transfer import open_source
from transfer.data.dataset import EVAL_SPLITS, TRAIN_SPLITS, Source, train_and_eval_splits
from transfer.data.manifest_table import read_table
from transfer.images.preprocess import Preprocess

COLUMNS = {"path", "label", "split", "group"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def opened(
    folder: Path, content: str | bytes, name: str = "labels.csv", **arguments: Any
) -> Source:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return open_source(csv=str(folder / name), **arguments)


def rows(source: Source, split: str = "train") -> list[tuple[str, str]]:
    labels = source.labels(split).tolist()
    return [(n, source.class_names[i]) for n, i in zip(source.names(split), labels, strict=True)]


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


ROWS = [("a.jpg", "rose"), ("b.jpg", "tulip, red"), ("sub/c.jpg", "rose")]
CSV = 'path,label\na.jpg,rose\nb.jpg,"tulip, red"\nsub/c.jpg,rose\n'


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "plain": ("x.csv", CSV),
        "byte order mark": ("x.csv", "\ufeff" + CSV),
        "CRLF": ("x.csv", CSV.replace("\n", "\r\n")),
        "CR": ("x.csv", CSV.replace("\n", "\r")),
        "blank lines": ("x.csv", "\n\n" + CSV.replace("\n", "\n\n")),
        "no line break at the end": ("x.csv", CSV.strip()),
        "spaces": ("x.csv", CSV.replace(",label", ", label ").replace(",rose", ", rose ")),
        "semicolons": ("x.csv", "path;label\na.jpg;rose\nb.jpg;tulip, red\nsub/c.jpg;rose\n"),
        "tabs": ("x.tsv", "label\tpath\nrose\ta.jpg\ntulip, red\tb.jpg\nrose\tsub/c.jpg\n"),
        "dots and slashes": ("x.csv", CSV.replace("a.jpg", "./a.jpg").replace("sub/", "./sub//./")),
        "JSONL": (
            "x.jsonl",
            '{"path": "a.jpg", "label": "rose"}\n\n{"label": "tulip, red", "path": "b.jpg"}\n'
            '{"path": "sub/c.jpg", "label": "rose", "more": [1, {}]}',
        ),
        "Parquet": (
            "x.parquet",
            parquet(path=[path for path, _ in ROWS], label=[label for _, label in ROWS]),
        ),
        "Parquet with categories": (
            "x.parquet",
            parquet(
                path=pa.array([path for path, _ in ROWS]).dictionary_encode(),
                label=pa.array([label for _, label in ROWS]).dictionary_encode(),
            ),
        ),
    }.values(),
)
def test_formats_have_the_same_rows(folder: Path, name: str, content: str | bytes) -> None:
    source = opened(folder, content, name)
    assert rows(source) == ROWS
    assert source.class_names == ["rose", "tulip, red"] and source.name == "x"


def test_absolute_paths_and_file_urls_are_local_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    text = f"path,label\n{folder}/a.jpg,x\nfile://{folder}/b.jpg,y\n../sub/c.jpg,y\n"
    source = opened(folder / "other", text)
    assert [*source.names("train")] == [f"{folder}/a.jpg", f"{folder}/b.jpg", "../sub/c.jpg"]
    images = [example["image"] for example in source.split("train").encoded().as_numpy_iterator()]
    assert images == [b"a.jpg", b"b.jpg", b"sub/c.jpg"]
    # Below the folder of the manifest, names are relative, as in an image folder.
    inside = opened(folder, text.replace("../", ""))
    assert [*inside.names("train")] == ["a.jpg", "b.jpg", "sub/c.jpg"]


def test_integers_are_classes_in_numeric_order(folder: Path) -> None:
    text = "path,label\na.jpg,10\nb.jpg,9\nsub/c.jpg,100\n"
    assert opened(folder, text).class_names == ["9", "10", "100"]
    data = parquet(path=["a.jpg", "b.jpg"], label=pa.array([10.0, 9.0]))
    assert opened(folder, data, "x.parquet").class_names == ["9", "10"]
    assert opened(folder, text.replace("100", "x")).class_names == ["10", "9", "x"]
    mixed = opened(folder, text.replace("100", "9.0"))
    assert mixed.class_names == ["9", "10"]
    assert mixed.labels("train").tolist() == [1, 0, 0]
    # As in runs of earlier versions:
    assert opened(folder, text.replace("0\n", "0.0\n").replace("9", "9.0")).class_names == [
        *("10.0", "100.0", "9.0"),
    ]


def test_splits_and_groups(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "path,label,split,group\na.jpg,x,train,p\nb.jpg,y,test,\nsub/c.jpg,y,train,q\n"
    source = opened(folder, text + "sub/d.jpg,x,test,p\n")
    assert source.sizes == {"train": 2, "test": 2}
    assert source.groups is not None
    a, c = source.groups("train").tolist()
    b, d = source.groups("test").tolist()
    assert a == d and len({a, b, c}) == 3
    assert source.origin["group_by"] == "group"
    assert "1 of 4 rows have no 'group' (line 3)" in caplog.text
    train, held_out = source.train_and_eval_splits()
    assert train.groups.tolist() == [a, c] and held_out.groups.tolist() == [b, d]


def test_spaces_around_groups_and_repeated_rows_without_one_do_not_matter(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "path,label,group\na.jpg,x, p\nb.jpg,y,\nb.jpg,y,\nsub/c.jpg,y,p \n"
    source = opened(folder, text)
    assert source.groups is not None and source.groups("train").tolist() == [0, 1, 0]


def test_groups_from_a_named_column(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "path,label,patient,age\na.jpg,x,7,1\nb.jpg,y,8,2\nsub/c.jpg,y,7,3\n"
    assert opened(folder, text).groups is None
    assert "columns of the manifest that are not used: 'patient', 'age'" in caplog.text
    source = opened(folder, text, group_by="patient")
    assert source.groups is not None and source.groups("train").tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    {
        "empty": ("", "no column 'path' and no column 'label'; .* found none"),
        "no header": ("a.jpg,rose\nb.jpg,x\n", "expected a first line path,label.*'a.jpg', 'rose'"),
        "one column": ("path\na.jpg\n", "no column 'label'"),
        "header only": ("path,label\n", "lists no images"),
        "column twice": ("path,label,path\na.jpg,x,b.jpg\n", "names a column twice: 'path'"),
        "unquoted comma": (
            CSV.replace('"', ""),
            "has 2 cells, but 1 others .* .line 3 has",
        ),
        "not closed": ('path,label\na.jpg,"x\nb.jpg,y\n', "1 label has a line break .line 2"),
        "Latin-1": ("path,label\na.jpg,Gänse\n".encode("latin-1"), "not UTF-8 text .line 2.*UTF-8"),
        "UTF-16": (CSV.encode("utf-16"), "not a UTF-8 text file"),
        "image": (b"\xff\xd8\xff\xe0\0\x10JFIF", "not a UTF-8 text file"),
        "missing": (
            "path,label\na.jpg,x\n\nz.jpg,y\nno/b.jpg,y\n",
            "2 files do not exist .line 4",
        ),
        "no label": ("path,label\na.jpg, \nb.jpg,y\n", "1 row has no label .line 2"),
        "no path": ("path,label\n,x\nb.jpg,y\n", "1 path is empty or has a line break .line 2"),
        "split": (
            "path,label,split\na.jpg,x,tset\n",
            "split .line 2 'tset'; expected train,",
        ),
        "negative": ("path,label\na.jpg,-1\nb.jpg,0\n", "1 label is negative .line 2 '-1'"),
        "01 and 1": ("path,label\na.jpg,01\nb.jpg,1\n", "also written otherwise"),
        "two labels": (
            "path,label\na.jpg,x\nb.jpg,y\n./a.jpg,y\n",
            "another label .line 2 'a.jpg' 'x', line 4 './a.jpg' 'y'",
        ),
        "two splits": (
            "path,label,split\na.jpg,x,train\nb.jpg,y,train\na.jpg,x,test\n",
            "2 rows list the same paths with another split",
        ),
        "one class": ("path,label\na.jpg,x\nb.jpg,x\n", "has 1 class"),
        "store": (
            "path,label\nfoo://a.jpg,x\nb.jpg,y\n",
            "URL of no known store .line 2 'foo",
        ),
        "chain": (
            "path,label\nsimplecache::memory://a,x\nmemory://x::memory://b,y\n",
            "line 3 'mem",
        ),
        "NUL": (
            b"path,label\n" + b"a.jpg,x\n" * 600 + b"b.jpg\0.png,y\n",
            "line 602 'b.jpg.x00.png'",
        ),
    }.values(),
)
def test_errors_name_the_reason_and_the_lines(
    folder: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(folder, content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"path": "a.jpg", "label": 1}\nnonsense\n', "line 2 is not a JSON object"),
        ("x.jsonl", "[1]", "line 1 is not a JSON object"),
        ("x.jsonl", "", "no column 'path'"),
        ("x.jsonl", '{"path": "a.jpg", "label": [1]}', "cannot be read as JSONL"),
        ("x.jsonl", '{"path": "a.jpg", "label": 1.5}', "numbers with a fraction"),
        ("x.jsonl", '{"path": "a.jpg"}\n{"path": "b.jpg", "label": "x"}', "no label .line 1"),
        ("x.parquet", "PAR1", "cannot be read as Parquet"),
        ("x.parquet", parquet(path=["a.jpg", "b.jpg"], label=["x", None]), "no label .row 2"),
    ],
)
def test_errors_of_other_formats(
    folder: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(folder, content, name)


def test_all_problems_are_in_one_error(folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        opened(folder, "path,label,split\na.jpg,,train\nz.jpg,x,train\nb.jpg,y,no\n")
    message = str(error.value)
    assert message.startswith(f"csv={str(folder / 'labels.csv')!r} cannot be used: ")
    assert all(part in message for part in ("no label", "does not exist", "no known split"))
    assert all(name in message for name in TRAIN_SPLITS + EVAL_SPLITS)


def test_repeated_rows_are_left_out_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = opened(folder, "path,label\na.jpg,x\nb.jpg,y\na.jpg,x\n")
    assert [*source.names("train")] == ["a.jpg", "b.jpg"]
    assert "1 rows repeat a path and were left out (line 4 'a.jpg')" in caplog.text


def test_special_files_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to("a.jpg")
    text = "path,label\nlink.jpg,x\npipe.jpg,y\n/dev/zero,y\nsub,y\nb.jpg,y\n"
    source = opened(folder, text)
    assert set(source.refused) == {"pipe.jpg", "/dev/zero", "sub"}
    assert "named pipe" in source.refused["pipe.jpg"]
    images = [example["image"] for example in source.split("train").encoded().as_numpy_iterator()]
    assert images == [b"a.jpg", b"", b"", b"", b"b.jpg"]
    for name in ("pipe.jpg", "sub"):
        with pytest.raises(ValueError, match="not a regular file"):
            open_source(csv=str(folder / name))
    with pytest.raises(FileNotFoundError, match="csv='.*nowhere.csv' does not exist"):
        open_source(csv=str(folder / "nowhere.csv"))


def test_folders_are_listed_instead_of_asking_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (tmp_path / f"{number}.jpg").touch()
    asked = []
    from transfer.images import image_files

    monkeypatch.setattr(image_files, "check", lambda path: asked.append(path))
    text = "path,label\n" + "".join(f"{number}.jpg,{number % 2}\n" for number in range(100))
    assert len(opened(tmp_path, text).split("train")) == 100
    assert not asked


def test_names_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    name = b"\xe9.jpg"
    (tmp_path / os.fsdecode(name)).write_bytes(b"1")
    (tmp_path / "b.jpg").write_bytes(b"2")
    source = opened(tmp_path, b"path,label\n" + name + b",x\nb.jpg,y\n")
    assert [*source.names("train")] == [os.fsdecode(name), "b.jpg"]
    images = [example["image"] for example in source.split("train").encoded().as_numpy_iterator()]
    assert images == [b"1", b"2"]


@pytest.mark.slow
def test_equals_an_image_folder_with_the_same_images(own_image_folder: Path) -> None:
    expected = open_source(image_folder=str(own_image_folder))
    names = [*expected.names("train")]
    lines = [f"{name},{Path(name).parent}\n" for name in names]
    source = opened(own_image_folder, "path,label\n" + "".join(lines))
    assert source.class_names == expected.class_names
    assert np.array_equal(np.asarray(source.ids("train")), np.asarray(expected.ids("train")))
    for ours, theirs in zip(
        source.train_and_eval_splits(), expected.train_and_eval_splits(), strict=True
    ):
        assert [*ours.names] == [*theirs.names]
        batches = (
            split.batches(Preprocess("unit", 16), 5, shuffle_seed=1) for split in (ours, theirs)
        )
        for (images, labels), (other_images, other_labels) in zip(*batches, strict=True):
            assert np.array_equal(images, other_images) and np.array_equal(labels, other_labels)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_on_one_side_of_the_hold_out(own_image_folder: Path, seed: int) -> None:
    names = [f"{path.parent.name}/{path.name}" for path in sorted(own_image_folder.glob("*/*"))]
    groups = np.random.default_rng(seed).integers(0, 9, len(names))
    text = "".join(f"{name},{name[0]},g{g}\n" for name, g in zip(names, groups, strict=True))
    source = opened(own_image_folder, "path,label,group\n" + text)
    train, held_out = train_and_eval_splits(source)
    assert len(train) and len(held_out) and len(train) + len(held_out) == len(names)
    assert train.groups is not None and held_out.groups is not None
    assert not {*train.groups} & {*held_out.groups}


def test_groups_of_an_image_folder_by_pattern(own_image_folder: Path) -> None:
    source = open_source(image_folder=str(own_image_folder), group_by=r"/(\d)")
    train, held_out = source.train_and_eval_splits()
    digits = [{Path(name).name[0] for name in split.names} for split in (train, held_out)]
    assert not digits[0] & digits[1] and digits[1]
    with pytest.raises(ValueError, match=r"group_by=x needs csv or image_folder"):
        open_source("digits", group_by="x")
    with pytest.raises(ValueError, match="no column 'camera'"):
        opened(own_image_folder, "path,label\nblue/00.jpg,x\n", group_by="camera")


def test_hold_out_of_a_single_group_is_refused(own_image_folder: Path) -> None:
    source = open_source(image_folder=str(own_image_folder), group_by="jpg|png")
    text = "path,label,group\nblue/00.jpg,x,1\nred/00.jpg,y,1\n"
    with pytest.raises(ValueError, match="too few images .* 2 in 2 classes and 1 groups"):
        opened(own_image_folder, text).train_and_eval_splits()
    assert source.groups is not None and {*source.groups("train")} == {0, 1}


def test_few_shot_says_that_it_ignores_groups(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transfer.data.dataset import few_shot

    split = open_source(image_folder=str(image_folder), group_by=r"/(\d)").split("train")
    with caplog.at_level(logging.INFO, "transfer"):
        few_shot(split, 3, seed=0)
    assert "shots_per_class=3 draws images whatever their groups: 6 images of" in caplog.text


@pytest.fixture
def store(image_folder: Path) -> fsspec.AbstractFileSystem:
    """The images of ``image_folder`` in a store in memory, below ``bucket``."""
    store = fsspec.filesystem("memory")
    store.put(str(image_folder), "/bucket", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("is_remote", [True, False], ids=["URL", "local file"])
def test_images_in_a_store_equal_local_ones(
    own_image_folder: Path, store: fsspec.AbstractFileSystem, is_remote: bool
) -> None:
    folder = open_source(image_folder=str(own_image_folder)).split("train")
    start = "" if is_remote else "memory://bucket/"
    text = "path,label\n" + "".join(f"{start}{name},{name[:3]}\n" for name in folder.names)
    if is_remote:
        store.pipe("/bucket/labels.csv", text.encode())
        source = open_source(csv="memory://bucket/labels.csv")
        assert source.origin["csv"] == "memory://bucket/labels.csv"
    else:
        source = opened(own_image_folder, text)
    split = source.split("train")
    assert [*split.names] == [start + name for name in folder.names]
    order = np.array([5, 23, 0, 7])
    for ours, theirs in zip(
        split.examples(order).as_numpy_iterator(),
        folder.examples(order).as_numpy_iterator(),
        strict=True,
    ):
        assert (ours["image"], ours["label"]) == (theirs["image"], theirs["label"])
        assert ours["name"].decode() == start + theirs["name"].decode()
    before = np.asarray(split.ids)
    store.pipe(f"/bucket/{folder.names[3]}", b"other")
    again = open_source(csv=source.origin["csv"])
    after = np.asarray(again.split("train").ids)
    assert (before != after).tolist() == [position == 3 for position in range(24)]
    batch = next(iter(folder.batches(Preprocess("unit", 16), 3)))
    assert np.array_equal(batch[0], next(iter(split.batches(Preprocess("unit", 16), 3)))[0])


def test_missing_image_in_a_store_is_an_unreadable_image(
    own_image_folder: Path, store: fsspec.AbstractFileSystem
) -> None:
    text = "path,label\nblue/00.jpg,x\nmemory://bucket/gone.jpg,y\nmemory://bucket/red/00.jpg,y\n"
    split = opened(own_image_folder, text).split("train")
    kept = split.readable(1)
    assert [*kept.names] == ["blue/00.jpg", "memory://bucket/red/00.jpg"]
    reason = split.source.unreadable["memory://bucket/gone.jpg"]
    assert "FileNotFoundError" in reason
    assert len(np.unique(split.ids)) == 3  # check-data and caches need the ids of all images


def test_store_whose_package_is_missing_says_so(folder: Path) -> None:
    pytest.importorskip("fsspec")
    if shutil.which("s3fs") is None:
        try:
            import s3fs  # noqa: F401
        except ImportError:
            with pytest.raises(ValueError, match="Install s3fs"):
                open_source(csv="s3://bucket/labels.csv")


def test_line_numbers_count_lines_of_the_file() -> None:
    data = b'\n\nx,path,label\n1,a,b\n"two\nlines",c,d\n\n3,e,f\n4,g,h\n5,i,j\n'
    table = read_table(".csv", data, COLUMNS)
    assert table.describe(np.array([0, 2, 4]), "path") == "line 4 'a', line 8 'e', line 10 'i'"
    assert table.describe(np.arange(5)).endswith("line 9, ...")
