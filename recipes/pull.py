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
from transfer.vgg.published import catalogue


def pull(
    name: str | None = None,
    *,
    out: Path | None = None,
    convolutional: bool = False,
    list_: Annotated[bool, Parameter(name="--list", negative=())] = False,
) -> int:
    """Download published weights of a VGG and convert them to a meta graph.

    Args:
        name: Weights to download; --list shows them.
        out: Checkpoint prefix of the model to write. [default: models/NAME]
        convolutional: Write fc6 to fc8 as convolutions, to accept images of any size.
        list_: Print the catalogue: names, hashes, licences.
    """
    if list_:
        print(catalogue.table())
        return 0
    with job():
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
    print("\n".join(map(console.with_flags, pulled.describe())))
    print(terminal.escaped(str(pulled.conversion.prefix)))
    return 0
