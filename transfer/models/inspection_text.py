"""The text of an inspection: one screen with what matters first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tabulate import tabulate

from transfer.core.escapes import escaped
from transfer.graph.cuts import Cut
from transfer.models.inspection import Coverage, Inspection, Variables
from transfer.models.meta_graph import TensorInfo

_CUTS = "cuts for freeze_until=TENSOR: activations per image, compute before, parameters after"


def describe(inspection: Inspection, max_rows: int = 8) -> Iterator[str]:
    """Describe a model, in lines.

    Args:
        inspection: the result of ``inspect``.
        max_rows: maximum number of rows of a section; the others are counted.

    Example:
        >>> from transfer import load_meta_graph
        >>> from transfer.models.inspection import inspect
        >>> from transfer.models.inspection_text import describe
        >>> lines = describe(inspect(load_meta_graph("embedded")))
        >>> [line for line in lines if "matched" in line]
        ["  22 of the graph's 22 variables matched, 0 missing, 0 different, 0 extra entries"]
    """
    version = inspection.tensorflow_version
    written_by = f"TensorFlow {version}" if version else "unknown"
    yield escaped(
        f"{inspection.model}: {inspection.format}, written by {written_by}, "
        f"{inspection.operations} operations"
    )
    for title, rows in _sections(inspection):
        yield ""
        yield title
        cells = [[escaped(cell) for cell in row] for row in rows[:max_rows]] or [["none"]]
        # Shares in percent are numbers; everything else is text.
        align = ["right" if cell.endswith("%") else "left" for cell in cells[0]]
        table = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align)
        yield from (f"  {line}".rstrip() for line in table.splitlines())
        if len(rows) > max_rows:
            yield f"  and {len(rows) - max_rows} more"


def _sections(inspection: Inspection) -> Iterator[tuple[str, Sequence[Sequence[str]]]]:
    """Titles, and rows of cells."""
    yield "inputs", [_tensor(tensor) for tensor in inspection.inputs]
    yield "taps, best first", [_tensor(tensor) for tensor in inspection.taps]
    if taps := inspection.all_taps:
        widths = ", ".join(f"{name.removesuffix(':0')} {width}" for name, width in taps.items())
        total = sum(taps.values())
        yield "tap all", [[f"{total:,} features of {len(taps)} activations: {widths}"]]
    amounts = f"{_amount(inspection.variables)}; {_amount(inspection.tap_variables)}"
    yield "variables", [[f"{amounts} for the first tap"]]
    yield "checkpoint", [[line] for line in _coverage(inspection.checkpoint)]
    feeds = [
        f"{mode.tensor}  {mode.kind}: {mode.inference}, {mode.training} while training "
        f"(found by {mode.why})"
        for mode in inspection.feeds
    ]
    feeds += [
        f"{name}  unknown: needs a value, feeds={{'{name}': VALUE}}"
        for name in inspection.unknown_feeds
    ]
    yield "feeds", [[line] for line in feeds]
    parameters = max(1, inspection.tap_variables.parameters)
    yield _CUTS, [_cut(cut, parameters) for cut in inspection.cuts if cut.ends_stage]
    yield "hazards", [[line] for line in inspection.hazards]
    if inspection.command:
        tried = [inspection.command, "with your own images: image_folder=DIR"]
    else:
        tried = [f"no command works without further flags: {inspection.command_problem}"]
    yield "try first", [[line] for line in tried]


def _tensor(tensor: TensorInfo) -> tuple[str, str, str]:
    if tensor.shape is None:
        return tensor.name, f"{tensor.dtype} of unknown shape", tensor.about
    sizes = ", ".join("?" if size is None else str(size) for size in tensor.shape)
    return tensor.name, f"{tensor.dtype} [{sizes}]", tensor.about


def _amount(variables: Variables) -> str:
    return f"{variables.count} ({variables.parameters:,} parameters, {variables.megabytes:,} MB)"


def _cut(cut: Cut, parameters: int) -> tuple[str, ...]:
    """Tensor, shape, bytes, share of the multiply-adds before, share of the parameters after."""
    return (
        cut.tensor.removesuffix(":0"),
        "unknown shape" if cut.shape is None else f"[{', '.join(map(str, cut.shape))}]",
        "" if cut.num_bytes is None else f"{cut.num_bytes / 1e3:,.1f} kB",
        "" if cut.share is None else f"{cut.share:.1%}",
        f"{cut.trained / parameters:.1%}",
    )


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
