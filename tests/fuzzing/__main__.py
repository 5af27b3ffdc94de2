"""Fuzz the loading of models: damaged models must give a result or a clean error.

    python tests/fuzzing --count 3000
    python tests/fuzzing --only meta:123        repeat one input, with its traceback
    python tests/fuzzing --operations 20000     fuzz calls of allowed operations instead
    python tests/fuzzing --operation 123        repeat one of these calls

An input is a model with one modified file: bits, bytes and lengths of any file, or the contents of
protobufs, checkpoint tables and JSON with valid checksums. An input is determined by its kind and
its number. A worker process loads it, inspects it, builds a ``Backbone`` and calls it. Accepted
outcomes are a result, a ``ValueError`` or an ``OSError``, and in the call also TensorFlow's errors
for wrong shapes (``InvalidArgumentError``) and too large results (``ResourceExhaustedError``).
Failures are any other exception, a crash, more than 20 seconds, and more than 2 GB of memory.

For weight files, the worker reads the file and identifies its layout.

The original models are made here; those in ``../shared/wild`` are used if that folder exists. All
temporary files are deleted.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import operations
from common import KINDS, OUTCOMES, WILD, WORKERS, Base, Result
from supervisor import Supervisor


def shares(count: int, kinds: Sequence[str]) -> dict[str, int]:
    """The number of inputs of each kind."""
    total = sum(KINDS[kind] for kind in kinds)
    return {kind: max(1, count * KINDS[kind] // total) for kind in kinds}


def interleaved(numbers: dict[str, range]) -> list[tuple[str, int]]:
    """Inputs of all kinds, interleaved in proportion to their numbers."""
    placed = [
        ((place + 0.5) / len(span), kind, number)
        for kind, span in numbers.items()
        for place, number in enumerate(span)
    ]
    return [(kind, number) for _, kind, number in sorted(placed)]


def table(results: Sequence[Result]) -> str:
    head = ["kind", "tried", *OUTCOMES, "peak MB", "slowest s"]
    rows = [head]
    kinds = [kind for kind in KINDS if any(result.kind == kind for result in results)]
    for kind in [*kinds, "all"]:
        of_kind = [r for r in results if kind in (r.kind, "all")]
        counts = collections.Counter(result.outcome for result in of_kind)
        slowest = max(of_kind, key=lambda result: result.seconds)
        largest = max(of_kind, key=lambda result: result.growth)
        rows.append(
            [
                kind,
                str(len(of_kind)),
                *(str(counts[outcome]) for outcome in OUTCOMES),
                f"{largest.growth / 2**20:.0f} ({largest.kind}:{largest.number})",
                f"{slowest.seconds:.1f} ({slowest.kind}:{slowest.number})",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Failures grouped by kind and place, the most frequent first."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[result.outcome, result.stage, result.error, result.where].append(result)
    return sorted(groups.values(), key=len, reverse=True)


def show_groups(results: Iterable[Result], command: str, traces: bool) -> None:
    for group in grouped(results):
        first = group[0]
        numbers = ", ".join(f"{result.kind}:{result.number}" for result in group[:8])
        more = " ..." if len(group) > 8 else ""
        print(
            f"\n{first.outcome} in {first.stage}: {first.error} {first.where} "
            f"({len(group)} inputs: {numbers}{more})"
        )
        print(f"  {first.base or '?'}, {first.mutation or '?'}: {first.message[:300]}")
        if traces:
            if first.number >= 0:
                print(f"  again: {command} --only {first.kind}:{first.number}")
            print("  " + first.trace.strip().replace("\n", "\n  "))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=3000, help="number of inputs of all kinds")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input of a kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated kinds of inputs")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="repeat this input with full output")
    parser.add_argument(
        "--operations",
        type=int,
        metavar="COUNT",
        help="calls, see operations.py",
    )
    parser.add_argument("--operation", type=int, metavar="NUMBER", help="repeat this call")
    parser.add_argument("--workers", type=int, default=WORKERS, help="number of worker processes")
    parser.add_argument("--wild", type=Path, default=WILD, help="folder with cases.json, or none")
    parser.add_argument("--limit", type=float, default=20.0, help="time limit per input in seconds")
    parser.add_argument("--memory", type=int, default=2048, help="memory limit per input in MB")
    parser.add_argument("--verbose", action="store_true", help="also list clean errors")
    options = parser.parse_args(arguments)
    options.kinds = options.kinds.split(",")
    if options.only:
        kind, _, number = options.only.partition(":")
        options.kinds, options.only = [kind], int(number)
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no kinds {sorted(unknown)}; there are {', '.join(KINDS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.operations is not None or options.operation is not None:
        first = options.seed if options.operation is None else options.operation
        numbers = range(first, first + (options.operations or 1))
        with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as temporary:
            verbose = options.verbose or options.operation is not None
            workers = min(options.workers, len(numbers))
            return operations.main(numbers, Path(temporary), workers, options.limit, verbose)
    wild = options.wild if (options.wild / "cases.json").is_file() else None
    command = "python tests/fuzzing" + ("" if wild == WILD else f" --wild {wild or 'none'}")
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as temporary:
        root = Path(temporary)
        workers = 1 if options.only is not None else options.workers
        supervisor = Supervisor(root, workers, options.limit, options.memory)
        try:
            made = root / "bases"
            made.mkdir()
            bases: dict[str, list[Base]] = collections.defaultdict(list)
            for base in supervisor.bases(made, wild):
                bases[base.kind].append(base)
            if options.only is not None:
                jobs = [(options.kinds[0], options.only)]
            else:
                controls = [
                    (kind, -1 - position)
                    for kind in options.kinds
                    for position, base in enumerate(bases[kind])
                    if base.complete
                ]
                counts = shares(options.count, options.kinds)
                numbers = {k: range(options.seed, options.seed + counts[k]) for k in counts}
                jobs = [*controls, *interleaved(numbers)]
            results = []
            for result in supervisor.run(jobs, bases):
                results.append(result)
                if result.failed:
                    print(f"{result.kind}:{result.number} {result.outcome}", flush=True)
        finally:
            supervisor.stop()
    controls_failed = [r for r in results if r.number < 0 and r.failed]
    if controls_failed:
        print(f"\n{len(controls_failed)} models do not load as they are:")
        show_groups(controls_failed, command, traces=True)
    tried = [result for result in results if result.number >= 0]
    failed = [result for result in tried if result.failed]
    show_groups(failed, command, traces=True)
    if options.verbose or options.only is not None:
        show_groups(
            [result for result in tried if not result.failed],
            command,
            traces=options.only is not None,
        )
    if tried:
        print(f"\n{table(tried)}")
    return 1 if failed or controls_failed else 0


if __name__ == "__main__":
    sys.exit(main())
