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


def write_provenance(context: RunContext) -> None:
    """Write the names of the training and held-out images, and ``provenance.json``: the command,
    versions, model and images of the run.

    Raises:
        ValueError: if a resumed run has a different model or different images.
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
        began = run_folder.read_json(path)
        changed = [
            part
            for part in ("model", "dataset")
            if _content(began, part) != _content(provenance, part)
        ]
        if changed:
            raise ValueError(
                f"cannot resume the run in {str(run_dir)!r}: its {' and '.join(changed)} changed "
                f"since it began (see {path.name}); start anew, with another run_dir"
            )
        return
    write_names(run_dir / run_folder.TRAINING, context.train.names)
    write_names(run_dir / run_folder.HELD_OUT, context.held_out.names)
    if request.growth is not None:
        run_folder.write_json(run_dir / run_folder.SOURCES, {"sources": request.growth.sources})
    run_folder.write_json(path, provenance)


def _content(provenance: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part of the provenance without its name."""
    return {name: value for name, value in provenance[part].items() if name != "name"}
