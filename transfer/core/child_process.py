"""Start child Python processes that import the same code as this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transfer.core import files

_ROOT = Path(__file__).absolute().parents[2]
"""The ``sys.path`` entry with the packages of this project: site-packages, or a clone. Symbolic
links in it are not resolved."""

# With -m and -c Python puts the working folder first on sys.path, so that a file random.py there
# would shadow the standard library's. -P, which turns that off, needs Python 3.11.
_START = """\
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
root, module = sys.argv[1:3]
del sys.argv[1:3]
if root not in sys.path:
    sys.path.insert(0, root)
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def command(module: str, *arguments: object) -> list[str]:
    """The command line that runs a module of this project like ``python -m``.

    The process can import the packages of the environment, of ``PYTHONPATH`` and of this project,
    but nothing from its working folder.

    Args:
        module: for example ``recipes``; run under the name ``__main__``.
        arguments: passed as strings in ``sys.argv[1:]``.
    """
    return [sys.executable, "-c", _START, str(_ROOT), module, *map(str, arguments)]


def run_logged(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a command to its end; it is terminated if this process is interrupted.

    Args:
        command: see ``command``.
        log: file for its output, which is replaced.
        environment: its variables. Default: those of this process.

    Returns:
        Its exit status, and the last line of its output.
    """
    files.unshare(log)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return status, lines[-1] if lines else ""
