"""Download published VGG weights and convert them to a meta graph.

    vgg-transfer pull --list
    vgg-transfer pull vgg16 --out models/vgg16
    vgg-transfer pull vgg19_bn-torchvision

vgg16 and vgg19 are those of Keras Applications, which were converted from the original weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from recipes import console, terminal
from recipes.startup import job
from transfer.vgg.published.catalogue import CATALOGUE, Entry


def pull(
    name: Annotated[str | None, Parameter(help="Weights to download; --list shows them.")] = None,
    *,
    out: Annotated[
        Path | None,
        Parameter(help="Checkpoint prefix of the model to write. [default: models/NAME]"),
    ] = None,
    convolutional: Annotated[
        bool, Parameter(help="Write fc6 to fc8 as convolutions, to accept images of any size.")
    ] = False,
    list_: Annotated[
        bool,
        Parameter(name="--list", negative=(), help="Print the catalogue: names, hashes, licences."),
    ] = False,
) -> int:
    """Download published weights of a VGG and convert them to a meta graph."""
    if list_:
        print("\n".join(_table([*CATALOGUE.values()])))
        return 0
    with job():
        from recipes.convert_report import lines_of
        from transfer.vgg.published.download import pull as pull_weights

        if name is None:
            raise ValueError("no weights are named; see: vgg-transfer pull --list")
        try:
            pulled = pull_weights(
                name,
                out or Path("models") / name,
                convolutional=convolutional,
                progress=console.download_bar,
            )
        except ConnectionError as error:
            raise ConnectionError(f"{error}: vgg-transfer convert FILE --out PREFIX") from error
    print("\n".join(lines_of(pulled.conversion)))
    if pulled.max_difference is not None:
        print(f"probabilities differ from Keras' by at most {pulled.max_difference:.1g}")
    print(
        "unverified: no hash of this file is published"
        if pulled.verified_by == "unverified"
        else f"verified by its published {pulled.verified_by}"
    )
    print(terminal.escaped(str(pulled.conversion.prefix)))
    return 0


def _table(entries: list[Entry]) -> list[str]:
    """The catalogue as aligned text."""
    rows = [("name", "published by", "top-1", "top-5", "preprocess", "verified by", "licence")]
    for entry in entries:
        accuracy = [f"{value:.3f}" for value in entry.accuracy or ()] or ["-", "-"]
        mode = entry.preprocess if isinstance(entry.preprocess, str) else "means"
        licence = (entry.licence or "not stated").split(" (")[0]
        published = f"{entry.publisher}, {entry.trained_on}"
        rows.append(
            (entry.name, published, *accuracy, mode if entry.preprocess else "?",
             entry.verified_by, licence)
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
