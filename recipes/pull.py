"""Download published VGG weights and convert them to a meta graph.

    vgg-transfer pull vgg16 --out models/vgg16

The weights are those of Keras Applications, which were converted from the original weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from recipes import console, terminal
from recipes.startup import job


def pull(
    name: Annotated[Literal["vgg16", "vgg19"], Parameter(help="Network to download.")],
    *,
    out: Annotated[
        Path | None,
        Parameter(help="Checkpoint prefix of the model to write. [default: models/NAME]"),
    ] = None,
    convolutional: Annotated[
        bool, Parameter(help="Write fc6 to fc8 as convolutions, to accept images of any size.")
    ] = False,
) -> int:
    """Download the published weights of VGG16 or VGG19 and convert them to a meta graph."""
    with job():
        from recipes.convert_report import lines_of
        from transfer.vgg.published.download import pull as pull_weights

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
    print(f"probabilities differ from Keras' by at most {pulled.max_difference:.1g}")
    print(terminal.escaped(str(pulled.conversion.prefix)))
    return 0
