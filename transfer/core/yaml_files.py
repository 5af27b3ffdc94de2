"""Read and write YAML files of flags, which may be untrusted."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 100_000


class _Loader(yaml.SafeLoader):
    """Rejects aliases: nine lists, each with ten references to the previous one, expand to 10^9."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            name = self.peek_event().anchor  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases such as *{name} are not allowed")
        return super().compose_node(parent, index)


def read_flags(path: Path) -> dict[str, Any]:
    """Read a mapping of flag names to values.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not a regular file of at most ``MAX_BYTES`` with a YAML mapping.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{str(path)!r} is not a regular file; expected a YAML file with flags")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"{str(path)!r} has more than {MAX_BYTES:,} bytes; expected a YAML file with flags"
        )
    try:
        values = yaml.load(data, _Loader)
    except RecursionError:
        raise ValueError(f"{str(path)!r} is nested too deeply; expected flags") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a YAML file with flags: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        kind = "a mapping with other keys" if isinstance(values, dict) else _kind(values)
        raise ValueError(f"{str(path)!r} holds {kind}; expected names of flags and their values")
    return values


def _kind(value: Any) -> str:
    return "nothing" if value is None else repr(type(value).__name__)


def to_yaml(values: dict[str, Any]) -> str:
    """The YAML text of a mapping of flags."""
    return yaml.safe_dump(values, sort_keys=False)
