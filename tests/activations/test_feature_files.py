"""Features as files, read by NumPy and PyArrow."""

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from transfer import Features
from transfer.activations.feature_files import save_features


@pytest.fixture
def features():
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    names = ["a/1.jpg", "b, c/2.jpg", "a/ü.jpg"]
    return Features(values, np.array([0, 1, 0]), names, ["a", "b, c"], {"pool5": 2, "fc7": 3})


def test_npz_has_everything(tmp_path, features):
    save_features(features, tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as arrays:  # without pickles
        np.testing.assert_array_equal(arrays["values"], features.values)
        assert arrays["names"].tolist() == features.names
        assert arrays["class_names"][arrays["labels"]].tolist() == ["a", "b, c", "a"]
        assert dict(zip(arrays["taps"], arrays["tap_widths"], strict=True)) == features.taps


def test_npy_has_the_values(tmp_path, features):
    save_features(features, tmp_path / "f.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), features.values)


@pytest.mark.parametrize(
    "suffix, read", [(".csv", pyarrow.csv.read_csv), (".parquet", pyarrow.parquet.read_table)]
)
def test_tables_have_a_row_per_image(tmp_path, features, suffix, read):
    save_features(features, tmp_path / f"f{suffix}")
    table = read(tmp_path / f"f{suffix}")
    assert table.column_names == ["name", "label", "pool5_0", "pool5_1", "fc7_0", "fc7_1", "fc7_2"]
    assert table["name"].to_pylist() == features.names
    assert table["label"].to_pylist() == ["a", "b, c", "a"]
    values = np.stack([table[name].to_numpy() for name in table.column_names[2:]], axis=1)
    np.testing.assert_allclose(values, features.values, rtol=1e-6)


def test_names_are_safe_and_valid(tmp_path, features):
    features.names[:2] = ["=cmd.jpg", "caf\udce9.jpg"]
    save_features(features, tmp_path / "f.csv")
    lines = (tmp_path / "f.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith("'=cmd.jpg,a,")
    save_features(features, tmp_path / "f.parquet")
    names = pyarrow.parquet.read_table(tmp_path / "f.parquet")["name"].to_pylist()
    assert names[1] == "caf\\udce9.jpg"


def test_other_suffixes_are_refused(tmp_path, features):
    with pytest.raises(ValueError, match=r"\.npz, \.npy, \.csv, \.parquet, by the suffix; got"):
        save_features(features, tmp_path / "f.txt")
    with pytest.raises(FileNotFoundError, match="absent' is not a folder"):
        save_features(features, tmp_path / "absent" / "f.npz")
    assert list(tmp_path.iterdir()) == []
