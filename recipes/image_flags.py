"""The flags that name labelled images, shared by the commands that take some, and the argument
``IMAGES``."""

# No `from __future__ import annotations`: flags of subcommands inherit from these, and their types
# are looked up in the module of the subclass.
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

if TYPE_CHECKING:
    from transfer.data.dataset import Source

Images = Annotated[
    Path | None,
    Parameter(
        help="Image folder or manifest; the same as --image-folder or --csv.", show_default=False
    ),
]
Flags = TypeVar("Flags", bound="ImageFlags")


@Parameter(name="*")  # also of the subclasses: --dataset, not --config.dataset
@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Where the images are."""

    dataset: str | None = None
    """Name of a tfds dataset. [default: digits, which is embedded]"""
    data_dir: str | None = None
    """Directory of tfds datasets, or of one prepared dataset. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """Folder with one subfolder of images per class, or with split folders that contain them;
    replaces --dataset."""
    csv: str | None = None
    """Manifest: a CSV, JSONL or Parquet file with the columns path and label, and optionally split
    and group; a file or an fsspec URL. Replaces --dataset."""

    def with_images(self: Flags, images: Path | None) -> Flags:
        """The flags with the image folder, or the manifest, that was given as an argument.

        Raises:
            ValueError: if it does not exist, or images are given by a flag as well.
        """
        if images is None:
            return self
        if other := self.image_folder or self.csv or self.dataset:
            raise ValueError(
                f"images are given twice: {str(images)!r} and {other!r}; leave out one of them"
            )
        if images.expanduser().is_dir():
            return dataclasses.replace(self, image_folder=str(images))
        if images.expanduser().is_file():
            return dataclasses.replace(self, csv=str(images))
        raise ValueError(
            f"{str(images)!r} is neither a folder of images nor a manifest; a tfds dataset is "
            "named by --dataset"
        )

    def open(self, min_classes: int = 2) -> "Source":
        """Open the images; see ``transfer.open_source``, which imports TensorFlow."""
        from transfer.data.sources import open_source

        return open_source(
            self.dataset or "",
            data_dir=self.data_dir,
            image_folder=self.image_folder,
            csv=self.csv,
            group_by=getattr(self, "group_by", None),
            min_classes=min_classes,
        )


@dataclass(frozen=True, kw_only=True)
class SplitFlags(ImageFlags):
    """Where the images are, and which of them are trained and evaluated on."""

    group_by: str | None = None
    """What groups the images, e.g. by patient, camera or video: a column of the manifest, or a
    regular expression on the paths of an image folder, e.g. 'patient(\\d+)'. Images that are held
    out automatically share no group with those that are trained on; given splits are not changed.
    [default: the column group, if the manifest has one]"""
    train_split: str = "auto"
    """Split to train on, e.g. train[:80%]."""
    eval_split: str = "auto"
    """Split to evaluate on. auto: the validation or test split if there is one, else 20 % of each
    class held out of the training split."""
