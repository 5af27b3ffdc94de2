"""``.caffemodel``: the part of Caffe's NetParameter that holds weights.

Field numbers from caffe.proto (github.com/BVLC/caffe, src/caffe/proto).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import DecodeError

_MESSAGES: dict[str, list[tuple[str, int, str, bool]]] = {
    # message: (field, number, type, repeated)
    "BlobShape": [("dim", 1, "int64", True)],
    "BlobProto": [
        ("num", 1, "int32", False),
        ("channels", 2, "int32", False),
        ("height", 3, "int32", False),
        ("width", 4, "int32", False),
        # Packed floats, which are written as bytes are; so they need not become Python objects.
        ("data", 5, "bytes", False),
        ("shape", 7, "BlobShape", False),
    ],
    "V1LayerParameter": [("name", 4, "string", False), ("blobs", 6, "BlobProto", True)],
    "LayerParameter": [("name", 1, "string", False), ("blobs", 7, "BlobProto", True)],
    "NetParameter": [
        ("name", 1, "string", False),
        ("layers", 2, "V1LayerParameter", True),
        ("layer", 100, "LayerParameter", True),
    ],
}


def _net_parameter() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="vgg_transfer/caffe.proto", package="vgg_transfer.caffe", syntax="proto2"
    )
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, is_repeated in fields:
            field = message.field.add(name=name, number=number)
            field.label = (
                FieldDescriptorProto.LABEL_REPEATED
                if is_repeated
                else FieldDescriptorProto.LABEL_OPTIONAL
            )
            if kind in _MESSAGES:
                field.type = FieldDescriptorProto.TYPE_MESSAGE
                field.type_name = f".vgg_transfer.caffe.{kind}"
            else:
                field.type = getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}")
                if is_repeated:
                    field.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("vgg_transfer.caffe.NetParameter")
    return message_factory.GetMessageClass(found)


NetParameter = _net_parameter()


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """``<layer>/0`` (weights, ``[outputs, inputs, height, width]`` or ``[outputs, inputs]``) and
    ``<layer>/1`` (biases); empty if the data are no network."""
    net = NetParameter()
    try:
        net.ParseFromString(data)
    except DecodeError:
        return {}
    found = {}
    for layer in [*net.layers, *net.layer]:
        for number, blob in enumerate(layer.blobs):
            legacy = (blob.num, blob.channels, blob.height, blob.width)
            shape = tuple(blob.shape.dim) or legacy
            num_values = len(blob.data) // 4
            if min(shape) < 1 or math.prod(shape) * 4 != len(blob.data):
                raise ValueError(f"its layer {layer.name!r} has {num_values} values for {shape}")
            # Before it had shapes, Caffe padded them with ones in front.
            while len(shape) > 1 and shape[0] == 1 and number == 1:
                shape = shape[1:]
            if len(shape) == 4 and shape[:2] == (1, 1):
                shape = shape[2:]
            found[f"{layer.name}/{number}"] = np.frombuffer(blob.data, "<f4").reshape(shape)
    return found
