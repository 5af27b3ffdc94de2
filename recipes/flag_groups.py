"""The groups in which ``--help`` shows the flags of ``finetune`` and of the commands that share
them."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Group, Parameter

_GROUPS = {
    "Usual flags": "image_folder csv dataset model preprocess freeze_until epochs learning_rate "
    "augment out resume",
    "Model": "tap input image_size feed rename use_ema random_weights",
    "Data": "data_dir group_by train_split eval_split shots_per_class skip_unreadable views",
    "What is trained": "freeze_from schedule keep_dropout backbone_lr_scale block_lr_decay",
    "Optimization": "batch_size optimizer lr_schedule warmup_epochs weight_decay l2_sp ema "
    "clip_norm accumulate early_stopping label_smoothing mixup cutmix class_weights",
    "Head": "solver lbfgs_c head_start hidden dropout calibrate",
    "Activation cache": "cache cache_dir cache_limit cache_dtype",
    "Precision": "precision int8_engine",
    "Run": "seed deterministic strategy checkpoint_minutes max_to_keep "
    "keep_checkpoint_every_n_hours track track_files",
}
_MEMBERS = {name: title for title, names in _GROUPS.items() for name in names.split()}
GROUPS = {title: Group(title, sort_key=place) for place, title in enumerate(_GROUPS, 1)}
"""The groups, by title."""
GENERAL = Group("General", sort_key=99)
"""Flags of all commands."""

Config = TypeVar("Config", bound=type)


def grouped(config: Config) -> Config:
    """Class decorator of a dataclass of flags: sets the group of each flag and the order in it.
    Flags that are not listed stay in cyclopts' default group, which a subclass uses for its own.
    """
    hints = get_type_hints(config, include_extras=True)
    known: dict[str, Any] = vars(config)["__dataclass_fields__"]
    for name, title in _MEMBERS.items():
        if name in known:
            parameter = Parameter(group=GROUPS[title])
            config.__annotations__[name] = Annotated[hints[name], parameter]
    # --help shows the flags of a group in the order of the fields, which have keywords only.
    order = [*_MEMBERS]
    for name in sorted(known, key=lambda name: order.index(name) if name in order else len(order)):
        known[name] = known.pop(name)
    return config
