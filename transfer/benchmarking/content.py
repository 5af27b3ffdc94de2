"""The model and the images of a benchmark, which may not change before its last run.

Their hashes are in ``study.json``, beside ``config.yaml``, which has only flags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from transfer.core import measurement
from transfer.data.dataset import MAX_COMPARED, Split
from transfer.finetuning.image_inspection import remembered_images
from transfer.finetuning.request import RunRequest
from transfer.models.meta_graph import MetaGraph
from transfer.runs import run_data, run_folder

CONTENT = "study.json"


def content_of(request: RunRequest) -> dict[str, str]:
    """Hashes of the model, of the names and labels of the images and, as far as they are decoded
    before a run anyway, of their files: with others in the same places, results would not be
    comparable."""
    # Copies, whose ids are read anew: files may have changed since the splits read them.
    splits = replace(request.train), replace(request.held_out)
    hashes = {
        "model_sha256": _model_sha256(request.graph),
        "images_sha256": _images_sha256(splits, of_files=False),
    }
    if sum(map(len, splits)) <= MAX_COMPARED:
        with remembered_images(request.options, *splits):
            for split in splits:  # they are kept
                split.fingerprints(lambda it: measurement.progress(it, "images", "image"))
            hashes["files_sha256"] = _images_sha256(splits, of_files=True)
    return hashes


def keep_content(out: Path, content: Mapping[str, str]) -> None:
    """Write the hashes to the folder of a benchmark, whose lock is held; see ``check_content``."""
    run_folder.write_json(out / CONTENT, content)


def check_content(out: Path, content: Mapping[str, str]) -> None:
    """Refuse to continue a benchmark with another model, or with other images.

    Raises:
        ValueError: names the hashes that differ.
    """
    path = out / CONTENT
    # Studies of earlier versions recorded it among their options, or not at all.
    began = run_folder.read_json(path) if path.is_file() else run_folder.read_config(out)
    different = [
        f"{name}={began[name]!r}, now {value!r}"
        for name, value in content.items()
        if began.get(name, value) != value
    ]
    if different:
        raise ValueError(
            f"cannot continue the benchmark in {str(out)!r} with another model or other images "
            f"({'; '.join(different)}); start a new one, in another run_dir"
        )


def _model_sha256(graph: MetaGraph) -> str:
    model = hashlib.sha256(graph.graph_def.SerializeToString(deterministic=True))
    prefix = graph.checkpoint_prefix
    # The index has checksums of all weights; a checkpoint of version 1 is a single file.
    for path in () if prefix is None else (Path(f"{prefix}.index"), prefix):
        if path.is_file():
            model.update(path.read_bytes())
            break
    return model.hexdigest()


def _images_sha256(splits: Iterable[Split], *, of_files: bool) -> str:
    images = hashlib.sha256()
    for split in splits:
        images.update(run_data.digest(split, of_files=of_files)["sha256"].encode())
    return images.hexdigest()
