"""The optional argument ``IMAGES`` of commands that take labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast

from cyclopts import Parameter

Images = Annotated[
    Path | None,
    Parameter(
        help="Image folder or manifest; the same as --image-folder or --csv.", show_default=False
    ),
]


class ImageFlags(Protocol):
    """A dataclass of flags with these three."""

    @property
    def dataset(self) -> str | None: ...

    @property
    def image_folder(self) -> str | None: ...

    @property
    def csv(self) -> str | None: ...


Config = TypeVar("Config", bound=ImageFlags)


def with_images(config: Config, images: Path | None) -> Config:
    """Flags with the image folder, or the manifest, that was given as an argument.

    Raises:
        ValueError: if it does not exist, or images are given by a flag as well.
    """
    if images is None:
        return config
    if other := config.image_folder or config.csv or config.dataset:
        raise ValueError(
            f"images are given twice: {str(images)!r} and {other!r}; leave out one of them"
        )
    if images.expanduser().is_dir():
        return cast(Config, dataclasses.replace(cast(Any, config), image_folder=str(images)))
    if images.expanduser().is_file():
        return cast(Config, dataclasses.replace(cast(Any, config), csv=str(images)))
    raise ValueError(
        f"{str(images)!r} is neither a folder of images nor a manifest; a tfds dataset is named by "
        "--dataset"
    )
