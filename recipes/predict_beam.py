"""Predict the classes of large numbers of images with a fine-tuned model on Apache Beam.

    vgg-transfer predict-beam RUN 'photos/**.jpg' --output predictions
    vgg-transfer predict-beam hdfs://models/flowers/model 'hdfs://photos/*' --output hdfs://out/p \
        -- --runner FlinkRunner --flink_master host:8081

Images, models and outputs may be on any filesystem that Beam supports: a disk shared by all
workers, HDFS, S3 or Google Cloud Storage. Arguments after ``--`` are passed to Beam. Needs
``pip install 'vgg-transfer[beam]'``, here and on the workers.
"""

from __future__ import annotations

from recipes.startup import job


def predict_beam(
    run: str, pattern: str, /, *options: str, output: str, top_k: int = 3, batch_size: int = 32
) -> int:
    """Predict the classes of large numbers of images on an Apache Beam runner.

    Args:
        run: run folder of finetune, or checkpoint prefix of a fine-tuned model.
        pattern: glob pattern of the images, e.g. 'photos/*.jpg'; ** also matches subfolders.
        options: after --, Beam options, e.g. --runner FlinkRunner. Default: run on this machine.
        output: Prefix of the output shards, OUTPUT-00000-of-00004.jsonl etc., with one JSON object
            per line and image; OUTPUT.failed-*.jsonl list images that could not be read, with the
            reason.
        top_k: Number of classes to show per image, most probable first.
        batch_size: Images per step.
    """
    with job():
        from transfer.evaluation.beam import predict_on_beam

        done, failed = predict_on_beam(
            run, pattern, output=output, top_k=top_k, batch_size=batch_size, options=options
        )
    print(f"{done} images, {failed} of which could not be read")
    return 1 if failed else 0
