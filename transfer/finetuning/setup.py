"""Set-up of a fine-tuning run: model, defaults and checks, before any slow work."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from transfer.activations.samples import sample_features
from transfer.core import measurement
from transfer.core.distribution import Replicas
from transfer.data.dataset import Split, few_shot
from transfer.exports.meta_graph import check_savable
from transfer.finetuning.context import RunContext
from transfer.finetuning.defaults import (
    batch_size_of,
    best_tap,
    calibrate_of,
    ema_of,
    epochs_of,
    label_smoothing_of,
    precision_of,
    recorded_options,
    solver_of,
)
from transfer.finetuning.hyperparameters import (
    Stage,
    requested_stages,
    resolve,
    rms,
)
from transfer.finetuning.image_inspection import inspect_images
from transfer.finetuning.model_plan import plan_model
from transfer.finetuning.options import FineTuneOptions, ResolvedOptions
from transfer.finetuning.precision import calibration_images, choose
from transfer.finetuning.request import RunRequest
from transfer.finetuning.tap_choice import AUTO
from transfer.graph import Network, graph_preprocessing, is_seeded
from transfer.graph import cut as graph_cut
from transfer.graph.batch_statistics import batch_statistics
from transfer.graph.cuts import stopped
from transfer.images.preprocess import parse_size, show_size
from transfer.layers.backbone import Backbone
from transfer.layers.classifier import Classifier
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.head import Head
from transfer.runs import run_folder
from transfer.runs.growth import Growth
from transfer.training.l2_sp import L2SP

logger = logging.getLogger(__name__)

# Standard deviation of the initial logits. A new head with confident logits needs steps to unlearn
# them, and their gradients meanwhile disturb the backbone's weights.
FIRST_LOGITS = 0.1
# Options that may differ between workers: locations of files.
_PLACES = ("model", "data_dir", "image_folder", "csv", "add", "out", "cache_dir", "cache_limit")


def prepare(request: RunRequest) -> RunContext:
    """Build the classifier and resolve the defaults; writes no files.

    Raises:
        ValueError, OSError: see the library functions; nearly all before any slow work.
    """
    replicas, options = request.replicas, request.options
    shared = {k: v for k, v in _requested_options(request).items() if k not in _PLACES}
    replicas.check_same("set of options", (shared, measurement.versions()))
    options.check()
    _check_callbacks(request)
    request.train.source.check_classes()
    _check_replicas(options, replicas)
    if options.image_size is not None:
        parse_size(options.image_size)
    if replicas.is_chief and (request.run_dir is not None or request.resume):
        run_folder.check(request.run_dir, resume=request.resume)
    # Copies, whose ids are read anew: files may have changed since the caller's splits read them.
    train = dataclasses.replace(request.train)
    is_one = request.held_out is request.train
    held_out = train if is_one else dataclasses.replace(request.held_out)
    request = dataclasses.replace(request, train=train, held_out=held_out)
    _check_splits(train, held_out)
    if options.shots_per_class is not None:
        train = few_shot(train, options.shots_per_class, options.seed)
    if options.batch_size is not None and options.batch_size > len(train):
        raise ValueError(
            f"batch_size={options.batch_size} does not fit {len(train)} training images; "
            f"choose 1 to {len(train)}"
        )
    inspected = inspect_images(train, request.held_out, options, verbose=request.verbose)
    train = inspected.train
    recorded = recorded_options(request)
    if options.tap == AUTO:
        tap = best_tap(request, recorded, train) if replicas.is_chief else ""
        options = dataclasses.replace(options, tap=replicas.from_chief(tap))
        request = dataclasses.replace(request, options=options)
        keras.utils.set_random_seed(options.seed)  # the run is that with this tap, named
    classifier, features, resolved, taps = _classifier(request, recorded, train)
    if request.growth is not None:
        _check_model(request.growth, classifier.backbone)
    replicas.check_same("choice of images", inspected.fingerprint)
    _check_repeatable(classifier, request.held_out, options.keep_dropout)
    stages = _stages(resolved, classifier, features, train)
    if resolved.cutmix:
        _check_feature_maps(resolved.cutmix, classifier, stages)
    _check_accumulation(resolved.accumulate, stages, -(-len(train) // resolved.batch_size))
    _check_used(request, classifier.backbone, stages)
    num_images = len(train) * max(1, resolved.views) + len(request.held_out)
    precision = choose(
        resolved,
        classifier.backbone,
        [stage.cut for stage in stages],
        calibration_images(train, classifier.preprocess, options.seed),
        num_images=num_images,
        replicas=replicas,
    )
    resolved = precision.applied(resolved)
    smoothing = label_smoothing_of(request, recorded, resolved, train, classifier, stages)
    resolved = dataclasses.replace(resolved, label_smoothing=smoothing)
    cut = options.freeze_until if options.freeze_from is None else stages[-1].cut
    run_dir = request.run_dir or run_folder.default_out(train.source.name, cut)
    run_dir = Path(replicas.from_chief(str(run_dir.resolve())))
    return RunContext(
        request=request,
        options=resolved,
        run_dir=run_dir,
        classifier=classifier,
        stages=stages,
        train=train,
        held_out=request.held_out,
        fingerprint=inspected.fingerprint,
        num_leaks=inspected.num_leaks,
        taps=taps,
        inspect_s=inspected.seconds,
        measured=precision.measured,
        l2_sp=_l2_sp(resolved, classifier.backbone, stages) if resolved.l2_sp else None,
    )


def _check_splits(train: Split, held_out: Split) -> None:
    """Refuse splits without images, and those whose labels do not mean the same classes."""
    for role, split in {"train": train, "held_out": held_out}.items():
        if not len(split):
            raise ValueError(f"{role} has no images; it is a split of {split.source.name!r}")
    trained, evaluated = train.source.class_names, held_out.source.class_names
    if trained != evaluated:
        different = [
            name for name in (*trained, *evaluated) if (name in trained) != (name in evaluated)
        ]
        what = f"{', '.join(different[:5])} in one of them only" if different else "another order"
        raise ValueError(
            f"the training images of {train.source.name!r} have {len(trained)} classes, and the "
            f"held-out images of {held_out.source.name!r} have {len(evaluated)}, with {what}, so "
            "that labels do not mean the same; use splits of one source, such as an image folder "
            "with the folders train and validation"
        )


def _check_accumulation(accumulate: int, stages: list[Stage], steps_per_epoch: int) -> None:
    """Refuse a group of batches that is longer than a stage, and say what is not applied."""
    for stage in stages if accumulate > 1 else ():
        num_batches = steps_per_epoch * stage.epochs
        if num_batches < accumulate:
            raise ValueError(
                f"accumulate={accumulate} is more than the {num_batches} batches of "
                f"{stage.epochs} epochs, so that no weight would change; choose at most "
                f"{num_batches}"
            )
        if rest := num_batches % accumulate:
            logger.warning(
                f"accumulate={accumulate}: the gradients of the last {rest} of {num_batches} "
                "batches are not applied"
            )


def _check_used(request: RunRequest, backbone: GraphLayer, stages: Sequence[Stage]) -> None:
    """Warn about options whose only effect is that ``solver="auto"`` is gradient descent."""
    options, default = request.options, FineTuneOptions()
    if options.solver != "auto":
        return
    unused = [] if options.max_to_keep else ["keep_checkpoint_every_n_hours"]
    only_head = not any(
        variable.trainable for stage in stages for variable in _after(backbone, stage.cut).variables
    )
    if only_head:
        unused += ["backbone_lr_scale", "block_lr_decay"]
    if options.lr_schedule == "constant" or (only_head and options.lr_schedule == "auto"):
        unused.append("warmup_epochs")
    values = {name: getattr(options, name) for name in unused}
    given = [f"{name}={it}" for name, it in values.items() if it != getattr(default, name)]
    if not given:
        return
    logger.warning(
        f"{', '.join(given)} has no effect on this run but to make it gradient descent: "
        "backbone_lr_scale and block_lr_decay need trained layers of the backbone (freeze_until), "
        "warmup_epochs needs lr_schedule=cosine, keep_checkpoint_every_n_hours needs max_to_keep=N"
    )


def _check_model(growth: Growth, backbone: GraphLayer) -> None:
    """Refuse to add images to a run with another network: the features would differ."""
    recorded = run_folder.read_json(growth.run / run_folder.PROVENANCE)["model"]
    if backbone.digest() != recorded["sha256"]:
        raise ValueError(
            f"the network is not that of the run in {str(growth.run)!r}, {recorded['name']!r}: its "
            "weights, or the values fed to its placeholders, are others; give graph and feeds as "
            "that run had them"
        )


def _requested_options(request: RunRequest) -> dict[str, Any]:
    return {**request.origin, **vars(request.options)}


def _check_callbacks(request: RunRequest) -> None:
    """Refuse callbacks where there are no epochs that would call them."""
    options = request.options
    if request.callbacks and (options.solver in ("ridge", "lbfgs") or options.lbfgs_c is not None):
        given = f"lbfgs_c={options.lbfgs_c}" if options.lbfgs_c else f"solver={options.solver}"
        raise ValueError(
            f"{len(request.callbacks)} callbacks were given, and {given} has no epochs that would "
            "call them; leave them out, or use solver=gradient"
        )


def _check_replicas(options: FineTuneOptions, replicas: Replicas) -> None:
    if options.accumulate > 1 and replicas.count > 1:
        raise ValueError(
            f"accumulate=N is for one replica, and there are {replicas.count}: each takes its part "
            "of a batch, so a larger batch_size needs no more memory than theirs"
        )
    if options.views and options.is_mixed and replicas.num_workers > 1:
        raise ValueError(
            "views=N caches activations; mixup and cutmix may pair images of different workers, so "
            "their activations cannot be cached; leave out one of the two"
        )


def _check_feature_maps(cutmix: float, classifier: Classifier, stages: Sequence[Stage]) -> None:
    images = keras.KerasTensor((1, *classifier.preprocess.shape))
    for stage in stages:
        frozen, _ = classifier.split(stage.cut)
        if frozen is not None and len(frozen.compute_output_spec(images).shape) != 4:
            raise ValueError(
                f"cutmix={cutmix} combines images or feature maps, and the activations at "
                f"{stage.cut} have no height and width; use mixup=N, or freeze_until=CUT with an "
                "earlier cut"
            )


def _classifier(
    request: RunRequest, recorded: Mapping[str, Any], train: Split
) -> tuple[Classifier, np.ndarray, ResolvedOptions, list[str]]:
    """The classifier before training, the features of a few images, the resolved options, and the
    tensors of several taps."""
    graph, options, replicas = request.graph, request.options, request.replicas
    planned = plan_model(graph, options, request.feeds)
    tap = planned.tap if isinstance(planned.tap, str) else ",".join(planned.tap)
    network, preprocess = planned.network, planned.preprocess
    _report(options, tap, planned.tensors, network)
    labels = train.source.class_names
    _warn_if_prepared_twice(network, preprocess.mode)
    # All workers take the chief's values, but they must have the same variables.
    replicas.check_same("model", network.variables)
    with replicas.strategy.scope():
        backbone = Backbone(
            graph,
            planned.tap,
            input=network.input,
            feeds=request.feeds,
            keep_dropout=options.keep_dropout,
            use_ema=options.use_ema,
            name="backbone",
        ).concatenated()
    if options.random_weights:
        backbone.randomize(options.seed)
    features = sample_features(
        backbone,
        train,
        preprocess,
        on_disk=options.cache == "disk" and not is_seeded(backbone.network.graph_def),
        cache_dir=options.cache_dir,
    )
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
    check_savable(classifier)
    size = preprocess.size
    solver = solver_of(request, recorded, backbone, len(train), features.shape[1])
    request = dataclasses.replace(request, options=dataclasses.replace(options, solver=solver))
    resolved = (
        vars(options)
        | precision_of(request, recorded)
        | {
            "solver": solver,
            "tap": tap,
            "input": network.input,
            "preprocess": preprocess.mode,
            "image_size": size if isinstance(size, int) else show_size(size),
            "batch_size": batch_size_of(request, recorded, train, backbone),
            "epochs": epochs_of(request, recorded),
            "label_smoothing": options.label_smoothing or 0.0,
            "ema": ema_of(request, recorded, backbone),
            "calibrate": calibrate_of(request, recorded),
        }
    )
    return classifier, features, ResolvedOptions(**resolved), planned.tensors


def _stages(
    options: ResolvedOptions, classifier: Classifier, features: np.ndarray, train: Split
) -> list[Stage]:
    steps_per_epoch = -(-len(train) // options.batch_size)
    stages = [
        resolve(request, classifier, features, steps_per_epoch)
        for request in requested_stages(options)
    ]
    for stage in stages:
        _warn_if_stopped(_after(classifier.backbone, stage.cut), stage.cut)
    last = stages[-1]
    tap = classifier.backbone.network.output
    if options.solver != "gradient" and last.cut != tap.removesuffix(":0"):
        raise ValueError(
            f"solver={options.solver} fits a head on frozen features; freeze_until={last.cut} "
            "trains more than that, for which there is solver=gradient"
        )
    return stages


def _l2_sp(options: FineTuneOptions, backbone: GraphLayer, stages: Sequence[Stage]) -> L2SP:
    """The penalty of the weights that any stage trains. They still have their pretrained values,
    also if the run is resumed."""
    trained = {known.name for stage in stages for known in _after(backbone, stage.cut).variables}
    if (freeze_from := stages[-1].freeze_from) is not None:
        trained -= {known.name for known in _after(backbone, freeze_from).variables}
    named = zip(backbone.variable_names, backbone.graph_variables, strict=True)
    variables = [variable for name, variable in named if variable.trainable and name in trained]
    if not variables:
        raise ValueError(
            f"l2_sp={options.l2_sp} is a penalty on weights of the backbone, and the run trains "
            "none of them; leave it out, or train more than the head with freeze_until"
        )
    return L2SP(options.l2_sp, variables)


def _after(backbone: GraphLayer, at: str) -> Network:
    """The part of the backbone that a stage trains, as a network. Not as a layer: a layer with
    dropout draws a seed, so an additional one would change the random numbers of the run."""
    if at == "none":
        return backbone.network
    return graph_cut(backbone.network, backbone.tensor(at))[1]


def _report(options: FineTuneOptions, tap: str, tensors: list[str], network: Network) -> None:
    """Log what was detected in the graph rather than given by the caller."""
    given_names = {"tap": (options.tap, tap), "input": (options.input, network.input)}
    lines = [f"{role}: {name}" for role, (given, name) in given_names.items() if given != name]
    if tap == "all":
        lines.append(
            f"tap all: average and maximum over height and width of {len(tensors)} activations, as "
            f"one tensor, {network.output}: {', '.join(tensors)}"
        )
    if "," in tap:
        lines.append(f"the taps, averaged over height and width, are one tensor: {network.output}")
    lines += [
        f"{mode.kind}: {mode.tensor} is {mode.inference}, and {mode.training} in what is trained "
        f"(found by {mode.why})"
        for mode in network.modes
    ]
    if network.batch_size is not None:
        lines.append(f"the graph takes batches of {network.batch_size} only; others are padded")
    for line in lines:
        logger.info(line)
    if network.output == network.input:
        logger.warning(f"tap {tap} is the input of the network: the head gets pixels, no features")


def _warn_if_prepared_twice(network: Network, mode: str) -> None:
    """Warn if both the graph and the preprocessing subtract a mean or swap colours."""
    prepared = graph_preprocessing.find(network)
    if twice := prepared.repeats(mode):
        logger.warning(
            f"the graph prepares its images itself (it {prepared}); preprocess={mode} will "
            f"{twice} again, before it"
        )


def _warn_if_stopped(network: Network, cut: str) -> None:
    """Warn if gradients are stopped inside the trained part, so that some layers do not learn."""
    for tensor, names in stopped(network).items():
        shown = f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        line = (
            f"the graph stops gradients at {tensor!r}: {len(names)} of the variables after the cut "
            f"{cut!r} are not trained ({shown})"
        )
        with contextlib.suppress(ValueError):  # a branch bypasses the tensor
            graph_cut(network, tensor)
            line += f"; freeze_until={tensor.removesuffix(':0')} trains the same and computes less"
        logger.warning(line)


def _check_repeatable(classifier: Classifier, split: Split, keep_dropout: bool) -> None:
    """Refuse nondeterministic features: no two evaluations would agree; warn if they depend on the
    batch."""
    backbone = classifier.backbone
    if mixing := batch_statistics(backbone.network):
        logger.warning(
            "the features of an image depend on the other images of its batch, through "
            f"{', '.join(mixing[:3])}: batch norm that was exported in training mode; choose a tap "
            "before it, or a graph for inference"
        )
    if not is_seeded(backbone.network.graph_def) or keep_dropout:
        return
    images, _ = next(iter(split.batches(classifier.preprocess, 4)))
    if np.array_equal(backbone(images), backbone(images)):
        return
    raise ValueError(
        "the features are not deterministic: random operations before the tap "
        f"({', '.join(backbone.random_nodes[:3])}); choose an input after them, a tap before them, "
        "or turn them off with feeds"
    )
