"""Implementation of ``vgg-transfer inspect``; its flags are in ``recipes.inspect``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from recipes import console, terminal
from recipes.network_flags import parse_renames
from transfer import load_meta_graph
from transfer.models.inspection import Coverage, Inspection, Variables, inspect
from transfer.models.meta_graph import TensorInfo

MAX_ROWS = 8
_CUTS = "cuts for --freeze-until: activations per image, compute before, parameters after"


def run(model: Path, *, as_json: bool, rename: Sequence[str] = ()) -> str:
    """Inspect a model; returns what to print.

    Raises:
        FileNotFoundError, ValueError: if there is no graph to inspect.
    """
    inspection = inspect(load_meta_graph(model, rename=parse_renames(rename)))
    if as_json:
        return json.dumps(dataclasses.asdict(inspection), indent=2)
    return "\n".join(terminal.escaped(console.with_flags(line)) for line in _lines(inspection))


def _lines(inspection: Inspection) -> Iterable[str]:
    version = inspection.tensorflow_version
    written_by = f"TensorFlow {version}" if version else "unknown"
    yield (
        f"{inspection.model}: {inspection.format}, written by {written_by}, "
        f"{inspection.operations} operations"
    )
    yield from _section("inputs", _tensors(inspection.inputs))
    yield from _section("taps, best first", _tensors(inspection.taps))
    if inspection.all_taps:
        widths = ", ".join(
            f"{name.removesuffix(':0')} {n}" for name, n in inspection.all_taps.items()
        )
        count, total = len(inspection.all_taps), sum(inspection.all_taps.values())
        yield from _section("tap all", [f"{total:,} features of {count} activations: {widths}"])
    yield from _section(
        "variables",
        [f"{_amount(inspection.variables)}; {_amount(inspection.tap_variables)} for the first tap"],
    )
    yield from _section("checkpoint", _coverage(inspection.checkpoint))
    feeds = [
        f"{mode.tensor}  {mode.kind}: {mode.inference}, {mode.training} while training "
        f"(found by {mode.why})"
        for mode in inspection.feeds
    ]
    feeds += [
        f"{name}  unknown: needs a value, --feed {name}=VALUE" for name in inspection.unknown_feeds
    ]
    yield from _section("feeds", feeds)
    yield from _section(_CUTS, _cuts(inspection))
    yield from _section("hazards", inspection.hazards)
    if inspection.command:
        tried = [inspection.command, "with your own images: --image-folder DIR"]
    else:
        tried = [f"no command works without further flags: {inspection.command_problem}"]
    yield from _section("try first", tried)


def _section(title: str, lines: Sequence[str]) -> Iterable[str]:
    yield ""
    yield title
    shown = list(lines[:MAX_ROWS]) or ["none"]
    if len(lines) > MAX_ROWS:
        shown.append(f"and {len(lines) - MAX_ROWS} more (--json has all)")
    yield from (f"  {line}" for line in shown)


def _tensors(tensors: Sequence[TensorInfo]) -> list[str]:
    names = [tensor.name for tensor in tensors]
    shapes = [_shape(tensor) for tensor in tensors]
    widths = [max(map(len, column), default=0) for column in (names[:MAX_ROWS], shapes[:MAX_ROWS])]
    return [
        f"{name:{widths[0]}}  {shape:{widths[1]}}  {tensor.about}"
        for name, shape, tensor in zip(names, shapes, tensors, strict=True)
    ]


def _shape(tensor: TensorInfo) -> str:
    if tensor.shape is None:
        return f"{tensor.dtype} of unknown shape"
    return f"{tensor.dtype} [{', '.join('?' if n is None else str(n) for n in tensor.shape)}]"


def _amount(variables: Variables) -> str:
    return f"{variables.count} ({variables.parameters:,} parameters, {variables.megabytes:,} MB)"


def _cuts(inspection: Inspection) -> list[str]:
    """One line per stage of the network; --json has one entry per layer."""
    parameters = max(1, inspection.tap_variables.parameters)
    rows = []
    for cut in inspection.cuts:
        if not cut.ends_stage:
            continue
        shape = "unknown shape" if cut.shape is None else f"[{', '.join(map(str, cut.shape))}]"
        work = "" if cut.share is None else f"{cut.share:6.1%}"
        size = "" if cut.num_bytes is None else f"{cut.num_bytes / 1e3:,.1f} kB"
        after = f"{cut.trained / parameters:6.1%}"
        rows.append((cut.tensor.removesuffix(":0"), shape, size, work, after))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _coverage(coverage: Coverage) -> list[str]:
    if coverage.prefix is None:
        return ["not needed: the graph has no variables"]
    lines = [coverage.prefix]
    total = coverage.matched + len(coverage.missing) + len(coverage.different)
    if total:
        lines.append(
            f"{coverage.matched} of the graph's {total} variables matched, "
            f"{len(coverage.missing)} missing, {len(coverage.different)} different, "
            f"{len(coverage.extra)} extra entries"
        )
    for title in ("missing", "different", "extra"):
        if names := getattr(coverage, title):
            lines.append(f"{title}: {', '.join(names[:4])}{', ...' if names[4:] else ''}")
    return lines
