"""What a run was made from: ``provenance.json``, and the names of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.core import measurement
from transfer.core.files import write_names
from transfer.finetuning.context import RunContext
from transfer.runs import run_folder

SOURCES = ("model", "dataset", "data_dir", "image_folder", "csv", "add")
"""Sources of model and images in ``config.yaml``; ``provenance.json`` identifies their content."""


def check_provenance(context: RunContext) -> None:
    """Refuse to resume a run with a different model or different images.

    Raises:
        ValueError: names what is different.
    """
    path = context.run_dir / run_folder.PROVENANCE
    if not path.is_file():
        return
    began, now = run_folder.read_json(path), _provenance(context)
    changed = [
        part for part in ("model", "dataset") if _content(began, part) != _content(now, part)
    ]
    if changed:
        raise ValueError(
            f"cannot resume the run in {str(context.run_dir)!r}: its {' and '.join(changed)} "
            f"changed since it began (see {path.name}); start anew, with another run_dir"
        )


def write_provenance(context: RunContext) -> None:
    """Write the names of the training and held-out images, and ``provenance.json``, unless the run
    is resumed and has them."""
    run_dir, request = context.run_dir, context.request
    path = run_dir / run_folder.PROVENANCE
    if path.is_file():
        return
    write_names(run_dir / run_folder.TRAINING, context.train.names)
    write_names(run_dir / run_folder.HELD_OUT, context.held_out.names)
    if request.growth is not None:
        run_folder.write_json(run_dir / run_folder.SOURCES, {"sources": request.growth.sources})
    run_folder.write_json(path, _provenance(context))


def _provenance(context: RunContext) -> dict[str, Any]:
    """The command, versions, model and images of a run."""
    request = context.request
    return {
        "command": list(request.command),
        "git": measurement.git_revision(),
        "versions": measurement.versions(),
        "model": {
            "name": request.origin["model"],
            "sha256": context.classifier.backbone.digest(),
        },
        "dataset": {"name": context.train.source.name} | context.fingerprint,
    }


def _content(provenance: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part of the provenance without its name."""
    return {name: value for name, value in provenance[part].items() if name != "name"}
