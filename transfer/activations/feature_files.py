"""Features as files for other programs: NumPy, CSV and Parquet."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from transfer.activations.features import Features
from transfer.core.csv_files import write_row
from transfer.core.escapes import printable
from transfer.core.files import replacing


def save_features(features: Features, path: str | Path) -> None:
    """Write features with the names and labels of their images, atomically.

    Args:
        features: what ``extract_features`` returned.
        path: file to write; its suffix gives the format. ``.npz``: arrays ``values``, float32
            ``[num_images, width]``, ``labels``, int64, ``names``, ``class_names``, ``taps`` with
            the number of columns of each in ``tap_widths``. ``.csv`` and ``.parquet``: columns
            ``name``, ``label`` (the name of the class), and one column per feature, named after tap
            and number. ``.npy``: the values only.

    Raises:
        ValueError: if the suffix is another one.
        OSError: if the file cannot be written.

    Example:
        >>> import numpy as np
        >>> from transfer import Features
        >>> from transfer.activations.feature_files import save_features
        >>> values = np.zeros((2, 3), np.float32)
        >>> features = Features(values, np.array([0, 1]), ["1.jpg", "2.jpg"], ["cat", "dog"])
        >>> save_features(features, "features.npz")
        >>> np.load("features.npz")["names"].tolist()
        ['1.jpg', '2.jpg']
    """
    path = Path(path).expanduser()
    check_path(path)
    with replacing(path) as temporary, temporary.open("wb") as file:
        _WRITERS[path.suffix](features, file)


def check_path(path: Path) -> None:
    """Check the name of a file before the features are computed.

    Raises:
        ValueError: if its suffix is not that of a known format.
        FileNotFoundError: if its folder does not exist.
    """
    if path.suffix not in _WRITERS:
        raise ValueError(
            f"features are written as {', '.join(_WRITERS)}, by the suffix; got {str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path.parent)!r} is not a folder; create it first")


def _write_npz(features: Features, file: BinaryIO) -> None:
    np.savez(
        file,
        values=features.values,
        labels=features.labels,
        names=np.array([*map(printable, features.names)], str),
        class_names=np.array(features.class_names, str),
        taps=np.array(list(features.taps), str),
        tap_widths=np.array(list(features.taps.values()), np.int64),
    )


def _write_npy(features: Features, file: BinaryIO) -> None:
    np.save(file, features.values)


def _write_csv(features: Features, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    write_row(text, ["name", "label", *_titles(features)])
    for name, label, values in zip(
        features.names, features.labels.tolist(), features.values, strict=True
    ):
        numbers = (float(f"{value:.9g}") for value in values)  # enough digits for a float32
        write_row(text, [printable(name), features.class_names[label], *numbers])
    text.detach()  # leaves the file open


def _write_parquet(features: Features, file: BinaryIO) -> None:
    pyarrow.parquet.write_table(_table(features), file)


_WRITERS: dict[str, Callable[[Features, BinaryIO], None]] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _table(features: Features) -> pa.Table:
    labels = np.array(features.class_names, object)[features.labels]
    names = [printable(name) for name in features.names]
    columns = [pa.array(names, pa.string()), pa.array(labels, pa.string())]
    columns += [pa.array(column) for column in np.ascontiguousarray(features.values.T)]
    return pa.Table.from_arrays(columns, ["name", "label", *_titles(features)])


def _titles(features: Features) -> list[str]:
    """Names of the columns of the values."""
    taps = features.taps or {"feature": features.values.shape[1]}
    return [f"{tap}_{index}" for tap, width in taps.items() for index in range(width)]
