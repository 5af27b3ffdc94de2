"""Compute the features of images, for t-SNE, nearest neighbours, or classifiers of other tools.

    vgg-transfer features photos --out features.npz
    vgg-transfer features --dataset tf_flowers --model vgg16 --tap pool5,fc7 --out features.parquet

They are kept in the activation cache, like those of finetune.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.image_flags import ImageFlags, Images
from recipes.startup import job


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(ImageFlags):
    """Flags of ``vgg-transfer features``, with their defaults."""

    out: Path
    """File to write: .npz (values, labels, names, class_names), .npy (values only), .csv or
    .parquet (a row per image with name and label)."""
    model: str = "embedded"
    """Model, as for finetune, or the run folder of a fine-tuned one."""
    tap: str | None = None
    """Tensor with the features, or several, separated by commas, or all: average and
    maximum of every activation after a nonlinearity. [default: the card's, else fc7]"""
    preprocess: str | None = None
    """Preprocessing that the weights expect. [default: the card's]"""
    image_size: str | None = None
    """In pixels: one number, or HEIGHTxWIDTH. [default: the model's]"""
    split: str | None = None
    """Images to use, e.g. train or test[:50%]. [default: all]"""
    cache_dir: Path | None = None
    """Folder of the activation cache. [default: vgg-transfer/activations in the user's cache
    folder]"""


def features(images: Images = None, /, *, config: FeaturesConfig) -> int:
    """Write the features of images to a file, with their names and labels."""
    config = config.with_images(images)
    with job():
        from transfer import Backbone, extract_features, load_meta_graph
        from transfer.activations.feature_files import check_path, save_features
        from transfer.finetuning.options import parse_tap
        from transfer.images.preprocess import parse_size

        check_path(config.out.expanduser())
        graph = load_meta_graph(config.model)
        backbone = Backbone(graph, parse_tap(config.tap))
        size = None if config.image_size is None else parse_size(config.image_size)
        preprocess = graph.preprocess(backbone.network.input, config.preprocess, size)
        source = config.open()
        split = source.split(config.split or "+".join(source.split_names))
        found = extract_features(backbone, split, preprocess, cache_dir=config.cache_dir)
        save_features(found, config.out)
    print(f"{len(found)} images, {found.values.shape[1]} features")
    print(config.out)
    return 0
