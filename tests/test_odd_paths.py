"""Every verb with paths that are not what it expects: one line, an exit status, no waiting."""

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
    """The working folder, with a file of each odd kind."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_fails(words: list[str], capfd: pytest.CaptureFixture) -> str:
    """Its error line, the only one."""
    start = time.process_time()
    assert main(words) in (1, 2), words
    assert time.process_time() - start < 10, words
    printed = capfd.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return line


@pytest.mark.parametrize("verb", READERS)
def test_what_cannot_be_read_is_an_error_in_one_line(folder, capfd, verb) -> None:
    before = sorted(folder.rglob("*"))
    for path in PATHS:
        line = check_fails([path if word == "PATH" else word for word in READERS[verb]], capfd)
        assert Path(path).name in line or "tfds knows no dataset" in line, line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("path", ["/", ".", "folder"])
def test_a_folder_is_not_a_file_of_weights(folder, capfd, path) -> None:
    line = check_fails(["convert", path, "--out", "out/m"], capfd)
    shown = str(Path(path))
    assert line.startswith(f"error: {shown!r} is a folder; expected a file of weights")


@pytest.mark.parametrize("path", ["/dev/null", "pipe", "text", "loop"])
def test_a_run_does_not_go_to_a_file(folder, capfd, path) -> None:
    for verb in ("finetune", "pretrain", "lr-find", "benchmark"):
        check_fails([verb, "--image-folder", "folder", "--out", path], capfd)
    for action in ("list", "clear") if path != "loop" else ():
        line = check_fails(["cache", action, "--cache-dir", path], capfd)
        assert line.endswith("is a file; expected the folder of a cache")
    assert (folder / "text").read_text() == "hello\n"
