"""Flags as values: which are given, which are options of the library, which words set them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def options_of(kind: type[Options], config: Any) -> Options:
    """The flags that are options of the library: the fields of the dataclass ``kind``."""
    return kind(**{option.name: getattr(config, option.name) for option in fields(kind)})


def changed(config: Any) -> dict[str, Any]:
    """The flags whose values are not their defaults."""
    defaults = {option.name: option.default for option in fields(config)}
    values = {name: getattr(config, name) for name in defaults}
    return {name: value for name, value in values.items() if value != defaults[name]}


def given_of(config: Any, *names: str, **allowed: Sequence[Any]) -> str:
    """Which of the flags ``names`` are given, for a message; empty if none is. ``allowed`` are
    further flags, with values that count as not given besides their defaults."""
    given = changed(config)
    found = [name for name in names if name in given]
    found += [name for name, values in allowed.items() if given.get(name, values[0]) not in values]
    return ", ".join(map(flag_of, found))


def flag_of(option: str) -> str:
    """The flag of an option."""
    return f"--{option.replace('_', '-')}"


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """The words of a command that set these flags; ``None`` is left out."""
    words = []
    for name, value in flags.items():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, bool):
                words.append(flag_of(name if one else f"no_{name}"))
            elif one is not None:
                words += [flag_of(name), str(one)]
    return words
