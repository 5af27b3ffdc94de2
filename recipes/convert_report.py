"""Text report of a conversion, printed by ``convert`` and ``pull``."""

from __future__ import annotations

from recipes import console, terminal
from transfer.vgg.published.conversion import Conversion


def lines_of(conversion: Conversion) -> list[str]:
    """Lines that describe the model, its origin, and the assumptions made."""
    num_classes, origin = conversion.num_classes, conversion.origin
    lines = [
        f"{conversion.network}, {conversion.num_parameters:,} parameters, "
        + ("no classes" if num_classes is None else f"{num_classes} classes"),
        f"layout: {conversion.layout}; preprocess: {conversion.card.preprocess}, "
        f"{conversion.why_preprocess}",
        f"origin: {origin}" if origin else "origin and licence: unknown by the file's hash",
    ]
    if conversion.left_out:
        lines.append(f"left out: {', '.join(conversion.left_out)}")
    lines += map(console.with_flags, conversion.notes)
    lines += [f"warning: {console.with_flags(warning)}" for warning in conversion.warnings]
    return [terminal.escaped(line) for line in lines]
