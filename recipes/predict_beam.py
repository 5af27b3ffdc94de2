"""Predict the classes of very many images with a fine-tuned model, on an Apache Beam runner.

    vgg-transfer predict-beam RUN 'photos/**.jpg' --output predictions
    vgg-transfer predict-beam hdfs://models/flowers/model 'hdfs://photos/*' --output hdfs://out/p \
        -- --runner FlinkRunner --flink_master host:8081

Patterns, models and outputs may lie wherever Beam finds files: on a disk that all workers share, on
HDFS, on S3 or on Google Cloud Storage. What comes after ``--`` is for Beam. Needs
``pip install 'vgg-transfer[beam]'``, here and on the workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import Parameter

from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictBeamConfig:
    """Flags of ``vgg-transfer predict-beam``, with their defaults."""

    output: str
    """Prefix of the results, OUTPUT-00000-of-00004.jsonl and so on, an object a line for each
    image; OUTPUT.failed-*.jsonl name images that could not be read, with the reason."""
    top_k: int = 3
    """Classes to show for each image, the most probable first."""
    batch_size: int = 32
    """Images per step."""


def predict_beam(run: str, pattern: str, /, *options: str, config: PredictBeamConfig) -> int:
    """Predict the classes of very many images on an Apache Beam runner.

    Args:
        run: run folder of finetune, or prefix of a fine-tuned model.
        pattern: the images, e.g. 'photos/*.jpg'; ** stands for folders, too.
        options: after --, options of Beam, e.g. --runner FlinkRunner. Without any it runs here.
    """
    with job():
        from transfer.evaluation.beam import predict_on_beam

        done, failed = predict_on_beam(run, pattern, **vars(config), options=options)
    print(f"{done} images, {failed} of which could not be read")
    return 1 if failed else 0
