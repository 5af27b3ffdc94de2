"""All commands with unexpected paths: a one-line error and an exit status, without hanging."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from recipes.cli import main

PATHS = ("/dev/null", "/dev/zero", "pipe", "empty", "text", "absent", "folder", "loop", "x" * 300)
READERS = {
    "inspect": ["inspect", "PATH"],
    "convert": ["convert", "PATH", "--out", "out/m"],
    "evaluate": ["evaluate", "PATH"],
    "export": ["export", "PATH"],
    "predict": ["predict", "PATH", "text"],
    "check-data": ["check-data", "--image-folder", "PATH"],
    "finetune --model": ["finetune", "--model", "PATH", "--image-folder", "folder"],
    "finetune --image-folder": ["finetune", "--image-folder", "PATH"],
    "finetune --data-dir": ["finetune", "--dataset", "absent", "--data-dir", "PATH"],
    "lr-find": ["lr-find", "--model", "PATH", "--image-folder", "folder"],
    "benchmark": ["benchmark", "--model", "PATH", "--image-folder", "folder"],
    "pretrain": ["pretrain", "--image-folder", "PATH"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a file of each unexpected kind."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_fails(words: list[str], capfd: pytest.CaptureFixture) -> str:
    """Check that a command fails quickly with exactly one error line; returns the line."""
    start = time.process_time()
    assert main(words) in (1, 2), words
    assert time.process_time() - start < 10, words
    printed = capfd.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return line


@pytest.mark.parametrize("verb", READERS)
def test_unreadable_path_is_a_one_line_error(folder, capfd, verb) -> None:
    before = sorted(folder.rglob("*"))
    for path in PATHS:
        line = check_fails([path if word == "PATH" else word for word in READERS[verb]], capfd)
        assert Path(path).name in line or "tfds knows no dataset" in line, line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("path", ["/", ".", "folder"])
def test_convert_rejects_folder(folder, capfd, path) -> None:
    line = check_fails(["convert", path, "--out", "out/m"], capfd)
    shown = str(Path(path))
    assert line.startswith(f"error: {shown!r} is a folder; expected a file of weights")


@pytest.mark.parametrize("path", ["/dev/null", "pipe", "text", "loop"])
def test_output_path_that_is_a_file_is_rejected(folder, capfd, path) -> None:
    for verb in ("finetune", "pretrain", "lr-find", "benchmark"):
        check_fails([verb, "--image-folder", "folder", "--out", path], capfd)
    for action in ("list", "clear") if path != "loop" else ():
        line = check_fails(["cache", action, "--cache-dir", path], capfd)
        assert line.endswith("is a file; expected the folder of a cache")
    assert (folder / "text").read_text() == "hello\n"
