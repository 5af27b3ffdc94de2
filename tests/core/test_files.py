"""Atomic writes and safe deletion, beside links and files of other users."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import filelock
import pytest

from transfer.core import files


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file outside of the folder being written to."""
    path = tmp_path / "theirs.txt"
    path.write_text("theirs")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "results"
    path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "file", "pipe", "nothing"])
def test_existing_file_or_link_is_replaced_not_followed(
    folder: Path, theirs: Path, kind: str
) -> None:
    path = folder / "metrics.json"
    if kind == "hard link":
        os.link(theirs, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("before")
    elif kind != "nothing":
        path.symlink_to(theirs if kind == "link" else folder / "absent")
    files.write_text(path, "mine\r\n")
    assert path.read_bytes() == b"mine\r\n"
    assert files.is_regular(path)
    assert theirs.read_text() == "theirs"
    assert [p.name for p in folder.iterdir()] == ["metrics.json"]


def test_temporary_names_are_unpredictable(folder: Path, theirs: Path) -> None:
    for name in (".metrics.json.tmp", "metrics.json.tmp"):
        (folder / name).symlink_to(theirs)
    seen = set()
    for _ in range(3):
        with files.replacing(folder / "metrics.json") as temporary:
            assert temporary.parent == folder
            assert files.is_temporary(temporary.name, "metrics.json")
            assert not files.is_temporary(temporary.name, "other.json")
            assert files.is_regular(temporary)
            seen.add(temporary.name)
    assert len(seen) == 3
    assert theirs.read_text() == "theirs"


def test_file_with_long_name_is_written(folder: Path) -> None:
    path = folder / ("ä" * 120 + ".json")
    files.write_text(path, "x")
    assert path.read_text() == "x"


def test_file_mode_follows_umask(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(folder / "a", "x")
        with files.draft_folder(folder) as draft:
            assert stat.S_IMODE(draft.stat().st_mode) == 0o750
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_failed_write_keeps_existing_file(folder: Path, error: type) -> None:
    path = folder / "a"
    path.write_text("before")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\udcff")
    assert path.read_text() == "before"
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_file_is_on_the_disk_before_it_replaces_another(folder: Path, monkeypatch) -> None:
    path, calls, replace = folder / "a", [], os.replace
    path.write_text("before")

    def refused(descriptor: int) -> None:
        calls.append("fsync")
        raise OSError(reason, "refused")

    def replaced(*arguments: Path) -> None:
        calls.append("replace")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(os, "replace", replaced)
    reason = errno.ENOSPC
    with pytest.raises(OSError, match="refused: .*results/a'"):
        files.write_text(path, "after")
    assert (path.read_text(), calls) == ("before", ["fsync"])
    reason = errno.EINVAL  # of file systems that have no such call
    files.write_text(path, "after")
    assert (path.read_text(), calls) == ("after", ["fsync", "fsync", "replace"])


def test_an_error_names_the_file(folder: Path) -> None:
    (folder / "report.html").mkdir()
    with pytest.raises(IsADirectoryError, match="results/report.html'"):
        files.write_text(folder / "report.html", "x")
    with pytest.raises(FileNotFoundError, match="absent/report.html'"):
        files.write_text(folder / "absent" / "report.html", "x")
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.replacing(folder / "a"):
        (folder / "elsewhere").read_text()
    assert [p.name for p in folder.iterdir()] == ["report.html"]


def test_linked_folder_is_rejected(folder: Path, tmp_path: Path) -> None:
    files.make_folder(folder / "plots")
    files.make_folder(folder / "plots")
    (folder / "events").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError, match="events' is a link; .* remove it"):
        files.make_folder(folder / "events")


@pytest.mark.parametrize("is_hard", [False, True])
def test_lock_does_not_touch_link_target(folder: Path, theirs: Path, is_hard: bool) -> None:
    path = folder / ".lock"
    os.link(theirs, path) if is_hard else path.symlink_to(theirs)
    with files.lock(path):
        assert files.is_regular(path)
    assert theirs.read_text() == "theirs"


def test_lock_excludes_others_after_a_backup_by_hard_links(folder: Path) -> None:
    path = folder / ".lock"
    with files.lock(path):
        os.link(path, folder / "backup")
        with pytest.raises(filelock.Timeout):
            files.lock(path).acquire(timeout=0)


def test_only_known_files_are_deleted(folder: Path, theirs: Path) -> None:
    for name in ("a.index", "deep/b.index", "deep/notes.txt", "empty/c.index"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "d.index").symlink_to(theirs)
    (folder / "linked").symlink_to(theirs.parent)
    (theirs.parent / "e.index").write_text("theirs")
    names = re.compile(r"(.+/)?[^/]+\.index")
    files.remove_folder(folder, names)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.iterdir())
    assert left == ["d.index", "deep", "linked"]
    assert (folder / "deep" / "notes.txt").exists()
    assert theirs.read_text() == (theirs.parent / "e.index").read_text() == "theirs"
    files.remove_folder(folder / "linked", names)
    assert (theirs.parent / "e.index").exists()
    files.remove_folder(folder / "absent", names)


def test_drafts_of_killed_processes_are_deleted_by_the_next_draft(folder: Path) -> None:
    dead = folder / ".saving-0123456789abcdef"
    for name in ("vgg.meta", "vgg.labels.txt", ".saving-aaaabbbbccccdddd/vgg.json"):
        (dead / name).parent.mkdir(exist_ok=True, parents=True)
        (dead / name).write_text("x")
    dead.with_name(f"{dead.name}.lock").touch()
    with files.draft_folder(folder) as live:
        (live / "vgg.meta").write_text("mine")
        with files.draft_folder(folder) as other:
            assert {p.name for p in folder.iterdir()} == {
                name for draft in (live, other) for name in (draft.name, f"{draft.name}.lock")
            }
            files.remove_drafts(folder)
        assert (live / "vgg.meta").read_text() == "mine"
    assert not list(folder.iterdir())


def test_only_draft_folders_are_deleted(folder: Path) -> None:
    for name in (
        ".saving-0123456789abcdef",
        ".saving-ab_cdef1",
        ".saving-photos",
        ".saving-01234567",
    ):
        (folder / name).mkdir()
        (folder / name / "model.index").write_text("x")
    (folder / ".saving-01234567" / "a.jpg").write_text("mine")
    files.remove_drafts(folder)
    assert sorted(p.name for p in folder.iterdir()) == [".saving-01234567", ".saving-photos"]
    assert (folder / ".saving-photos" / "model.index").exists()
    assert (folder / ".saving-01234567" / "a.jpg").exists()
