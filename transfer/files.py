"""Files written at once: nobody ever sees a half."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file to a temporary name in its folder, ``.NAME.tmp``, then rename it.

    Raises:
        OSError: names the file, and what stands against it; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
