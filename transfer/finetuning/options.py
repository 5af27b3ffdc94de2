"""The options of ``fine_tune``, with their defaults. Imports no TensorFlow."""

# No `from __future__ import annotations`: command-line flags inherit from these options, and their
# types are looked up in the module of the subclass.
import difflib
import itertools
import logging
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

logger = logging.getLogger(__name__)

OF_GRADIENT_DESCENT = (
    "schedule",
    "freeze_from",
    "head_start",
    "epochs",
    "batch_size",
    "optimizer",
    "learning_rate",
    "lr_schedule",
    "warmup_epochs",
    "backbone_lr_scale",
    "block_lr_decay",
    "weight_decay",
    "l2_sp",
    "ema",
    "clip_norm",
    "accumulate",
    "early_stopping",
    "hidden",
    "dropout",
    "label_smoothing",
    "mixup",
    "cutmix",
    "max_to_keep",
    "keep_checkpoint_every_n_hours",
)
"""Options that only ``solver="gradient"`` uses."""


HEAD_ONLY: dict[str, Any] = {
    "freeze_until": "tap",
    "freeze_from": None,
    "schedule": None,
    "backbone_lr_scale": None,
    "block_lr_decay": 1.0,
    "l2_sp": 0.0,
}
"""Values of the options that say what is trained, for a run that trains the head only."""

OFF: dict[str, Any] = {"label_smoothing": 0.0, "ema": 0.0, "calibrate": False}
"""Values that turn off options whose default depends on the run."""


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """Options of ``fine_tune``. ``None`` means the default that the option describes."""

    tap: str | None = None
    """Tensor with the features; a short name works. Several, separated by commas, are averaged
    over height and width and concatenated: pool4,pool5,fc7. all: average and maximum of every
    activation after a nonlinearity, up to the default tap. auto: the tap with the highest
    cross-validated accuracy of a head on the training images. [default: the card's, else fc7]"""
    input: str | None = None
    """Tensor that takes the images. [default: the card's, else the only candidate]"""
    keep_dropout: bool = False
    """Keep dropout active at inference where the graph has it always on. By default it is active
    in training only."""
    use_ema: bool = False
    """Start from the moving averages of the weights."""
    random_weights: bool = False
    """Start from random weights instead of the pretrained ones, to measure their benefit."""
    shots_per_class: int | None = None
    """Train on this number of images per class, drawn with the seed. [default: all]"""
    freeze_until: str = "tap"
    """The cut: everything up to this tensor is frozen. 'tap' trains a new head on frozen features,
    any tensor between input and tap such as pool4 trains what follows it, 'none' trains
    everything."""
    freeze_from: str | None = None
    """Freeze everything from this tensor to the head, too: with freeze_until, a range of layers is
    trained; without it, the layers from the input to this tensor. [default: off]"""
    schedule: str | None = None
    """Several cuts in one run, each with its epochs and an optional learning rate:
    'fc7:20,pool4:5:0.0002,none:3'. Replaces freeze_until and epochs."""
    epochs: int | None = None
    """Passes over the training images. [default: about 2000 steps where only the head is trained,
    900 otherwise; at least 5 and 3, at most 200 and 60 epochs]"""
    batch_size: int | None = None
    """Images per step. [default: 32, or all where there are fewer; where only a head is trained on
    cached features of 25,600 images or more, the largest power of two with at least 400 steps per
    epoch, up to 4096]"""
    image_size: int | str | None = None
    """In pixels: one number, or HEIGHTxWIDTH, e.g. 100x200. [default: the model's]"""
    preprocess: str | None = None
    """Preprocessing that the weights expect: caffe, slim, torch, tf, unit or none.
    [default: the card's]"""
    solver: Literal["auto", "gradient", "ridge", "lbfgs"] = "auto"
    """ridge solves for the head in closed form: ridge regression, its penalty and a temperature
    chosen by leave-one-out log loss. lbfgs fits scikit-learn's logistic regression. Both need a
    frozen backbone and a head without hidden layers. auto: lbfgs if lbfgs_c is given; ridge for
    such a run, if it has no option of gradient descent such as epochs, and at most 2 GB of
    features, of which the images or the width are at most 5000; else gradient, also with Keras
    callbacks, which only its epochs call."""
    head_start: Literal["random", "ridge"] = "random"
    """The head before the first step of gradient descent. ridge solves for it in closed form, on
    the features of the pretrained network."""
    lbfgs_c: float | None = None
    """Inverse strength of the L2 penalty of lbfgs. [default: chosen by cross-validation]"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd has momentum 0.9."""
    learning_rate: float | None = None
    """Learning rate of the head. [default: scaled by the features' RMS and width, 0.006 for up to
    512 features with RMS 1; 0.0001 where more than the head is trained and a schedule or
    backbone_lr_scale is given]"""
    lr_schedule: Literal["auto", "constant", "cosine"] = "auto"
    """cosine decays the learning rate to zero. auto: constant where only the head is trained, else
    cosine."""
    warmup_epochs: float = 0.5
    """With cosine: epochs of linear warm-up, at most a tenth of the steps."""
    backbone_lr_scale: float | None = None
    """Learning rate of the backbone relative to the head's. [default: the value that makes it
    0.0001 where learning_rate and schedule are not given, else 1]"""
    block_lr_decay: float = 1.0
    """Factor of the learning rate for each block further from the head."""
    weight_decay: float = 0.0
    """Decay of the kernels, times the learning rate per step; biases are not decayed."""
    l2_sp: float = 0.0
    """Strength of an L2 penalty on the distance of the backbone's trained weights from the
    pretrained ones (L2-SP); 0 turns it off. The losses that are logged do not include it."""
    ema: float | None = None
    """Decay per step of a moving average of the trained weights, which is what is evaluated and
    written; 0 turns it off. The average covers the last 1 / (1 - decay) steps, but at most
    half of those so far. [default: 0 for a head only, else 0.999]"""
    clip_norm: float | None = None
    """Clip the global norm of a step's gradients to this value. [default: off]"""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update."""
    early_stopping: int | None = None
    """Stop after this number of epochs without a lower validation loss, and restore the best
    weights. The accuracy on these images is then slightly optimistic. [default: off]"""
    hidden: tuple[int, ...] = ()
    """Widths of hidden layers in the head."""
    dropout: float = 0.0
    """Dropout rate of the features while training."""
    label_smoothing: float | None = None
    """Label smoothing, 0 to 1: the part of the target that is spread over all classes. [default: 0
    for a head only, and with mixup or cutmix; else it follows from how certain a head on the
    layers to be trained is of its images, at most 0.1]"""
    mixup: float = 0.0
    """Parameter of the Beta distribution of mixup, e.g. 0.2; 0 turns it off. With a frozen part,
    the activations at the cut are mixed instead of the images."""
    cutmix: float = 0.0
    """Parameter of the Beta distribution of CutMix, e.g. 1; 0 turns it off. A box of each image, or
    of the feature maps at the cut, is replaced by that of another image."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight classes inversely to their frequency."""
    calibrate: bool | None = None
    """After training, scale the logits by the temperature with the lowest log loss on the held-out
    images, if that also lowers the log loss of images that it was not fitted to. Predicted classes
    stay the same; log loss and calibration error on these images are then slightly optimistic, and
    metrics.json has cross-fitted ones. [default: as in the run that is resumed or added to, else
    off]"""
    augment: bool = False
    """Train on random shifts and flips, new ones in each epoch. The frozen part is then recomputed
    in each epoch, unless views is set."""
    views: int = 0
    """Train on this number of random views of each image, whose activations are cached."""
    cache: Literal["disk", "memory", "off"] = "disk"
    """Where the activations at the cut are cached; disk keeps them for later runs."""
    cache_dir: Path | None = None
    """Folder of the activation cache. [default: vgg-transfer/activations in the user's cache
    folder]"""
    cache_limit: float = 20.0
    """Largest size of the activations in that folder in GB; the least recently used entries are
    evicted. Its subfolders have limits of their own: fingerprints of images 4 GB, features of
    samples 0.1 GB."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """float16 halves the size and keeps about three significant digits."""
    precision: Literal["float32", "int8", "mixed_bfloat16", "mixed_float16", "auto"] = "float32"
    """Arithmetic of the network; the classifier that is written computes in float32. int8 quantizes
    the frozen part, and is refused where the features differ too much from those of float32. auto:
    int8 if it is faster on this machine. mixed_bfloat16 and mixed_float16 compute convolutions and
    matrix products in this type, also while training, for GPUs; weights, head and loss stay in
    float32, and the loss is scaled for float16."""
    int8_engine: Literal["auto", "litert", "openvino"] = "auto"
    """Library that computes in int8. auto: OpenVINO if it is installed, else LiteRT."""
    max_to_keep: int = 0
    """Also write the model after each epoch, as model-STEP, and keep this many of the latest; 0
    writes none."""
    keep_checkpoint_every_n_hours: float | None = None
    """With max_to_keep: additionally keep one model for each interval of this many hours."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; one is also written after each epoch."""
    track: Literal["mlflow", "wandb"] | None = None
    """Also log the options, the metrics of each epoch and the evaluation to MLflow or Weights &
    Biases, as their environment variables say; resume continues the same run there."""
    track_files: bool = False
    """With track: upload the model and the other files of the run folder."""
    seed: int = 0
    """Seed of the head initialization, shuffling, shots_per_class sampling and augmentation."""

    def check(self) -> None:
        """Validate what can be checked without the model and the images.

        Raises:
            ValueError: names the option, its value and what is expected.
        """
        limits = {
            "epochs": 1,
            "batch_size": 1,
            "shots_per_class": 1,
            "early_stopping": 1,
            "accumulate": 1,
            "max_to_keep": 0,
            "keep_checkpoint_every_n_hours": 0,
            "backbone_lr_scale": 0,
            "block_lr_decay": 0,
            "warmup_epochs": 0,
            "weight_decay": 0,
            "l2_sp": 0,
            "mixup": 0,
            "cutmix": 0,
            "views": 0,
            "checkpoint_minutes": 0,
        }
        for name, minimum in limits.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        for name in ("learning_rate", "clip_norm", "lbfgs_c", "cache_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value}")
        for option in fields(FineTuneOptions):
            known = _choices(option.type)
            value = getattr(self, option.name)
            if known and value not in known:
                *first, last = (name for name in known if name is not None)
                raise ValueError(
                    f"{option.name} must be {', '.join(first)} or {last}, got {value!r}"
                )
        if not 0 <= (self.label_smoothing or 0) < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}"
            )
        if not 0 <= (self.ema or 0) < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")
        if self.mixup and self.cutmix:
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} exclude each other; leave out one"
            )
        if self.l2_sp and self.random_weights:
            raise ValueError("l2_sp pulls weights to pretrained ones; random_weights has none")
        if self.freeze_from is not None and self.schedule is not None:
            raise ValueError(
                "freeze_from is for runs with one cut; use freeze_until instead of schedule"
            )
        if self.lbfgs_c is not None and self.solver in ("gradient", "ridge"):
            raise ValueError(
                f"lbfgs_c={self.lbfgs_c} is the penalty of solver=lbfgs, and solver={self.solver} "
                "would not use it; leave out one of them"
            )
        if self.track_files and self.track is None:
            raise ValueError("track_files=True needs a tracker: track=mlflow or track=wandb")
        if self.views and self.cache == "off":
            raise ValueError(
                "views=N caches activations and cache=off caches none; use augment=True instead"
            )
        if self.head_start == "ridge" and self.hidden:
            raise ValueError(
                "head_start=ridge solves for a linear head, and hidden="
                f"{','.join(map(str, self.hidden))} puts layers before it; use head_start=random"
            )
        solver = "lbfgs" if self.solver == "auto" and self.lbfgs_c is not None else self.solver
        if solver in ("ridge", "lbfgs"):
            self._check_ignored(solver)

    @property
    def of_gradient_descent(self) -> list[str]:
        """The options that were given and that only ``solver="gradient"`` uses."""
        return self.changed(OF_GRADIENT_DESCENT)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of some options that are neither at their default nor ``OFF``, which is what
        training without such an option does."""
        values, defaults = vars(self), vars(FineTuneOptions())
        unchanged = {name: (defaults[name], OFF.get(name, defaults[name])) for name in names}
        return [name for name in unchanged if values[name] not in unchanged[name]]

    @property
    def is_mixed(self) -> bool:
        """Whether examples are combined with others of their batch."""
        return bool(self.mixup or self.cutmix)

    def head_only(self) -> "FineTuneOptions":
        """The same options for a run that trains the head only."""
        return replace(self, **HEAD_ONLY)

    @property
    def of_trained_heads(self) -> list[str]:
        """The options that were given and that a head that is solved for cannot have."""
        ignored = {
            "schedule": self.schedule,
            "freeze_from": self.freeze_from,
            "l2_sp": self.l2_sp,
            "ema": self.ema,
            "head_start=ridge": self.head_start == "ridge",
            "hidden": self.hidden,
            "dropout": self.dropout,
            "mixup": self.mixup,
            "cutmix": self.cutmix,
            "label_smoothing": self.label_smoothing,
            "augment (without views)": self.augment and not self.views,
            "early_stopping": self.early_stopping,
            "max_to_keep": self.max_to_keep,
        }
        return [name for name, value in ignored.items() if value]

    def _check_ignored(self, solver: str) -> None:
        """Refuse options that ridge and lbfgs would ignore."""
        if conflicts := self.of_trained_heads:
            raise ValueError(
                f"solver={solver} does not use {', '.join(conflicts)}; leave out one of them"
            )
        if unused := self.of_gradient_descent:
            logger.warning(f"solver={solver} does not use {', '.join(unused)}")


def _choices(kind: Any) -> tuple[str | None, ...]:
    """The values of a ``Literal``, perhaps with ``None``; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    if not any(get_origin(member) is Literal for member in members):
        return ()
    return (*itertools.chain(*map(get_args, members)), None)


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(FineTuneOptions):
    """Options of a run that has been set up, with the defaults that depend on model and images."""

    tap: str = field()
    input: str = field()
    preprocess: str = field()
    image_size: int | str = field()
    batch_size: int = field()
    label_smoothing: float = field()
    ema: float = field()
    calibrate: bool = field()


def parse_tap(tap: str | None) -> str | list[str] | None:
    """The option ``tap`` as ``Backbone`` takes it: one name as it is, several as a list.

    Raises:
        ValueError: if it is empty, or a list with ``all`` or ``auto``.
    """
    names = [name.strip() for name in (tap or "").split(",") if name.strip()]
    if tap is not None and not names:
        raise ValueError(f"tap={tap!r} names no tensor; leave it out for the default")
    if len(names) > 1 and (alone := {"all", "auto"} & {*names}):
        raise ValueError(f"tap={tap} has {alone.pop()} in a list of tensors; it stands alone")
    return names if len(names) > 1 else tap


def options_from(arguments: Mapping[str, Any]) -> FineTuneOptions:
    """Options from keyword arguments; ``tap`` may be a list of names, ``cache_dir`` a string, and
    numbers may be scalars of NumPy, as in a grid search.

    Raises:
        TypeError: for a name that is not an option; suggests the nearest one.
    """
    names = [option.name for option in fields(FineTuneOptions)]
    for name in arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(names)}"
            raise TypeError(f"{name!r} is not an option of fine_tune{hint}")
    if isinstance(tap := arguments.get("tap"), list | tuple):
        arguments = {**arguments, "tap": ",".join(tap)}
    if isinstance(folder := arguments.get("cache_dir"), str):
        arguments = {**arguments, "cache_dir": Path(folder)}
    plain = {
        name: value.item() if hasattr(value, "item") else value for name, value in arguments.items()
    }
    return FineTuneOptions(**plain)
