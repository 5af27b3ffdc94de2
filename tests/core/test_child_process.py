"""Child processes import from this project and the environment, not the working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from transfer.core import child_process

WOULD_BE_IMPORTED = ("transfer", "recipes", "numpy", "random", "runpy", "json", "tensorflow")


@pytest.fixture
def newcomers_folder(tmp_path: Path) -> Path:
    """Files and folders with names of imported modules; importing one ends the process."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, name in enumerate(WOULD_BE_IMPORTED):
        module = folder / name / "__init__.py" if number % 2 else folder / f"{name}.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(f"raise SystemExit('imported the {name} of the working folder')")
    return folder


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_working_folder_is_not_imported(newcomers_folder: Path, safe_path: str) -> None:
    command = child_process.command("recipes", "finetune", "--help")
    done = run(command, newcomers_folder, PYTHONSAFEPATH=safe_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--freeze-until" in done.stdout


def test_module_of_clone_is_run_with_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, work, other = tmp_path / "clone", tmp_path / "work", tmp_path / "other"
    for folder in (clone, work, other):
        folder.mkdir()
    (clone / "mine.py").write_text("import sys, theirs\nprint(__name__, sys.argv[1:], theirs.X)")
    (other / "theirs.py").write_text("X = 'from PYTHONPATH'")
    monkeypatch.setattr(child_process, "_ROOT", clone)
    done = run(child_process.command("mine", "a b", 3), work, PYTHONPATH=str(other))
    assert done.stdout.strip() == "__main__ ['a b', '3'] from PYTHONPATH", done.stderr


def test_the_last_line_tells_why_a_logged_process_failed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("of an earlier process, which was longer\n" * 9)
    program = "import sys; print('begun'); sys.exit('error: no images')"
    status, last = child_process.run_logged([sys.executable, "-c", program], log)
    assert (status, last) == (1, "error: no images")
    assert sorted(log.read_text().splitlines()) == ["begun", "error: no images"]
    silent = [sys.executable, "-c", "import os; assert os.environ['MODE'] == 'a'"]
    assert child_process.run_logged(silent, log, {**os.environ, "MODE": "a"}) == (0, "")
