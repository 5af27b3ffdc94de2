"""Time, memory and bytes read of the steps before and during training, by the number of images.

    python benchmarks/data_scale.py 1000 10000 100000

Writes images of one pixel, in 1,000 classes or fewer, to a temporary folder, as an image folder, as
a CSV manifest of the same files, and as a tfds dataset in TFRecord files; so that what is measured
is the work per image. Each layout is opened by two processes, one after the other: the second finds
the index of the first. Seconds are those of the processor, of all threads; memory is the peak of
the process, beyond what it took after importing TensorFlow. Bytes are those that the process read
by any system call (``rchar`` in ``/proc``): Linux only. Cached features are read once, to verify
them; later they are memory-mapped, which is not counted.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("folder", "csv", "tfrecord")
PER_SHARD = 100_000
BATCH = 256
WIDTH = 64  # of cached features
MAX_IMAGES = 2_000  # that are read in an epoch or an evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--folder", help="where the images are written; default: a temporary one")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    rows = []
    for size, layout in itertools.product(arguments.sizes, arguments.layouts):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write(Path(folder) / "data", layout, size)
            environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
            command = [sys.executable, __file__, "--measure", layout, f"{folder}/data"]
            first, again = (
                json.loads(subprocess.check_output(command, env=environment).splitlines()[-1])
                for _ in range(2)
            )
        steps = {"open, first time": first["open"], "open, again": again.pop("open"), **again}
        rows += [(layout, size, step, *cells(values)) for step, values in steps.items()]
        print(*rows[-len(steps) :], sep="\n", file=sys.stderr, flush=True)
    header = ["layout", "images", "step", "CPU s", "MB memory", "MB read"]
    print(tabulate(rows, header, "github", disable_numparse=True))


def cells(values: dict[str, float]) -> tuple[str, str, str]:
    return f"{values['s']:.2f}", f"{values['memory']:.0f}", f"{values['read']:.2f}"


def write(folder: Path, layout: str, size: int) -> None:
    """Write the images, all alike."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    png, classes = buffer.getvalue(), min(1000, size // 20)
    names = [f"class{number:04}" for number in range(classes)]
    if layout in ("folder", "csv"):
        for name in names:
            (folder / name).mkdir(parents=True)
        lines = ["path,label"]
        for number in range(size):
            label = names[number % classes]
            path = f"{label}/image_{number:08}.png"
            (folder / path).write_bytes(png)
            lines.append(f"{path},{label}")
        if layout == "csv":
            (folder / "labels.csv").write_text("\n".join(lines))
        return
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder.mkdir()
    shards = [range(size)[start : start + PER_SHARD] for start in range(0, size, PER_SHARD)]
    template = tfds.core.ShardedFileTemplate(
        folder, dataset_name="scale", split="train", filetype_suffix="tfrecord"
    )
    for index, numbers in enumerate(shards):
        path = template.sharded_filepath(shard_index=index, num_shards=len(shards))
        with tf.io.TFRecordWriter(str(path)) as writer:
            for number in numbers:
                features = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[png])),
                    "label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[number % classes])
                    ),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=names),
            }
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name="train", shard_lengths=[len(shard) for shard in shards], num_bytes=0
            )
        ],
        filename_template=template,
    )


def measure(layout: str, folder: str) -> dict[str, dict[str, float]]:
    """Seconds, and megabytes of peak memory and read, of each step in this process."""
    sys.path.insert(0, str(ROOT))
    import keras

    from transfer import Head
    from transfer.activations.cache import Cache
    from transfer.data.batches import shuffled
    from transfer.data.dataset import few_shot
    from transfer.data.sources import open_source
    from transfer.images.preprocess import Preprocess
    from transfer.training.optimizers import make_optimizer
    from transfer.training.trainer import ParameterGroup, Trainer

    preprocess = Preprocess("none", 8)
    where = {
        "folder": {"image_folder": folder},
        "csv": {"csv": f"{folder}/labels.csv"},
        "tfrecord": {"data_dir": folder},
    }[layout]
    found: dict[str, dict[str, float]] = {}
    at_start = peak_memory()

    def step(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        start, before = time.process_time(), num_read()
        result = work()
        found[name] = {
            "s": time.process_time() - start,
            "memory": (peak_memory() - at_start) / 1e6,
            "read": (num_read() - before) / 1e6,
        }
        return result

    def opened() -> Any:
        source = open_source(**where)
        source.split("train")  # which checks the labels
        return source

    source = step("open", opened)
    train, held_out = step("split", source.train_and_eval_splits)
    few = step("few-shot draw", lambda: few_shot(train, 5, seed=1))
    step("few-shot images", lambda: consume(few.batches(preprocess, BATCH, shuffle_seed=1)))

    def first(number: int) -> None:
        next(iter(train.batches(preprocess, BATCH, shuffle_seed=1, first_batch=number)))

    step("first batch", lambda: first(0))
    step("first batch, resumed in mid-epoch", lambda: first(len(train) // BATCH // 2))
    last = max(0, len(train) - MAX_IMAGES) // BATCH

    def rest(**options: Any) -> int:
        return consume(
            train.batches(preprocess, BATCH, shuffle_seed=2, first_batch=last, **options)
        )

    number = min(len(train), len(train) - last * BATCH)
    step(f"{number} training images", rest)
    step("the same, one of 2 workers", lambda: rest(shard=(1, 2)))
    evaluated = held_out.where(np.arange(len(held_out)) < MAX_IMAGES)
    step(
        f"evaluation, {len(evaluated)} held-out images",
        lambda: consume(evaluated.batches(preprocess, 32)),
    )
    ids = step("ids for the activation cache", lambda: train.ids)
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as cache:
        entry = Cache(Path(cache), 10**12).entry({"cut": "fc7"}, [WIDTH], "float32")
        for start in range(0, len(ids), 10_000):
            chunk = ids[start : start + 10_000]
            entry.append(chunk, np.ones([len(chunk), WIDTH], np.float32))
        rows = step("open cached features", lambda: entry.read(ids))
        model = keras.Sequential([keras.Input([WIDTH]), Head(len(source.class_names))])
        group = ParameterGroup(make_optimizer("adam", 1e-3), model.trainable_variables)
        trainer = Trainer(model, [group])
        trainer.train_step(rows[np.arange(BATCH) % len(rows)], train.labels[np.zeros(BATCH, int)])

        def epoch(first: int) -> None:
            order = shuffled(len(train), 3)
            for start in range(first * BATCH, len(train) - BATCH + 1, BATCH):
                chosen = order[start : start + BATCH]
                trainer.train_step(rows[chosen], train.labels[chosen])

        step("epoch of a head", lambda: epoch(0))
        step("the same, resumed in mid-epoch", lambda: epoch(len(train) // BATCH // 2))
    return found


def consume(batches: Any) -> int:
    return sum(len(np.asarray(labels)) for _, labels in batches)


def num_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
