import os
import threading
import time

import pytest
from PIL import Image

from transfer.data import folder_index, image_folder, index_files
from transfer.data.sources import open_source


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder that counts as large, as unchanged for long, and on a known file system."""
    monkeypatch.setattr(folder_index, "_MIN_IMAGES", 1)
    monkeypatch.setattr(folder_index, "_SETTLED_S", dict.fromkeys(["test"], 2))
    monkeypatch.setattr(folder_index, "_MOUNTS", mounts(tmp_path))
    monkeypatch.setattr(index_files, "default_directory", lambda kind: tmp_path / kind)
    folder = tmp_path / "photos"
    for number in range(12):
        path = folder / "ab"[number % 2] / "deep" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1), number).save(path)
    (folder / "a" / "notes.txt").write_text("")
    (folder / "empty").mkdir()
    later = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: later() + 3 * 10**9)
    return folder


def mounts(tmp_path):
    device = os.stat(tmp_path).st_dev
    path = tmp_path / "mountinfo"
    path.write_text(
        "1 2 0:99999 / /proc rw - proc proc rw\n"
        f"3 1 {os.major(device)}:{os.minor(device)} / / rw shared:1 - test /dev/vda rw\n"
    )
    return path


@pytest.fixture
def listings(monkeypatch):
    """Counts how often the folder is listed."""
    made, list_ = [], image_folder._list
    monkeypatch.setattr(image_folder, "_list", lambda folder: made.append(folder) or list_(folder))
    return made


def opened(folder):
    source = open_source(image_folder=str(folder))
    return (
        source.class_names,
        {split: [*source.names(split)] for split in source.split_names},
        {split: source.labels(split).tolist() for split in source.split_names},
        source.passed_over,
    )


def test_second_opening_lists_nothing_and_finds_the_same(photos, listings):
    first = opened(photos)
    assert first[0] == ["a", "b"]
    assert [name for name, _ in first[3].files] == ["a/notes.txt"]
    assert first[3].empty_classes == ["empty"]
    assert opened(photos) == first
    assert len(listings) == 1


def add(folder):
    Image.new("L", (1, 1)).save(folder / "a" / "deep" / "new.png")


def remove(folder):
    (folder / "b" / "deep" / "1.png").unlink()


def rename(folder):
    (folder / "b" / "deep" / "1.png").rename(folder / "b" / "deep" / "0.png")


def replace(folder):
    (folder / "b" / "deep" / "1.png").unlink()
    (folder / "b" / "deep" / "1.png").symlink_to(folder / "nowhere.png")


def fill_class(folder):
    Image.new("L", (1, 1)).save(folder / "empty" / "new.png")


def add_class(folder):
    (folder / "c").mkdir()
    Image.new("L", (1, 1)).save(folder / "c" / "new.png")


def exchange_class(folder):
    (folder / "b").rename(folder.parent / "b")
    (folder / "b" / "deep").mkdir(parents=True)
    Image.new("L", (1, 1)).save(folder / "b" / "deep" / "new.png")


def make_splits(folder):
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / name / "deep").rename(folder / "train" / name / "deep")


@pytest.mark.parametrize(
    "change",
    [add, remove, rename, replace, fill_class, add_class, exchange_class, make_splits],
    ids=lambda change: change.__name__,
)
def test_changed_folder_is_listed_again(photos, listings, change):
    before = opened(photos)
    times = {path: path.stat() for path in [photos, *photos.rglob("*")] if path.is_dir()}
    change(photos)
    for path, status in times.items():  # as rsync and tar do; the time of the inode still tells
        if path.is_dir():
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = opened(photos)
    assert after != before
    assert len(listings) == 2


def test_file_added_while_folder_is_listed_is_found_later(photos, listings, monkeypatch):
    # The clock of the fixture is ahead, as that of a client whose file server's clock is behind.
    images = image_folder._images

    def then_add(folder, search):
        found = images(folder, search)
        if folder.name == "b" and len(listings) == 1:
            Image.new("L", (1, 1)).save(folder / "deep" / "new.png")
        return found

    monkeypatch.setattr(image_folder, "_images", then_add)
    assert "b/deep/new.png" not in opened(photos)[1]["train"]
    assert "b/deep/new.png" in opened(photos)[1]["train"]


def test_file_changed_in_place_has_another_id(photos, listings):
    ids = open_source(image_folder=str(photos)).split("train").ids
    path = photos / "a" / "deep" / "2.png"
    Image.new("L", (9, 9)).save(path)
    split = open_source(image_folder=str(photos)).split("train")
    (changed,) = (ids != split.ids).nonzero()[0]
    assert split.names[changed] == "a/deep/2.png"
    assert len(listings) == 1


def test_folder_changed_just_before_is_listed_again(photos, listings, monkeypatch):
    now = max(path.stat().st_ctime_ns for path in [photos, *photos.rglob("*")])
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**9)
    opened(photos)
    opened(photos)
    assert len(listings) == 2
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * 10**9)
    opened(photos)
    opened(photos)
    assert len(listings) == 3


def test_folder_changed_while_it_is_listed_is_listed_again(photos, monkeypatch):
    start, list_ = time.time_ns(), image_folder._list
    monkeypatch.setattr(time, "time_ns", lambda: start)

    def listed(folder):
        listing = list_(folder)
        add(photos)
        later = start + 10**9
        os.utime(photos / "a" / "deep", ns=(later, later))
        return listing

    monkeypatch.setattr(image_folder, "_list", listed)
    before = opened(photos)
    assert opened(photos) != before


@pytest.mark.parametrize("link", ["image", "class", "folder"])
def test_folder_with_links_that_may_change_is_listed_again(photos, listings, link):
    target = photos.parent / "elsewhere"
    place = {"image": "a/x.png", "class": "c", "folder": "a/deep/more"}[link]
    (photos / place).symlink_to(target)
    if link == "image":
        Image.new("L", (1, 1)).save(target, "PNG")
    if link == "folder":
        target.mkdir()
    opened(photos)
    opened(photos)
    assert len(listings) == 2


def test_class_that_is_a_link_to_a_folder_is_followed(photos, listings):
    (photos / "a").rename(photos.parent / "a")
    (photos / "a").symlink_to(photos.parent / "a")
    first = opened(photos)
    assert opened(photos) == first
    assert len(listings) == 1
    add(photos)
    assert len(opened(photos)[1]["train"]) == 13
    assert len(listings) == 2


@pytest.mark.parametrize("system", ["fuse.s3fs", "9p", None])
def test_unknown_file_systems_are_listed_again(photos, listings, system):
    if system is None:  # no Linux
        folder_index._MOUNTS.unlink()
    else:
        text = folder_index._MOUNTS.read_text()
        folder_index._MOUNTS.write_text(text.replace("- test", f"- {system}"))
    opened(photos)
    opened(photos)
    assert len(listings) == 2


def test_damaged_index_is_made_again(photos, listings):
    first = opened(photos)
    (path,) = (photos.parent / "folder").glob("*.npz")
    whole = path.read_bytes()
    for number, content in enumerate((b"", whole[:-30], whole[:200] + b"?" + whole[201:]), 2):
        path.write_bytes(content)
        assert opened(photos) == first
        assert len(listings) in (number, number - 1)  # some bytes of a zip file mean nothing


def test_small_folders_are_not_remembered(photos, listings, monkeypatch):
    monkeypatch.setattr(folder_index, "_MIN_IMAGES", 13)
    opened(photos)
    opened(photos)
    assert len(listings) == 2


def test_processes_that_start_together_list_the_folder_once(photos, listings, monkeypatch):
    begun, list_ = threading.Barrier(2), image_folder._list
    is_waiting = threading.Event()

    def slow(folder):
        begun.wait(10)
        is_waiting.wait(10)
        return list_(folder)

    monkeypatch.setattr(image_folder, "_list", slow)
    monkeypatch.setattr(index_files.logger, "info", lambda message: is_waiting.set())
    results = []
    threads = [threading.Thread(target=lambda: results.append(opened(photos))) for _ in range(2)]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert results[0] == results[1]
    assert len(listings) == 1
