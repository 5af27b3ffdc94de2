"""Rows of an entry: lookup, damage, several writers, files of earlier versions."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cached_rows import KEY, SHAPE, again, files_of, ids, rows, write_earlier_layout

from transfer.activations import entry as entries
from transfer.activations import parts
from transfer.activations.cache import Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", limit_bytes=10**6)


@pytest.fixture
def entry(cache):
    return again(cache)


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


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


def test_first_row_of_an_example_is_read_whatever_is_appended(cache, entry):
    """So that a resumed run reads the same rows, to the last bit."""
    entry.append(ids(1, 2), rows(1, 2))
    entry.append(ids(1), rows(9))
    again(cache).append(ids(2), rows(9))
    np.testing.assert_array_equal(again(cache).read(ids(1, 2))[:], rows(1, 2))


def test_float16_rows_have_half_the_size(cache):
    half = cache.entry(KEY, SHAPE, "float16")
    half.append(ids(1), rows(1 / 3))
    assert half.read(ids(1))[:].dtype == np.float16
    assert [path.stat().st_size for path in files_of(half, "rows")] == [12]


@pytest.mark.parametrize("kind, cut_off", [("rows", 5), ("index", 7)])
def test_incomplete_rows_are_missing(cache, entry, kind, cut_off):
    entry.append(ids(1, 2), rows(1, 2))
    (path,) = files_of(entry, kind)
    os.truncate(path, path.stat().st_size - cut_off)
    for found in (entry, again(cache)):  # the writer itself, and the next process
        assert found.missing(ids(1, 2)).tolist() == [False, True]
        found.append(ids(2, 3), rows(2, 3))
        np.testing.assert_array_equal(again(cache).read(ids(1, 2, 3))[:], rows(1, 2, 3))
        for later in entry.folder.glob("*-0000[1-9].bin"):
            later.unlink()


def test_rows_without_records_are_ignored(cache, entry):
    entry.append(ids(1), rows(1))
    with files_of(entry, "rows")[0].open("ab") as file:
        file.write(rows(7, 8).tobytes() + b"half")
    found = again(cache)
    found.append(ids(2), rows(2))
    np.testing.assert_array_equal(found.read(ids(1, 2))[:], rows(1, 2))


def test_damaged_row_is_missing_and_replaced(cache, entry):
    entry.append(ids(1, 2, 3), rows(1, 2, 3))
    flip(files_of(entry, "rows")[0], entry.row_bytes + 3)
    found = again(cache)
    assert found.missing(ids(1, 2, 3)).tolist() == [False, True, False]
    found.append(ids(2), rows(2))
    np.testing.assert_array_equal(found.read(ids(1, 2, 3))[:], rows(1, 2, 3))
    np.testing.assert_array_equal(again(cache).read(ids(1, 2, 3))[:], rows(1, 2, 3))


@pytest.mark.parametrize("is_small", [True, False])
def test_rows_are_verified_when_they_are_read(cache, entry, monkeypatch, is_small):
    monkeypatch.setattr(entries, "_VERIFIED_AT_START", 0)
    monkeypatch.setattr(parts, "_MAX_MAPPED_ROW", 1000 if is_small else 0)
    entry.append(ids(1, 2, 3), rows(1, 2, 3))
    found = again(cache)
    stored = found.read(ids(1, 2, 3))
    for _ in range(2):
        np.testing.assert_array_equal(stored[:], rows(1, 2, 3))
    flip(files_of(entry, "rows")[0], entry.row_bytes + 3)
    found = again(cache)
    assert not found.missing(ids(1, 2, 3)).any()
    stored = found.read(ids(1, 2, 3))
    np.testing.assert_array_equal(stored[[0, 2]], rows(1, 3))
    with pytest.raises(OSError, match="1 of the activations in .* are damaged; delete them"):
        stored[:]
    _, intact = stored.read([0, 1, 1])
    assert intact.tolist() == [True, False, False]


def test_damaged_row_is_restored_once(cache, entry, monkeypatch):
    monkeypatch.setattr(entries, "_VERIFIED_AT_START", 0)
    entry.append(ids(*range(10)), rows(*range(10)))
    flip(files_of(entry, "rows")[0], 3 * entry.row_bytes)
    flip(files_of(entry, "rows")[0], 7 * entry.row_bytes)
    asked = []

    def restore(positions):
        asked.append(positions.tolist())
        found.append(np.array(names)[positions], rows(*positions))
        return rows(*positions)

    found, names = again(cache), ids(*range(10))
    stored = found.read(names, restore)
    for _ in range(2):
        np.testing.assert_array_equal(stored[[7, 1, 3, 7]], rows(7, 1, 3, 7))
        np.testing.assert_array_equal(stored[3], rows(3)[0])
        np.testing.assert_array_equal(stored[:], rows(*range(10)))
    assert asked == [[3, 7]]
    np.testing.assert_array_equal(again(cache).read(names)[:], rows(*range(10)))


def test_another_row_of_the_example_replaces_a_damaged_one(cache, entry):
    entry.append(ids(1, 2), rows(1, 2))
    again(cache).append(ids(2), rows(2))
    flip(files_of(entry, "rows")[0], entry.row_bytes)
    stored = again(cache).read(ids(2, 1))
    np.testing.assert_array_equal(stored[:], rows(2, 1))


@pytest.mark.parametrize("name", ["rows-00000.bin", "index-00000.bin", "key.json"])
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


def test_record_of_another_example_makes_no_valid_row(cache, entry):
    """A checksum includes the id: swapped or changed ids are damage, not rows of other images."""
    similar = [bytes(15) + bytes([number]) for number in range(4)]
    entry.append(similar, rows(0, 1, 2, 3))
    flip(files_of(entry, "index")[0], 15, bit=2)  # id 0 becomes 4
    flip(files_of(entry, "index")[0], 20 + 15, bit=1)  # id 1 becomes 3
    found = again(cache)
    asked = [*similar, bytes(15) + b"\4"]
    assert found.missing(asked).tolist() == [True, True, False, False, True]
    np.testing.assert_array_equal(found.read(similar[2:])[:], rows(2, 3))


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
    assert files_of(entry, "rows")[0].stat().st_size == 2 * entry.row_bytes  # its part is removed
    for found in (entry, again(cache)):
        assert found.missing(ids(1, 2, 3)).tolist() == [False, False, found is entry]
        found.append(ids(3), rows(3))
        np.testing.assert_array_equal(found.read(ids(1, 2, 3))[:], rows(1, 2, 3))


def test_hard_linked_backup_is_not_changed(cache, entry, tmp_path):
    entry.append(ids(1), rows(1))
    backup = {path: tmp_path / path.name for path in entry.folder.glob("*.bin")}
    for path, copy in backup.items():
        os.link(path, copy)
    before = {copy: copy.read_bytes() for copy in backup.values()}
    for writer, number in ((entry, 2), (again(cache), 3)):
        writer.append(ids(number), rows(number))
    np.testing.assert_array_equal(again(cache).read(ids(1, 2, 3))[:], rows(1, 2, 3))
    assert {copy: copy.read_bytes() for copy in backup.values()} == before


def test_entry_of_earlier_version_is_read_and_continued(cache):
    folder = write_earlier_layout(cache.directory, [5, 6, 5], rows(5, 6, 7))
    before = {path: path.read_bytes() for path in folder.glob("*.bin")}
    found = again(cache)
    assert found.folder == folder
    assert found.missing(ids(4, 5, 6)).tolist() == [True, False, False]
    found.append(ids(4, 5), rows(4, 9))
    # Earlier versions read the newest row of their file.
    np.testing.assert_array_equal(again(cache).read(ids(4, 5, 6))[:], rows(4, 7, 6))
    assert {path: path.read_bytes() for path in before} == before
    flip(folder / "rows.bin", 2 * found.row_bytes)
    np.testing.assert_array_equal(again(cache).read(ids(5, 6))[:], rows(5, 6))


def test_file_of_rows_is_bounded(cache, entry, monkeypatch):
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 3 * entry.row_bytes + 5)
    for start in range(0, 20, 5):
        entry.append(ids(*range(start, start + 5)), rows(*range(start, start + 5)))
    sizes = [path.stat().st_size // entry.row_bytes for path in files_of(entry, "rows")]
    assert sizes == [3] * 6 + [2]
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(again(cache).read(ids(*order))[:], rows(*order))
    files_of(entry, "index")[2].unlink()  # a part may be deleted
    files_of(entry, "rows")[4].unlink()
    absent = np.flatnonzero(again(cache).missing(ids(*range(20))))
    assert absent.tolist() == [6, 7, 8, 12, 13, 14]
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1)  # less than a row
    again(cache).append(ids(*absent), rows(*absent))
    np.testing.assert_array_equal(again(cache).read(ids(*order))[:], rows(*order))


def test_rows_are_read_with_few_open_files(cache, entry, monkeypatch):
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1)
    monkeypatch.setattr(parts, "_MAX_OPEN", 2 + len(parts._open_parts))
    entry.append(ids(*range(9)), rows(*range(9)))
    stored = again(cache).read(ids(*range(9)))
    np.testing.assert_array_equal(stored[:], rows(*range(9)))


def test_gathered_rows_equal_those_of_an_array(cache, monkeypatch):
    generator = np.random.default_rng(0)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1000)
    values = generator.random((2000, *SHAPE), np.float32)
    names = np.array(ids(*range(2000)))
    for worker, share in enumerate(np.array_split(generator.permutation(2000), 3)):
        writer = Cache(cache.directory, 10**6, (worker, 3)).entry(KEY, SHAPE, "float32")
        for chunk in np.array_split(share, 7):
            writer.append(names[chunk], values[chunk])
    order = generator.permutation(2000)
    stored = again(cache).read(names[order])
    expected = values[order]
    for selected in (
        *(slice(None), slice(5, 900, 7), slice(0, 0), slice(None, None, -1), 3, -1),
        *(generator.integers(0, 2000, 32), order[:64], order < 100, [[1, 2], [3, 1]]),
    ):
        np.testing.assert_array_equal(stored[selected], expected[selected])


@pytest.mark.parametrize("seed", range(3))
def test_damage_never_gives_a_wrong_row(tmp_path, monkeypatch, seed):
    """Random appends of several writers, cut off and changed at random: a row is right or missing,
    and what is appended afterwards is found."""
    generator = np.random.default_rng(seed)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 200)
    # Ids that differ in few bits; the rows have equal checksums of the row alone.
    names = np.array([bytes(14) + bytes(divmod(number, 256)) for number in range(40)], "S16")
    values = np.zeros((40, *SHAPE), np.float32)
    values[:, 0, 0] = np.arange(40) // 2
    for round_ in range(60):
        cache = Cache(tmp_path / f"{seed}-{round_}", 10**6)
        writers = [again(cache) for _ in range(3)]
        written = np.zeros(40, bool)
        for _ in range(6):
            chosen = generator.choice(40, generator.integers(1, 9), replace=False)
            generator.choice(writers).append(names[chosen], values[chosen])
            written[chosen] = True
        paths = sorted(writers[0].folder.iterdir())
        for path in generator.choice(paths, 2, replace=False):
            length = path.stat().st_size
            if generator.random() < 0.5:
                os.truncate(path, generator.integers(length + 1))
            elif length:
                flip(path, generator.integers(length), generator.integers(8))
        found = again(cache)
        monkeypatch.setattr(entries, "_VERIFIED_AT_START", 2**26 * (round_ % 2))
        missing = found.missing(names)
        stored = entries.StoredRows(found, names)
        got, intact = stored.read(slice(None))
        np.testing.assert_array_equal(got[intact], values[intact])
        assert not intact[~written].any()
        if round_ % 2:
            np.testing.assert_array_equal(intact, ~missing)
        lost = np.flatnonzero(~intact)
        assert len(lost) < 40
        found.append(names[lost], values[lost])
        writers[0].append(names[:3], values[:3])
        np.testing.assert_array_equal(again(cache).missing(names), False)
        _, intact = entries.StoredRows(again(cache), names).read(slice(None))
        assert intact.all()
        np.testing.assert_array_equal(again(cache).read(names)[:], values)


@pytest.mark.parametrize("kind", ["rows", "index"])
def test_write_cut_off_at_any_byte_loses_no_earlier_row(cache, entry, kind):
    entry.append(ids(1, 2), rows(1, 2))
    entry.append(ids(3, 4), rows(3, 4))
    (path,) = files_of(entry, kind)
    whole, size = path.read_bytes(), len(path.read_bytes()) // 4
    for length in range(2 * size, 4 * size + 1):
        path.write_bytes(whole[:length])
        complete = length // size
        found = again(cache)
        assert found.missing(ids(1, 2, 3, 4)).tolist() == [n >= complete for n in range(4)]
        kept = range(1, complete + 1)
        np.testing.assert_array_equal(found.read(ids(*kept))[:], rows(*kept))


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


TOGETHER = """
import sys, hashlib, numpy as np
from pathlib import Path
from transfer.activations import parts
from transfer.activations.cache import Cache
worker = int(sys.argv[2])
parts.MAX_PART_BYTES = 60_000
entry = Cache(Path(sys.argv[1]), 10**9, (worker, 2)).entry({"cut": "shared"}, (1000,), "float32")
names = [hashlib.md5(str(i).encode()).digest() for i in range(400)]
print("ready", flush=True)
sys.stdin.readline()
with entry.lock():
    for i in range(worker, 400, 2):
        entry.append([names[i]], np.full((1, 1000), i, np.float32))
        reader = entry.read([names[i]])
        assert (reader[:] == i).all()
"""


@pytest.mark.slow
def test_two_workers_write_an_entry_at_the_same_time(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for worker in range(2)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate()
    assert [worker.returncode for worker in workers] == [0, 0]
    # Read by a run with another number of workers.
    entry = Cache(tmp_path, 10**9).entry({"cut": "shared"}, (1000,), "float32")
    stored = entry.read(ids(*range(400)))[:]
    np.testing.assert_array_equal(stored, np.repeat(np.arange(400.0)[:, None], 1000, 1))
