"""Cache directories: entries, eviction, deletion of own files only, and `vgg-transfer cache`."""

import errno
import gc
import json
import os
import time
import weakref

import numpy as np
import pytest
from cached_rows import KEY, SHAPE, again, files_of, ids, rows, write_earlier_layout

from recipes.cli import main
from transfer.activations import parts
from transfer.activations.cache import Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", limit_bytes=10**6)


@pytest.fixture
def entry(cache):
    return again(cache)


def test_different_keys_have_different_entries(cache, entry):
    entry.append(ids(1), rows(1))
    for other in (
        cache.entry(KEY | {"cut": "pool5"}, SHAPE, "float32"),
        cache.entry(KEY, SHAPE, "float16"),
        cache.entry(KEY, (6,), "float32"),
    ):
        assert other.folder != entry.folder
        assert other.missing(ids(1)).all()
    assert len(cache.entries()) == 4


def fill(cache, name, count, last_used):
    entry = cache.entry({"name": name}, SHAPE, "float32")
    entry.append(ids(*range(count)), rows(*range(count)))
    os.utime(entry.folder / "key.json", (last_used, last_used))
    return entry


def names(cache):
    return sorted(entry.key["name"] for entry in cache.entries())


def test_least_recently_used_entries_are_evicted(tmp_path):
    cache = Cache(tmp_path, limit_bytes=20_000)
    fill(cache, "old", 100, 1000)
    fill(cache, "older", 100, 500)
    new = fill(cache, "new", 100, 2000)
    cache.make_room(1000)
    assert names(cache) == ["new", "old", "older"]
    cache.make_room(8000)
    assert names(cache) == ["new", "old"]
    cache.make_room(8000, keep=[new])
    assert names(cache) == ["new", "old"]
    fill(cache, "used again", 100, 3000)
    cache.make_room(8000, keep=[new])
    assert names(cache) == ["new", "used again"]


def test_rows_that_never_fit_evict_nothing(tmp_path):
    cache = Cache(tmp_path, limit_bytes=20_000)
    fill(cache, "a", 100, 1000)
    with pytest.raises(OSError, match="1 MB of activations do not fit into .* of at most 0 MB"):
        cache.make_room(10**6)
    free = 10**18
    with pytest.raises(OSError, match="the disk has .* MB free"):
        Cache(tmp_path, limit_bytes=2 * free).make_room(free)
    assert names(cache) == ["a"]


def test_locked_entries_are_not_evicted(tmp_path):
    cache = Cache(tmp_path, limit_bytes=10_000)
    busy = fill(cache, "busy", 100, 1000)
    with busy.lock(), pytest.raises(OSError, match="while other processes use it"):
        Cache(tmp_path, limit_bytes=10_000).make_room(9000)
    assert names(cache) == ["busy"]
    cache.make_room(9000)
    assert names(cache) == []


def test_entries_that_another_process_reads_are_not_evicted(tmp_path, monkeypatch):
    """Their files are open: the space would not be free."""
    cache = Cache(tmp_path, limit_bytes=20_000)
    read = fill(cache, "read", 100, 1000).read(ids(1))
    fill(cache, "other", 100, 2000)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_open_parts", weakref.WeakSet())  # as another process sees it
        with pytest.raises(OSError, match="0 MB of it in use by other processes"):
            cache.make_room(17_000)
        assert names(cache) == ["other", "read"]
        cache.make_room(13_000)
        assert names(cache) == ["read"]
    np.testing.assert_array_equal(read[:], rows(1))
    cache.make_room(17_000)  # this process may evict what it has open itself
    assert names(cache) == []


def test_closed_entries_can_be_evicted(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_open_parts", weakref.WeakSet())
    cache = Cache(tmp_path, limit_bytes=20_000)
    fill(cache, "read", 100, 1000).read(ids(1))
    gc.collect()
    cache.make_room(17_000)
    assert names(cache) == []


@pytest.mark.parametrize("is_replaced", [True, False], ids=["by another user", "read-only"])
def test_rows_are_found_where_the_key_cannot_be_written(cache, monkeypatch, is_replaced):
    old = fill(cache, "old", 3, 1000)
    key = old.folder / "key.json"

    def refused(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    if not is_replaced:
        monkeypatch.setattr("transfer.core.files.write_text", refused)
    found = cache.entry({"name": "old"}, SHAPE, "float32")
    np.testing.assert_array_equal(found.read(ids(0, 2))[:], rows(0, 2))
    assert (key.stat().st_mtime > 1000) == is_replaced
    if not is_replaced:
        with pytest.raises(OSError, match="Read-only"):
            cache.entry({"name": "new"}, SHAPE, "float32")


def test_foreign_files_are_kept(cache, entry):
    mine = [
        *("photos/a.jpg", "photos/key.json", "photos/index.bin", "photos/rows.bin", "key.json"),
        *(f"{'0' * 32}/key.json", f"{'0' * 32}/index.bin", f"{'0' * 32}/rows-00000.bin"),
        *(f"{entry.folder.name}/notes.txt", f"{entry.folder.name}/.key.json.tmp", "locks/a.txt"),
        *(f"{entry.folder.name}/rows-1.bin", f"{entry.folder.name}/rows-000001.bin"),
    ]
    text = (entry.folder / "key.json").read_text()  # a copy of the key in another folder
    for name in mine:
        (cache.directory / name).parent.mkdir(exist_ok=True)
        (cache.directory / name).write_text(text)
    entry.append(ids(1), rows(1))
    assert [e.digest for e in cache.entries()] == [entry.folder.name]
    assert cache.damaged().keys() == {"photos", "0" * 32}
    for name in ("photos", "0" * 32, ".", "..", "../cache/photos", "absent", "f" * 32):
        assert not cache.delete(name)
    cache.limit_bytes = 0
    cache.make_room(0)
    cache.clear()
    assert cache.entries() == []
    assert {cache.directory / name for name in mine} == {
        path for path in cache.directory.rglob("*") if path.is_file()
    }


def test_locks_that_are_held_are_not_removed(cache, entry):
    entry.append(ids(1), rows(1))
    with entry.lock():
        cache.clear()
        assert [*(cache.directory / "locks").iterdir()] and len(cache.entries()) == 1
    cache.clear()
    assert not cache.directory.exists()


def test_links_are_never_followed(cache, entry, tmp_path):
    other = Cache(tmp_path / "other", 10**6)
    theirs = fill(other, "theirs", 3, 1000).folder
    entry.append(ids(1), rows(1))
    for kind in ("rows", "index"):
        (path,) = files_of(entry, kind)
        path.unlink()
        path.symlink_to(theirs / path.name)
    (cache.directory / theirs.name).symlink_to(theirs)  # looks like an entry
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    assert [e.digest for e in cache.entries()] == [entry.folder.name]
    assert not cache.delete(theirs.name)
    with pytest.raises(NotADirectoryError, match="is a link"):
        cache.entry({"name": "theirs"}, SHAPE, "float32")
    assert again(cache).missing(ids(0, 1)).all()
    for writer in (entry, again(cache)):
        writer.append(ids(1), rows(1))
        np.testing.assert_array_equal(again(cache).read(ids(1))[:], rows(1))
    assert cache.delete(entry.folder.name)
    left = {path.name for path in entry.folder.iterdir()}
    assert left == {"index-00000.bin", "rows-00000.bin"}  # the links
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_cache_directory_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    cache = Cache(tmp_path / "cache", 10**6)
    entry = fill(cache, "a", 2, 1000)
    assert entry.folder.resolve().parent == tmp_path / "disk"
    assert cache.delete(entry.folder.name)
    assert not entry.folder.exists()


def test_damaged_key_is_reported_and_others_are_listed(cache, entry, tmp_path):
    link = tmp_path / "elsewhere.json"
    link.write_text("{}")
    bad = {
        "empty": lambda path: path.write_bytes(b""),
        "binary": lambda path: path.write_bytes(bytes(range(256))),
        "list": lambda path: path.write_text("[1, 2]"),
        "deep": lambda path: path.write_text("[" * 10**5),
        "nan": lambda path: path.write_text('{"layout": NaN, "row_shape": [], "dtype": 1}'),
        "link": lambda path: path.symlink_to(link),
        "loop": lambda path: path.symlink_to(path),
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "large": lambda path: path.write_bytes(b" " * 2**21),
    }
    for name, make in bad.items():
        (cache.directory / name).mkdir()
        make(cache.directory / name / "key.json")
    assert [e.digest for e in cache.entries()] == [entry.folder.name]
    assert cache.damaged().keys() == bad.keys()
    assert all("key.json" in reason for reason in cache.damaged().values())
    cache.clear()
    assert {path.name for path in cache.directory.iterdir()} == bad.keys()


def test_clear_removes_cache_directory(cache, entry):
    entry.append(ids(1), rows(1))
    (entry.folder / f".key.json.{'0' * 16}.tmp").write_text("of a process that was killed")
    cache.clear()
    assert not cache.directory.exists()
    assert cache.entries() == []


def test_key_json_describes_rows(cache, entry):
    entry.append(ids(1), rows(1))
    (listed,) = cache.entries()
    assert listed.key["cut"] == "pool4"
    assert listed.num_rows == 1
    assert listed.num_bytes >= entry.row_bytes
    assert abs(listed.last_used - time.time()) < 60
    assert json.loads((entry.folder / "key.json").read_text())["row_shape"] == [3, 2]


def test_cache_list_reports_damaged_entries(cache, entry, tmp_path, capfd):
    entry.append(ids(1), rows(1))
    for name in ("\x1b[31mred", "0" * 32):
        (cache.directory / name).mkdir()
        (cache.directory / name / "key.json").write_bytes(b"")
    (entry.folder / "notes.txt").write_text("mine")
    assert main(["cache", "list", "--cache-dir", str(cache.directory)]) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines()[0].startswith(entry.folder.name[:12])
    assert printed.out.splitlines()[1].startswith("1 entries, 0.0 MB in ")
    assert [line.partition(":")[2] for line in printed.err.splitlines()] == [
        f" {name} is not an entry: its key.json is not JSON (Expecting value: line 1 column 1 "
        "(char 0))"
        for name in ("\\x1b[31mred", "0" * 32)
    ]
    assert main(["cache", "list", "--json", "--cache-dir", str(cache.directory)]) == 0
    (listed,) = json.loads(capfd.readouterr().out)
    assert listed["key"]["cut"] == "pool4"
    assert main(["cache", "clear", "--cache-dir", str(cache.directory)]) == 0
    printed = capfd.readouterr()
    assert printed.out == "1 entries deleted, 0.0 MB\n"
    assert "stays: it holds other files" in printed.err
    (tmp_path / "file").write_text("mine")
    assert main(["cache", "clear", "--cache-dir", str(tmp_path / "file")]) == 1
    assert "file' is a file; expected the folder of a cache" in capfd.readouterr().err


def test_all_parts_and_locks_are_deleted(cache, tmp_path):
    folder = write_earlier_layout(cache.directory, [1, 2], rows(1, 2))
    for worker in range(2):
        part = Cache(cache.directory, 10**6, (worker, 2)).entry(KEY, SHAPE, "float32")
        with part.lock():
            part.append(ids(worker, 10), rows(worker, 10))
            assert not cache.delete(folder.name)
    (listed,) = cache.entries()
    assert listed.num_rows == 6
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert len(sizes) == 7
    assert listed.num_bytes == sum(sizes)
    cache.clear()
    assert not cache.directory.exists()


def test_entry_deleted_during_a_run_is_begun_again(cache, entry):
    entry.append(ids(1, 2), rows(1, 2))
    stored = entry.read(ids(1, 2))
    cache.clear()
    np.testing.assert_array_equal(stored[:], rows(1, 2))  # its files are still open
    entry.append(ids(3), rows(3))
    assert [found.num_rows for found in cache.entries()] == [1]
    assert again(cache).missing(ids(1, 2, 3)).tolist() == [True, True, False]


def test_workers_that_evict_the_same_entries_find_room(tmp_path, monkeypatch):
    cache = Cache(tmp_path, limit_bytes=20_000)
    for name in ("a", "b", "c"):
        fill(cache, name, 100, 1000)
    delete = Cache.delete

    def deleted_by_other(cache, digest):
        delete(cache, digest)
        return False

    monkeypatch.setattr(Cache, "delete", deleted_by_other)
    cache.make_room(15_000)
    assert len(names(cache)) == 1


def test_rows_are_cached_where_files_cannot_be_locked(cache, monkeypatch):
    def unsupported(self, *args, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    entry = again(cache)
    with entry.lock():
        entry.append(ids(1), rows(1))
    np.testing.assert_array_equal(entry.read(ids(1))[:], rows(1))
    assert cache.delete(entry.folder.name)
