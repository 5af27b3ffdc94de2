"""Activation cache: reading rows, detecting damage, and sharing between processes."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from recipes.cli import main
from transfer.activations.cache import Cache

SHAPE = (3, 2)
KEY = {"cut": "pool4", "sha256": "00"}


def ids(*names):
    return [hashlib.md5(str(name).encode()).digest() for name in names]


def rows(*numbers):
    return np.stack([np.full(SHAPE, number, np.float32) for number in numbers])


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", limit_bytes=10**6)


@pytest.fixture
def entry(cache):
    return cache.entry(KEY, SHAPE, "float32")


def again(cache):
    return cache.entry(KEY, SHAPE, "float32")


def test_rows_are_read_in_any_order(cache, entry):
    assert entry.missing(ids(1, 2)).tolist() == [True, True]
    entry.append(ids(1, 2, 3), rows(1, 2, 3))
    found = again(cache)
    assert found.missing(ids(3, 4, 1)).tolist() == [False, True, False]
    stored = found.read(ids(3, 1, 3))
    np.testing.assert_array_equal(stored[np.arange(3)], rows(3, 1, 3))
    np.testing.assert_array_equal(stored[[2, 1]], rows(3, 1))
    assert len(stored) == 3
    with pytest.raises(KeyError, match="1 of 2 rows"):
        found.read(ids(1, 4))


def test_ids_may_end_in_zero_bytes(entry):
    similar = [b"\x01" + bytes(15), b"\x01\x00\x02" + bytes(13), bytes(16)]
    entry.append(similar, rows(1, 2, 3))
    np.testing.assert_array_equal(entry.read(similar[::-1])[:], rows(3, 2, 1))


def test_newest_row_of_an_example_is_read(entry):
    entry.append(ids(1, 2), rows(1, 2))
    entry.append(ids(1), rows(9))
    np.testing.assert_array_equal(entry.read(ids(1, 2))[:], rows(9, 2))


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


def test_float16_rows_have_half_the_size(cache):
    half = cache.entry(KEY, SHAPE, "float16")
    half.append(ids(1), rows(1 / 3))
    assert half.read(ids(1))[:].dtype == np.float16
    assert (half.folder / "rows.bin").stat().st_size == 12


@pytest.mark.parametrize("name, cut_off", [("rows.bin", 5), ("index.bin", 7)])
def test_incomplete_rows_are_overwritten(cache, entry, name, cut_off):
    entry.append(ids(1, 2), rows(1, 2))
    path = entry.folder / name
    os.truncate(path, path.stat().st_size - cut_off)
    found = again(cache)
    assert found.missing(ids(1, 2)).tolist() == [False, True]
    found.append(ids(2, 3), rows(2, 3))
    np.testing.assert_array_equal(again(cache).read(ids(1, 2, 3))[:], rows(1, 2, 3))


def test_rows_without_records_are_overwritten(cache, entry):
    entry.append(ids(1), rows(1))
    with (entry.folder / "rows.bin").open("ab") as file:
        file.write(rows(7, 8).tobytes() + b"half")
    found = again(cache)
    found.append(ids(2), rows(2))
    np.testing.assert_array_equal(found.read(ids(1, 2))[:], rows(1, 2))


def test_damaged_row_is_missing_and_replaced(cache, entry):
    entry.append(ids(1, 2, 3), rows(1, 2, 3))
    with (entry.folder / "rows.bin").open("r+b") as file:
        file.seek(entry.row_bytes + 3)
        file.write(b"\xff")
    found = again(cache)
    assert found.missing(ids(1, 2, 3)).tolist() == [False, True, False]
    with pytest.raises(KeyError):
        found.read(ids(2))
    found.append(ids(2), rows(2))
    np.testing.assert_array_equal(found.read(ids(1, 2, 3))[:], rows(1, 2, 3))


@pytest.mark.parametrize("name", ["rows.bin", "index.bin", "key.json"])
def test_random_bytes_are_never_valid_rows(cache, entry, name):
    entry.append(ids(1, 2), rows(1, 2))
    size = (entry.folder / name).stat().st_size
    (entry.folder / name).write_bytes(np.random.default_rng(0).bytes(size))
    cache.entries()
    found = again(cache)
    if name == "key.json":
        assert not found.missing(ids(1, 2)).any()
        return
    assert found.missing(ids(1, 2)).all()
    found.append(ids(1, 2), rows(1, 2))
    np.testing.assert_array_equal(found.read(ids(1, 2))[:], rows(1, 2))


def test_rows_of_another_shape_are_refused(entry):
    with pytest.raises(ValueError, match=r"expected 1 rows of shape \(3, 2\), got \(1, 2, 3\)"):
        entry.append(ids(1), np.zeros((1, 2, 3)))


def test_full_disk_is_reported_and_rows_are_kept(cache, entry):
    resource = pytest.importorskip("resource", reason="limits of a process are Unix")
    entry.append(ids(1, 2), rows(1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * entry.row_bytes + 5, hard))
    try:
        with pytest.raises(OSError, match="cannot write activations to .*; complete rows are kept"):
            entry.append(ids(3), rows(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (entry.folder / "rows.bin").stat().st_size == 2 * entry.row_bytes + 5
    found = again(cache)
    assert found.missing(ids(1, 2, 3)).tolist() == [False, False, True]
    found.append(ids(3), rows(3))
    np.testing.assert_array_equal(found.read(ids(1, 2, 3))[:], rows(1, 2, 3))


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


def test_foreign_files_are_kept(cache, entry):
    mine = [
        *("photos/a.jpg", "photos/key.json", "photos/index.bin", "photos/rows.bin", "key.json"),
        *(f"{'0' * 32}/key.json", f"{'0' * 32}/index.bin", f"{'0' * 32}/rows.bin"),
        *(f"{entry.folder.name}/notes.txt", f"{entry.folder.name}/.key.json.tmp", "locks/a.txt"),
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


def test_links_are_never_followed(cache, entry, tmp_path):
    other = Cache(tmp_path / "other", 10**6)
    theirs = fill(other, "theirs", 3, 1000).folder
    entry.append(ids(1), rows(1))
    for name in ("rows.bin", "index.bin"):
        (entry.folder / name).unlink()
        (entry.folder / name).symlink_to(theirs / name)
    (cache.directory / theirs.name).symlink_to(theirs)  # looks like an entry
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    assert [e.digest for e in cache.entries()] == [entry.folder.name]
    assert not cache.delete(theirs.name)
    with pytest.raises(NotADirectoryError, match="is a link"):
        cache.entry({"name": "theirs"}, SHAPE, "float32")
    assert again(cache).missing(ids(0, 1)).all()
    again(cache).append(ids(1), rows(1))
    np.testing.assert_array_equal(again(cache).read(ids(1))[:], rows(1))
    (entry.folder / "index.bin").unlink()
    (entry.folder / "index.bin").symlink_to(theirs / "index.bin")
    assert cache.delete(entry.folder.name)
    assert [path.name for path in entry.folder.iterdir()] == ["index.bin"]
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_cache_directory_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    cache = Cache(tmp_path / "cache", 10**6)
    entry = fill(cache, "a", 2, 1000)
    assert entry.folder.resolve().parent == tmp_path / "disk"
    assert cache.delete(entry.folder.name)
    assert not entry.folder.exists()


def test_hard_linked_backup_is_not_changed(cache, entry, tmp_path):
    entry.append(ids(1), rows(1))
    backup = {name: tmp_path / name for name in ("rows.bin", "index.bin")}
    for name, path in backup.items():
        os.link(entry.folder / name, path)
    before = {name: path.read_bytes() for name, path in backup.items()}
    again(cache).append(ids(2), rows(2))
    np.testing.assert_array_equal(again(cache).read(ids(1, 2))[:], rows(1, 2))
    assert {name: path.read_bytes() for name, path in backup.items()} == before


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


def test_entry_of_earlier_version_is_read_and_deleted(cache):
    """The key was written in place, without a temporary file."""
    text = json.dumps(
        {"cut": "pool4", "dtype": "float32", "layout": 1, "row_shape": [3, 2], "sha256": "00"},
        indent=1,
    )
    folder = cache.directory / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True)
    (folder / "key.json").write_text(text)
    (folder / "rows.bin").write_bytes(rows(5).tobytes())
    record = ids(1)[0] + np.uint32(zlib.crc32(rows(5))).tobytes()
    (folder / "index.bin").write_bytes(record)
    found = cache.entry(KEY, SHAPE, "float32")
    assert found.folder == folder
    np.testing.assert_array_equal(found.read(ids(1))[:], rows(5))
    assert cache.delete(folder.name)
    assert not folder.exists()


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


WRITER = """
import sys, hashlib, numpy as np
from pathlib import Path
from transfer.activations.cache import Cache
entry = Cache(Path(sys.argv[1]), 10**9).entry({"cut": "shared"}, (1000,), "float32")
names = [hashlib.md5(str(i).encode()).digest() for i in range(40)]
with entry.lock(lambda: print("waiting")):
    missing = entry.missing(names)
    print("missing", missing.sum())
    for i in np.flatnonzero(missing):
        entry.append([names[i]], np.full((1, 1000), i, np.float32))
rows = entry.read(names)[:]
assert (rows == np.arange(40, dtype=np.float32)[:, None]).all()
"""


@pytest.mark.slow
def test_two_processes_share_an_entry(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(line for text in printed for line in text.split("\n") if "missing" in line) == [
        "missing 0",
        "missing 40",
    ]


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
