"""All that is found out of a fine-tuning run before the work begins."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from recipes import measure, run_data, run_folder, terminal
from recipes.finetune import EMBEDDED, FinetuneConfig
from recipes.finetune_stages import Stage, asked_for, resolve, rms
from recipes.fingerprint_cache import remembered
from recipes.network_flags import (
    parse_feed,
    parse_renames,
    report,
    warn_if_prepared_twice,
    warn_if_stopped,
)
from transfer import Backbone, Classifier, Head, MetaGraph, data_checks, load_meta_graph
from transfer.backbone import GraphLayer
from transfer.data import (
    MAX_COMPARED,
    Source,
    Split,
    UnreadableImageError,
    few_shot,
    find_unreadable,
)
from transfer.distribution import Replicas
from transfer.exports.meta_graph import check_savable
from transfer.files import write_names
from transfer.head import average_over_space
from transfer.model_plan import plan
from transfer.preprocess import Preprocess, parse_size, show_size
from transfer.surgery import Network, cut, is_seeded

EMBEDDED_MODEL = str(files("pretrained") / "vgg_small")
DEFAULT_BATCH = 32
# Deviation of the logits before training. A new head that is sure of what it does not know costs
# steps to unlearn, and spoils the backbone's weights in the meantime.
FIRST_LOGITS = 0.1


@dataclass(frozen=True)
class Job:
    """What to train on what; ``config`` has nothing left to default. ``images`` tells those that
    are trained and evaluated on from all others, ``unreadable`` says of those left out, why."""

    config: FinetuneConfig
    out: Path
    graph: MetaGraph
    classifier: Classifier
    stages: list[Stage]
    train: Split
    held_out: Split
    images: dict[str, Any]
    unreadable: dict[str, str]
    replicas: Replicas

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.batch_size)

    @property
    def last_cut(self) -> str:
        return self.stages[-1].cut


def prepare(config: FinetuneConfig, replicas: Replicas | None = None) -> Job:
    """Open model and data; nothing is written yet.

    Raises:
        ValueError, OSError: see the library functions; nearly all before any slow work.
    """
    replicas = replicas or Replicas()
    replicas.check_same("set of flags", _alike(config))
    _check(config, replicas)
    graph = load_meta_graph(
        EMBEDDED_MODEL if config.model == EMBEDDED else config.model,
        rename=parse_renames(config.rename),
    )
    source = run_data.open_and_warn(
        config.dataset, data_dir=config.data_dir, image_folder=config.image_folder
    )
    is_kept = config.cache == "disk"
    with remembered(source, config.cache_dir) if is_kept else contextlib.nullcontext():
        train, held_out, unreadable = _splits(config, source)
        images = _look_at(train, held_out)
    config = replace(config, batch_size=config.batch_size or min(DEFAULT_BATCH, len(train)))
    classifier, features, config = _classifier(config, graph, train, replicas)
    replicas.check_same("choice of images", images)
    _check_repeatable(classifier, held_out, config.keep_dropout)
    stages, config = _stages(config, classifier, features, train)
    out = config.out or run_folder.default_out(train.source.name, config.freeze_until)
    out = Path(replicas.from_chief(str(out.resolve())))
    config = replace(config, out=out)
    return Job(
        config, out, graph, classifier, stages, train, held_out, images, unreadable, replicas
    )


def write_down(job: Job) -> None:
    """What is evaluated on, and what the run was made with and of.

    Raises:
        ValueError: if the run is resumed with another model or other images.
    """
    out = job.out
    provenance = {
        "command": ["vgg-transfer", *sys.argv[1:]],
        "git": measure.git_revision(),
        "versions": measure.versions(),
        "model": {"name": job.config.model, "sha256": job.classifier.backbone.digest()},
        "dataset": {"name": job.train.source.name} | job.images,
    }
    path = out / run_folder.PROVENANCE
    if path.is_file():
        began = run_folder.read_json(path)
        changed = [part for part in ("model", "dataset") if began.get(part) != provenance[part]]
        if changed:
            raise ValueError(
                f"cannot resume the run in {str(out)!r}: its {' and '.join(changed)} changed since "
                f"it began (see {path.name}); start anew, with another --out"
            )
        return
    write_names(out / run_folder.HELD_OUT, job.held_out.names)
    run_folder.write_json(path, provenance)


def _alike(config: FinetuneConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What all workers must have alike; where they find things may differ."""
    places = ("model", "data_dir", "image_folder", "out", "cache_dir", "cache_limit")
    return {k: v for k, v in vars(config).items() if k not in places}, measure.versions()


def _check(config: FinetuneConfig, replicas: Replicas) -> None:
    """What can be said of the flags alone."""
    limits = {
        "epochs": (config.epochs, 1),
        "batch size": (config.batch_size, 1),
        "shots per class": (config.shots_per_class, 1),
        "early stopping": (config.early_stopping, 1),
        "skip unreadable": (config.skip_unreadable, 0),
        "accumulate": (config.accumulate, 1),
        "max to keep": (config.max_to_keep, 0),
        "learning rate": (config.learning_rate, 0),
        "backbone lr scale": (config.backbone_lr_scale, 0),
        "block lr decay": (config.block_lr_decay, 0),
        "warmup epochs": (config.warmup_epochs, 0),
        "weight decay": (config.weight_decay, 0),
        "mixup": (config.mixup, 0),
        "views": (config.views, 0),
        "checkpoint minutes": (config.checkpoint_minutes, 0),
    }
    for name, (value, least) in limits.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name in ("clip_norm", "lbfgs_c", "cache_limit"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name.replace('_', ' ')} must be more than 0, got {value}")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"label smoothing must be 0 to 1, got {config.label_smoothing}")
    if config.views and config.cache == "off":
        raise ValueError("--views are kept, and --cache off keeps nothing; --augment needs none")
    if config.solver == "lbfgs":
        _check_lbfgs(config)
    if config.accumulate > 1 and replicas.count > 1:
        raise ValueError(
            f"--accumulate is for one replica, and there are {replicas.count}: each takes its part "
            "of a batch, so that a larger --batch-size needs no more memory than theirs"
        )
    if config.views and config.mixup and replicas.num_workers > 1:
        raise ValueError(
            "--views are kept, and with --mixup several workers keep nothing, for the two that are "
            "mixed would lie with two of them; leave out one of the two"
        )
    if config.image_size is not None:
        parse_size(config.image_size)
    if replicas.is_chief and (config.out is not None or config.resume):
        run_folder.check(config.out, resume=config.resume)


def _check_lbfgs(config: FinetuneConfig) -> None:
    """Nothing that the exact solver would pass over."""
    unused = {
        "--schedule": config.schedule,
        "--hidden": config.hidden,
        "--dropout": config.dropout,
        "--mixup": config.mixup,
        "--label-smoothing": config.label_smoothing,
        "--augment without --views": config.augment and not config.views,
        "--early-stopping": config.early_stopping,
        "--max-to-keep": config.max_to_keep,
    }
    given = [flag for flag, value in unused.items() if value]
    if given:
        raise ValueError(f"--solver lbfgs has no use for {', '.join(given)}; leave out one of them")


def _splits(config: FinetuneConfig, source: Source) -> tuple[Split, Split, dict[str, str]]:
    """To train and to evaluate on; and what is left out of both, with the reasons."""
    train, held_out = run_data.splits(source, config)
    unreadable: dict[str, str] = {}
    if config.skip_unreadable:
        (train, held_out), unreadable = run_data.without_unreadable(
            (train, held_out), config.skip_unreadable
        )
    if config.shots_per_class is not None:
        train = few_shot(train, config.shots_per_class, config.seed)
    if config.batch_size is not None and config.batch_size > len(train):
        raise ValueError(
            f"batch size {config.batch_size} does not fit {len(train)} training images; "
            f"choose 1 to {len(train)}"
        )
    return train, held_out, unreadable


def _look_at(train: Split, held_out: Split) -> dict[str, Any]:
    """Warn of classes without images, and of images that are on both sides, where there are few
    enough to decode all of them; returns what tells the images from others."""
    lines = data_checks.describe_balance(train.source.class_names, train.labels, held_out.labels)
    splits = {"training": train, "held_out": held_out}
    count = len(train) + len(held_out)
    if count <= MAX_COMPARED:
        found = {
            what: split.fingerprints(lambda files: measure.progress(files, "images"))
            for what, split in splits.items()
        }
        unreadable = [split.where(~found[what]["readable"]) for what, split in splits.items()]
        if any(map(len, unreadable)):
            raise UnreadableImageError(
                {name: why for split in unreadable for name, why in find_unreadable(split).items()}
            )
        leaks = data_checks.describe_leaks(found["training"], found["held_out"])
        lines += [f"{line}; vgg-transfer check-data lists them" for line in leaks]
        marks = {what: [*map(bytes, prints["sha256"])] for what, prints in found.items()}
        hashed = "files and labels"
    else:
        lines.append(
            f"{count:,} images are more than the {MAX_COMPARED:,} that are compared before "
            "training, so near-duplicates may be both trained and evaluated on; vgg-transfer "
            "check-data compares any number"
        )
        marks = {
            what: [os.fsencode(name) for name in split.names] for what, split in splits.items()
        }
        hashed = "names and labels"
    for line in lines:
        terminal.say(f"warning: {line}")
    images: dict[str, Any] = {"sha256_of": hashed}
    for what, split in splits.items():
        digest = hashlib.sha256(b"\0".join(marks[what]) + split.labels.tobytes())
        images[what] = {"images": len(split), "sha256": digest.hexdigest()}
    return images


def _classifier(
    config: FinetuneConfig, graph: MetaGraph, train: Split, replicas: Replicas
) -> tuple[Classifier, np.ndarray, FinetuneConfig]:
    """The classifier before training, the features of a few images, and the config with what was
    found out."""
    feeds = dict(parse_feed(assignment) for assignment in config.feed)
    planned = plan(
        graph,
        config.tap,
        input=config.input,
        feeds=feeds,
        keep_dropout=config.keep_dropout,
        use_ema=config.use_ema,
        preprocess=config.preprocess,
        image_size=None if config.image_size is None else parse_size(config.image_size),
    )
    tap, network, preprocess = planned.tap, planned.network, planned.preprocess
    report(config, tap, network)
    labels = train.source.class_names
    warn_if_prepared_twice(network, preprocess.mode)
    # The values of the variables are the chief's for all, but the variables must be the same.
    replicas.check_same("model", network.variables)
    with replicas.strategy.scope():
        backbone = Backbone(
            graph,
            tap,
            input=network.input,
            feeds=feeds,
            keep_dropout=config.keep_dropout,
            use_ema=config.use_ema,
            name="backbone",
        )
    if config.random_weights:
        backbone.randomize(config.seed)
    features = _features_of_a_few(backbone, train, preprocess)
    with replicas.strategy.scope():
        head = Head(
            len(labels),
            hidden=config.hidden,
            dropout=config.dropout,
            weights_stddev=FIRST_LOGITS / (rms(features) * features.shape[1] ** 0.5),
            bias=0.0,
            seed=config.seed,
            name="head",
        )
        classifier = Classifier(backbone, head, preprocess, labels)
        classifier.build_from_size()
    check_savable(classifier)
    return (
        classifier,
        features,
        replace(
            config,
            model=config.model if config.model == EMBEDDED else str(graph.prefix.resolve()),
            data_dir=config.data_dir and str(Path(config.data_dir).expanduser().resolve()),
            image_folder=config.image_folder
            and str(Path(config.image_folder).expanduser().resolve()),
            dataset=config.dataset
            or (None if config.image_folder or config.data_dir else "digits"),
            tap=tap,
            input=network.input,
            preprocess=preprocess.mode,
            image_size=preprocess.size
            if isinstance(preprocess.size, int)
            else show_size(preprocess.size),
        ),
    )


def _stages(
    config: FinetuneConfig, classifier: Classifier, features: np.ndarray, train: Split
) -> tuple[list[Stage], FinetuneConfig]:
    """The stages, and the config that says them again."""
    steps_per_epoch = -(-len(train) // config.batch_size)
    stages = [
        resolve(stage, classifier, config.tap, features, steps_per_epoch)
        for stage in asked_for(config)
    ]
    for stage in stages:
        warn_if_stopped(_after(classifier.backbone, stage.cut), stage.cut)
    last = stages[-1]
    if config.solver == "lbfgs" and last.cut != config.tap.removesuffix(":0"):
        raise ValueError(
            f"--solver lbfgs trains a head on frozen features; --freeze-until {last.cut} trains "
            "more than that"
        )
    if config.schedule is not None:
        schedule = ",".join(str(stage) for stage in stages)
        return stages, replace(config, schedule=schedule, freeze_until=last.cut)
    return stages, replace(
        config,
        freeze_until=last.cut,
        epochs=last.epochs,
        learning_rate=last.learning_rate,
        backbone_lr_scale=last.backbone_lr_scale,
    )


def _after(backbone: GraphLayer, at: str) -> Network:
    """What a stage trains of the backbone. Not as a layer: a layer with dropout draws a seed, so
    that one more would change what the run draws."""
    return backbone.network if at == "none" else cut(backbone.network, backbone.tensor(at))[1]


def _features_of_a_few(backbone: Backbone, split: Split, preprocess: Preprocess) -> np.ndarray:
    """float32 ``[images, width]``, as a head gets them."""
    images, _ = next(iter(split.batches(preprocess, 4)))
    return np.asarray(average_over_space(tf.cast(backbone(images), tf.float32)))


def _check_repeatable(classifier: Classifier, split: Split, keep_dropout: bool) -> None:
    """Refuse features that differ from run to run: no two evaluations would agree."""
    backbone = classifier.backbone
    if not is_seeded(backbone.network.graph_def) or keep_dropout:
        return
    images, _ = next(iter(split.batches(classifier.preprocess, 4)))
    if np.array_equal(backbone(images), backbone(images)):
        return
    raise ValueError(
        "the features of one image differ from run to run: noise lies before the tap "
        f"({', '.join(backbone.random_nodes[:3])}); choose an --input after it, a tap before it, "
        "or turn it off with --feed"
    )
