"""Everything about a fine-tuning run that is decided before the slow work begins."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from transfer import data_checks, preparation
from transfer.activations.store import CachePolicy
from transfer.backbone import Backbone
from transfer.classifier import Classifier
from transfer.core import measurement
from transfer.data import Split, few_shot
from transfer.distribution import Replicas
from transfer.finetuning.hyperparameters import Stage, requested_stages, resolve, rms
from transfer.finetuning.options import FineTuneOptions, ResolvedOptions
from transfer.head import Head, average_over_space
from transfer.metagraph import MetaGraph
from transfer.preprocess import Preprocess
from transfer.runs import run_folder
from transfer.surgery import Network, is_seeded

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 32
FILES_READ_TWICE = 10_000  # at most; takes a second or two
# Standard deviation of the logits before training. Confident logits of a new head cost steps to
# unlearn, and their gradients disturb the backbone's weights in the meantime.
FIRST_LOGITS = 0.1
# What workers may have different: where they find things.
_PLACES = ("model", "data_dir", "image_folder", "out", "cache_dir", "cache_limit")


@dataclass(frozen=True)
class RunRequest:
    """What is asked of a run.

    Args:
        graph: the pretrained network.
        train: training images.
        held_out: images to evaluate on, from the same source.
        options: see ``FineTuneOptions``.
        feeds: values of placeholders, see ``Backbone``.
        run_dir: folder of the run; ``None`` takes ``runs/<date-time>-<dataset>-<cut>``.
        resume: continue the run in ``run_dir``.
        origin: where model and images come from, written to ``config.yaml``; ``model`` must be
            there.
        command: written to ``provenance.json``.
        callbacks: Keras callbacks that run beside the run's own.
        verbose: 0 silent, 1 progress bars, 2 a line per epoch, as in Keras.
        replicas: devices and processes that train together.
    """

    graph: MetaGraph
    train: Split
    held_out: Split
    options: FineTuneOptions = field(default_factory=FineTuneOptions)
    feeds: Mapping[str, float | bool] = field(default_factory=dict)
    run_dir: Path | None = None
    resume: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    callbacks: Sequence[keras.callbacks.Callback] = ()
    verbose: int = 0
    replicas: Replicas = field(default_factory=Replicas)


@dataclass(frozen=True)
class RunContext:
    """A run that is set up: what to train on what.

    ``fingerprint`` identifies the images that are trained and evaluated on.
    """

    request: RunRequest
    options: ResolvedOptions
    run_dir: Path
    classifier: Classifier
    stages: list[Stage]
    train: Split
    held_out: Split
    fingerprint: dict[str, Any]

    @property
    def replicas(self) -> Replicas:
        return self.request.replicas

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.options.batch_size)

    @property
    def last_cut(self) -> str:
        return self.stages[-1].cut

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` says: the resolved options, and where model and images come from."""
        options = dataclasses.asdict(self.options) | {"freeze_until": self.last_cut}
        if self.options.schedule is not None:
            options["schedule"] = ",".join(map(str, self.stages))
        else:
            stage = self.stages[-1]
            options["epochs"] = stage.epochs
            options["learning_rate"] = stage.learning_rate
            options["backbone_lr_scale"] = stage.backbone_lr_scale
        return {**self.request.origin, **options, "out": self.run_dir}

    @property
    def cache_policy(self) -> CachePolicy:
        options = self.options
        return CachePolicy(
            options.cache, options.cache_dir, options.cache_limit, options.cache_dtype
        )

    def progress(self, batches: Iterable, what: str) -> Iterable:
        """The same batches, with a progress bar unless the run is silent."""
        return measurement.progress(batches, what) if self.request.verbose else batches


def prepare(request: RunRequest) -> RunContext:
    """Build the classifier and decide the defaults; nothing is written yet.

    Raises:
        ValueError, OSError: see the library functions; nearly all before any slow work.
    """
    replicas, options = request.replicas, request.options
    alike = {k: v for k, v in _asked(request).items() if k not in _PLACES}
    replicas.check_same("set of options", (alike, measurement.versions()))
    options.check()
    _check_replicas(options, replicas)
    if replicas.is_chief and (request.run_dir is not None or request.resume):
        run_folder.check(request.run_dir, resume=request.resume)
    train = request.train
    if options.shots_per_class is not None:
        train = few_shot(train, options.shots_per_class, options.seed)
    if options.batch_size is not None and options.batch_size > len(train):
        raise ValueError(
            f"batch_size={options.batch_size} does not fit {len(train)} training images; "
            f"choose 1 to {len(train)}"
        )
    fingerprint = _inspect_images(train, request.held_out)
    classifier, features, resolved = _classifier(request, train)
    replicas.check_same("choice of images", fingerprint)
    _check_repeatable(classifier, request.held_out, options.keep_dropout)
    stages = _stages(resolved, classifier, features, train)
    run_dir = request.run_dir or run_folder.default_out(train.source.name, options.freeze_until)
    run_dir = Path(replicas.from_chief(str(run_dir.resolve())))
    return RunContext(
        request, resolved, run_dir, classifier, stages, train, request.held_out, fingerprint
    )


def write_provenance(context: RunContext) -> None:
    """Write what is evaluated on, and what the run was made with and of.

    Raises:
        ValueError: if the run is resumed with another model or other images.
    """
    run_dir, request = context.run_dir, context.request
    provenance = {
        "command": list(request.command),
        "git": measurement.git_revision(),
        "versions": measurement.versions(),
        "model": {
            "name": request.origin["model"],
            "sha256": context.classifier.backbone.digest(),
        },
        "dataset": {"name": context.train.source.name} | context.fingerprint,
    }
    path = run_dir / run_folder.PROVENANCE
    if path.is_file():
        began = json.loads(path.read_text(encoding="utf-8"))
        changed = [part for part in ("model", "dataset") if began[part] != provenance[part]]
        if changed:
            raise ValueError(
                f"cannot resume the run in {str(run_dir)!r}: its {' and '.join(changed)} changed "
                f"since it began (see {path.name}); start anew, with another run_dir"
            )
        return
    names = "".join(f"{name}\n" for name in context.held_out.names)
    run_folder.write_text(run_dir / run_folder.HELD_OUT, names)
    run_folder.write_json(path, provenance)


def _asked(request: RunRequest) -> dict[str, Any]:
    return {**request.origin, **vars(request.options)}


def _check_replicas(options: FineTuneOptions, replicas: Replicas) -> None:
    if options.accumulate > 1 and replicas.count > 1:
        raise ValueError(
            f"accumulate=N is for one replica, and there are {replicas.count}: each takes its part "
            "of a batch, so a larger batch_size needs no more memory than theirs"
        )
    if options.views and options.mixup and replicas.num_workers > 1:
        raise ValueError(
            "views=N caches activations; mixup may pair images that live on different workers, so "
            "their activations cannot be cached; leave out one of the two"
        )


def _inspect_images(train: Split, held_out: Split) -> dict[str, Any]:
    """Warn about labels and, where there are few enough to read, about files; returns what
    identifies the images."""
    lines = data_checks.describe_balance(train.source.class_names, train.labels, held_out.labels)
    splits = {"training": train, "held_out": held_out}
    if len(train) + len(held_out) <= FILES_READ_TWICE:
        marks = {what: data_checks.digests(split) for what, split in splits.items()}
        if shared := {*marks["training"]} & {*marks["held_out"]}:
            lines.append(
                f"{len(shared)} images are both trained and evaluated on, under two names, so that "
                "the accuracy is too high; vgg-transfer check-data lists them"
            )
        hashed = "files and labels"
    else:
        marks = {what: [n.encode() for n in split.names] for what, split in splits.items()}
        hashed = "names and labels"
    for line in lines:
        logger.warning(line)
    fingerprint: dict[str, Any] = {"sha256_of": hashed}
    for what, split in splits.items():
        digest = hashlib.sha256(b"\0".join(marks[what]) + split.labels.tobytes())
        fingerprint[what] = {"images": len(split), "sha256": digest.hexdigest()}
    return fingerprint


def _classifier(
    request: RunRequest, train: Split
) -> tuple[Classifier, np.ndarray, ResolvedOptions]:
    """The classifier before training, the features of a few images, and the resolved options."""
    graph, options, replicas = request.graph, request.options, request.replicas
    tap = graph.tensor(options.tap or graph.card.tap or "fc7")
    network = graph.network(tap, options.input, request.feeds, options.keep_dropout)
    _report(options, tap, network)
    labels = train.source.class_names
    preprocess = graph.preprocess(network.input, options.preprocess, options.image_size)
    _warn_if_prepared_twice(network, preprocess.mode)
    # The values of the variables are the chief's for all, but the variables must be the same.
    replicas.check_same("model", network.variables)
    with replicas.strategy.scope():
        backbone = Backbone(
            graph,
            tap,
            input=network.input,
            feeds=request.feeds,
            keep_dropout=options.keep_dropout,
            use_ema=options.use_ema,
            name="backbone",
        )
    if options.random_weights:
        backbone.randomize(options.seed)
    features = _features_of_a_few(backbone, train, preprocess)
    with replicas.strategy.scope():
        head = Head(
            len(labels),
            hidden=options.hidden,
            dropout=options.dropout,
            weights_stddev=FIRST_LOGITS / (rms(features) * features.shape[1] ** 0.5),
            bias=0.0,
            seed=options.seed,
            name="head",
        )
        classifier = Classifier(backbone, head, preprocess, labels)
        classifier.build_from_size()
    resolved = vars(options) | {
        "tap": tap,
        "input": network.input,
        "preprocess": preprocess.mode,
        "image_size": preprocess.size,
        "batch_size": options.batch_size or min(DEFAULT_BATCH, len(train)),
    }
    return classifier, features, ResolvedOptions(**resolved)


def _stages(
    options: ResolvedOptions, classifier: Classifier, features: np.ndarray, train: Split
) -> list[Stage]:
    steps_per_epoch = -(-len(train) // options.batch_size)
    stages = [
        resolve(request, classifier, options.tap, features, steps_per_epoch)
        for request in requested_stages(options)
    ]
    last = stages[-1]
    if options.solver == "lbfgs" and last.cut != options.tap.removesuffix(":0"):
        raise ValueError(
            f"solver=lbfgs trains a head on frozen features; freeze_until={last.cut} trains more "
            "than that"
        )
    return stages


def _report(options: FineTuneOptions, tap: str, network: Network) -> None:
    """Log what was found in the graph and not given by the caller."""
    found = {"tap": (options.tap, tap), "input": (options.input, network.input)}
    lines = [f"{what}: {name}" for what, (asked, name) in found.items() if asked != name]
    lines += [
        f"{mode.kind}: {mode.tensor} is {mode.inference}, and {mode.training} in what is trained "
        f"(found by {mode.why})"
        for mode in network.modes
    ]
    if network.batch_size is not None:
        lines.append(f"the graph takes batches of {network.batch_size} only; others are filled up")
    for line in lines:
        logger.info(line)


def _warn_if_prepared_twice(network: Network, mode: str) -> None:
    """Warn where the graph subtracts a mean or swaps colours and preprocessing does so as well."""
    prepared = preparation.find(network)
    if twice := prepared.repeats(mode):
        logger.warning(
            f"the graph prepares its images itself (it {prepared}); preprocess={mode} will "
            f"{twice} again, before it"
        )


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
        f"({', '.join(backbone.random_nodes[:3])}); choose an input after it, a tap before it, or "
        "turn it off with feeds"
    )
