import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets

from transfer.data.tfds import tfds

ROOT = Path(__file__).resolve().parents[2]


def test_tfds_is_tensorflow_datasets():
    assert tfds is tensorflow_datasets


@pytest.mark.parametrize(
    ("public_api", "reason"),
    [
        ("raise TypeError('gencode 6.31.1 runtime 5.29.6')", "TypeError: gencode 6.31.1 runtime"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("", "is this another package of its name?"),
    ],
)
def test_partial_import_fails_with_reason(tmp_path, public_api, reason):
    package = tmp_path / "tensorflow_datasets"
    package.mkdir()
    # As tfds does it.
    (package / "__init__.py").write_text(
        "try:\n    from tensorflow_datasets import public_api\nexcept Exception:\n    pass\n"
    )
    (package / "public_api.py").write_text(public_api)
    done = subprocess.run(
        [sys.executable, "-c", "import transfer.data.tfds"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: tensorflow_datasets cannot be imported: ")
    assert reason in last
    assert "protobuf" in last
