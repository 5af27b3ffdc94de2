"""Runs for the tests of the server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import finetune
from conftest import make_image_folder

from recipes.cli import main

ROOT = Path(__file__).resolve().parents[1]


def evaluated_run(run: Path, model: Path, images_per_class: int, every: int, *flags: Any) -> Path:
    """An evaluated run with errors: every so many photos of a class have the wrong label."""
    photos = make_image_folder(run.parent / "photos", images_per_class)
    for number in range(0, images_per_class, every):
        (photos / "red" / f"{number:02d}.jpg").rename(photos / "blue" / f"wrong-{number}.jpg")
    assert finetune(run, model, photos, *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transfer.evaluation.report.write", lambda *_: None)  # slow
        assert main(["evaluate", str(run)]) == 0
    return run


@contextlib.contextmanager
def started(run: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of a server on a free port."""
    command = [sys.executable, "-m", "recipes", "serve", str(run), "--port", "0", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.terminate()
