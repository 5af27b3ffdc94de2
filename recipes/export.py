"""Export a fine-tuned model, with its preprocessing, to be used elsewhere.

    vgg-transfer export RUN
    vgg-transfer export RUN --format saved_model,onnx

Each format goes to a folder of its own in RUN/export, with a README that says how to call it. It is
run on images that the run held out, and compared with the model itself, before it is there; what
came out is in export.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Flags of ``vgg-transfer export``, with their defaults."""

    format: str | None = None
    """meta_graph, saved_model, tflite, onnx, keras, or several with commas between. [default: all;
    onnx if vgg-transfer[onnx] is installed]"""
    num_images: int = 32
    """Images to compare on."""
    num_examples: int = 100
    """Images from which TFLite's int8 learns which range its integers must cover."""
    out: Path | None = None
    """Folder of the exports. [default: RUN/export]"""


def export(run: Path, /, config: ExportConfig = ExportConfig()) -> int:
    """Export a fine-tuned model: meta graph, SavedModel, TFLite, ONNX, Keras.

    Args:
        run: run folder of finetune.
    """
    with job():
        from transfer.exports.writing import export_run

        metrics, folder = export_run(
            run,
            config.out,
            formats=None if config.format is None else config.format.split(","),
            num_images=config.num_images,
            num_examples=config.num_examples,
        )
    for name, row in metrics["exports"].items():
        print(
            f"{name}: {row['megabytes']:.1f} MB; {row['same_label']:.1%} of the labels, "
            f"probabilities to {row['max_difference']:.1g}"
        )
    print(folder)
    return 0
