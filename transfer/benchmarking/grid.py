"""The axes of a study: options of ``fine_tune`` with several values each, as text."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transfer.finetuning.options import FineTuneOptions, options_from

DEFAULT = "default"
"""Stands for the default of an option."""


def parse_grid(text: str) -> dict[str, list[Any]]:
    """The axes of a grid, in the order of the text.

    Axes are separated by spaces, the values of an axis by commas. If there is a vertical bar in an
    axis, its values are separated by bars, and may contain commas: ``tap=fc7|pool4,pool5,fc7`` are
    two values, ``tap=pool4,pool5,fc7|`` is one. ``default`` is the default of the option.

    Args:
        text: such as ``"shots_per_class=5,20 freeze_until=tap,pool4,none"``.

    Raises:
        TypeError: for a name that is not an option of ``fine_tune``.
        ValueError: if the text is not of this form, a value does not fit its option, or an option
            or a value occurs twice.

    Example:
        >>> from transfer.benchmarking.grid import parse_grid
        >>> parse_grid("shots_per_class=5,default tap=fc7|pool4,pool5")
        {'shots_per_class': [5, None], 'tap': ['fc7', 'pool4,pool5']}
    """
    axes: dict[str, list[Any]] = {}
    hints = get_type_hints(FineTuneOptions)
    for word in text.split():
        name, equals, listed = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not equals or not listed:
            raise ValueError(f"grid: {word!r} is not an axis; expected OPTION=VALUE,VALUE,...")
        if name in axes:
            raise ValueError(f"grid: {name} occurs twice; list all of its values at once")
        if name not in hints:
            options_from({name: None})  # raises, and suggests the nearest option
        separator = "|" if "|" in listed else ","
        texts = listed.removesuffix("|").split(separator)
        axes[name] = [_value(name, hints[name], value) for value in texts]
        if len(set(axes[name])) < len(axes[name]):
            raise ValueError(f"grid: {word!r} lists a value twice")
    if not axes:
        raise ValueError("the grid is empty; expected OPTION=VALUE,VALUE,... separated by spaces")
    return axes


def show_grid(axes: Mapping[str, Sequence[Any]]) -> str:
    """The text that ``parse_grid`` reads as these axes."""
    words = []
    for name, values in axes.items():
        texts = [show_value(value) for value in values]
        has_commas = any("," in text or not text for text in texts)
        words.append(f"{name}={'|'.join(texts)}|" if has_commas else f"{name}={','.join(texts)}")
    return " ".join(words)


def show_value(value: Any) -> str:
    """A value as in a grid."""
    if value is None:
        return DEFAULT
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _value(name: str, hint: Any, text: str) -> Any:
    if text == DEFAULT:
        option = next(option for option in fields(FineTuneOptions) if option.name == name)
        return option.default if option.default is not MISSING else None
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    expected = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _converted(kind, text)
            except ValueError:
                expected.append(_described(kind))
    raise ValueError(f"grid: {name}={text!r}; expected {' or '.join(expected)}")


def _converted(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if get_origin(kind) is tuple:
        (element, _) = get_args(kind)
        return tuple(element(part) for part in text.split(",") if part)
    return kind(text)


def _described(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "integers separated by commas"
    return {int: "an integer", float: "a number"}.get(kind, "a text")
