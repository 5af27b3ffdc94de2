"""Export a fine-tuned model, including its preprocessing, for deployment.

    vgg-transfer export RUN
    vgg-transfer export RUN --format saved_model,onnx

Each format is written to its own folder in RUN/export, with a README that shows how to call it.
Before an export is moved there, its predictions on held-out images are compared with those of the
model; export.json has the result.
"""

from __future__ import annotations

from pathlib import Path

from recipes.startup import job


def export(
    run: Path,
    /,
    *,
    format: str | None = None,
    num_images: int = 32,
    num_examples: int = 100,
    out: Path | None = None,
) -> int:
    """Export a fine-tuned model: meta graph, SavedModel, TFLite, ONNX, Keras.

    Args:
        run: run folder of finetune.
        format: meta_graph, saved_model, tflite, onnx, keras, or a comma-separated list. [default:
            all; onnx only if vgg-transfer[onnx] is installed]
        num_images: Held-out images on which the export is compared with the model.
        num_examples: Calibration images for TFLite int8 quantization.
        out: Output folder. [default: RUN/export]
    """
    with job():
        from transfer.exports.writing import export_run

        formats = None if format is None else format.split(",")
        metrics, folder = export_run(
            run, out, formats=formats, num_images=num_images, num_examples=num_examples
        )
    for name, row in metrics["exports"].items():
        print(
            f"{name}: {row['megabytes']:.1f} MB; {row['same_label']:.1%} equal labels, "
            f"probabilities differ by at most {row['max_difference']:.1g}"
        )
    print(folder)
    return 0
