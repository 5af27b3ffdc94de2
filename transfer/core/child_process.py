"""Python processes that are started from this one and import the same code."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).absolute().parents[2]
"""The folder of the packages of this project, as the path of modules has it: site-packages, or a
clone. Links in it are left as they are."""

# Python puts the working folder first on the path of -m and -c, so that a file named random.py
# there would be imported for the standard library's. -P turns that off from Python 3.11 on only.
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
    """The command that runs a module of this project, as ``python -m`` does.

    The process imports the packages of the environment, of ``PYTHONPATH`` and of this project, but
    nothing from its working folder.

    Args:
        module: such as ``recipes``; it is run under the name ``__main__``.
        arguments: what it finds in ``sys.argv[1:]``, as strings.
    """
    return [sys.executable, "-c", _START, str(_ROOT), module, *map(str, arguments)]
