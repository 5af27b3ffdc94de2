"""Start child Python processes that import the same code as this one."""

from __future__ import annotations

import sys
from pathlib import Path

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
