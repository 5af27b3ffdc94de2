import numpy as np
import pytest

from transfer.core import npy_files


@pytest.mark.parametrize("counts", [[], [1], [3, 0, 5], [1] * 1234])
def test_rows_are_read_back_whatever_their_number(tmp_path, counts):
    rows = np.random.default_rng(0).random((sum(counts), 7))
    path = tmp_path / "rows.npy"
    with npy_files.row_writer(path, 7) as append:
        for part in np.split(rows, np.cumsum(counts)):
            append(part)
        assert not path.exists()
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rows.astype(np.float32))
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_an_interrupted_file(tmp_path):
    path = tmp_path / "rows.npy"
    path.write_bytes(b"of the user")
    with pytest.raises(KeyboardInterrupt), npy_files.row_writer(path, 2) as append:
        append(np.zeros((3, 2)))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"of the user"
    assert list(tmp_path.iterdir()) == [path]


def test_path_is_checked(tmp_path):
    npy_files.check_path(tmp_path / "p.npy", "probabilities")
    with pytest.raises(ValueError, match=r"probabilities are .* ends in \.npy, got .*p\.csv"):
        npy_files.check_path(tmp_path / "p.csv", "probabilities")
    with pytest.raises(FileNotFoundError, match="absent.* is not a folder"):
        npy_files.check_path(tmp_path / "absent" / "p.npy", "probabilities")


def test_slices_of_a_file_are_read():
    values = np.arange(24, dtype=np.float32).reshape(12, 2)
    with npy_files.FileRows(2) as rows:
        rows.append(values[:5])
        np.testing.assert_array_equal(rows[1:3], values[1:3])
        rows.append(values[5:].astype(np.float64))
        assert (len(rows), rows.shape) == (12, (12, 2))
        for chosen in (slice(0, 3), slice(10, 20), slice(4, 4), slice(None)):
            np.testing.assert_array_equal(rows[chosen], values[chosen])
        with pytest.raises(ValueError, match="consecutive rows"):
            rows[::2]
