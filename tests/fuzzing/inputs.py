"""Make an input from an original model and a number."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from byte_changes import BYTES, PLACES
from common import Base, Generator, pick
from file_changes import change_meta, change_objects, change_pb, change_pbtxt, change_saved_model
from protobufs import STRINGS, serialized
from table_changes import change_table


def change_card(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    card = json.loads(content)
    odd = (
        *(None, True, -1, 0, 10**30, 1e400, float("nan"), [], {}, [1, 2], {"a": 1}, {"x:0": [1]}),
        *STRINGS,
        *("images:0", "fc7:0", "nowhere:0", "fc7/weights", {"images:0": 1.0}, {"keep_prob:0": "x"}),
        *({"keep_prob:0": [1.0] * 10}, {"keep_prob:0": 10**30}, {"keep_prob:0": None}),
    )
    if rng.random() < 0.2:
        depth = int(pick((10, 1000, 10**5), rng))
        opening = pick(("[", '{"eval":', '{"feeds":{"a":['), rng)
        return (opening * depth).encode(), "nested"
    if rng.random() < 0.1:
        return b'{"image_size": ' + b"9" * 10**5 + b"}", "digits"
    done = []
    for _ in range(int(rng.integers(1, 4))):
        keys = ("input", "tap", "image_size", "preprocess", "feeds", "labels", "outputs", "eval")
        key = pick(keys, rng)
        card[key] = pick(odd, rng)
        done.append(f"{key}={str(card[key])[:20]}")
    return json.dumps(card).encode(), "+".join(done)


def change_state(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    odd = (
        *(b"", b"/", b"..", b"../../../etc/passwd", b"tiny-2000/", b"tiny-1000.index", b"*", b"\\"),
        *(b"\\377", b"\\", b"tiny-[0-9]*", b"C:\\\\x\\\\tiny-1000", b"\\n", b"A" * 100_000),
    )
    name = pick(odd, rng)
    line = pick((b'model_checkpoint_path: "%s"\n', b"model_checkpoint_path: %s\n", b"%s"), rng)
    return line % name * int(rng.choice([1, 2, 1000])), f"path {name[:30]!r}"


# For each kind, the function that changes the contents but keeps the format, and its probability.
CHANGES: dict[str, tuple[Callable[[bytes, Base, Generator], tuple[bytes, str]], float]] = {
    "meta": (change_meta, 0.7),
    "index": (change_table, 0.6),
    "v1": (change_table, 0.6),
    "pb": (change_pb, 0.7),
    "pbtxt": (change_pbtxt, 0.5),
    "savedmodel": (change_saved_model, 0.7),
    "state": (change_state, 0.4),
    "card": (change_card, 0.6),
}


def _changes_for(base: Base, target: str) -> Callable[..., tuple[bytes, str]] | None:
    if base.kind == "savedmodel" and not target.endswith(".pb"):
        return change_table if target.endswith(".index") else None
    return CHANGES[base.kind][0] if base.kind in CHANGES else None


def change_checkpoint_objects(base: Base, folder: Path, rng: Generator) -> str:
    """Rewrite a TensorFlow 2 checkpoint with a changed object graph."""
    import tensorflow as tf
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    key, prefix = "_CHECKPOINTABLE_OBJECT_GRAPH", "variables/variables"
    reader = tf.train.load_checkpoint(str(base.folder / prefix))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    objects = TrackableObjectGraph.FromString(values[key])
    done = change_objects(objects, rng)
    odd = (rng.bytes(30), b"", np.float32(1), [b"", b""], np.zeros((0,), np.int64))
    values[key] = serialized(objects) if rng.random() < 0.8 else pick(odd, rng)
    for path in (folder / "variables").iterdir():
        path.unlink()
    tensors = [tf.convert_to_tensor(value) for value in values.values()]
    tf.raw_ops.SaveV2(
        prefix=str(folder / prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=tensors,
    )
    return f"{prefix}: {done}"


def make_input(base: Base, donor: Base, folder: Path, rng: Generator) -> str:
    """Write a copy of an original model with one file changed; returns a description."""
    for source in sorted(base.folder.rglob("*")):
        if source.is_file():
            place = folder / source.relative_to(base.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source)
    if base.name == "module" and rng.random() < 0.15:
        return change_checkpoint_objects(base, folder, rng)
    target = base.targets[0] if rng.random() < 0.6 else pick(base.targets, rng)
    path = folder / target
    content = path.read_bytes()
    path.unlink()
    change = _changes_for(base, target)
    share = CHANGES[base.kind][1] if base.kind in CHANGES else 0.0
    if change and rng.random() < share:
        with contextlib.suppress(NotImplementedError):
            changed, done = change(content, base, rng)
            path.write_bytes(changed)
            return f"{target}: {done}"
    if rng.random() < 0.1:
        path.write_bytes(content)
        place_change = pick(PLACES, rng)
        place_change(path, rng)
        return f"{target}: {place_change.__name__}"
    given = (donor.folder / pick(donor.targets, rng)).read_bytes()
    done = []
    for _ in range(int(rng.choice([1, 1, 1, 2]))):
        byte_change = pick(BYTES, rng)
        content = byte_change(content, rng, given)
        done.append(byte_change.__name__)
    path.write_bytes(content)
    return f"{target}: {'+'.join(done)}"
