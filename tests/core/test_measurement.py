import os
import subprocess

from transfer.core.measurement import git_revision


def test_revision_runs_no_program_of_the_folder(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat\n")
    program.chmod(0o755)
    git("init", "--quiet")
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / ".gitattributes").write_text("*.txt filter=theirs\n")
    git("add", "file.txt", ".gitattributes")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "x")
    git("config", "core.fsmonitor", str(program))
    git("config", "filter.theirs.clean", str(program))
    os.utime(tmp_path / "file.txt", (1, 1))  # so that git would compare its content
    (tmp_path / "ran").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    revision = git_revision()
    assert not (tmp_path / "ran").exists()
    assert revision is not None and not revision["changed"]
    (tmp_path / "file.txt").write_text("else")
    assert git_revision()["changed"]


def test_no_revision_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
