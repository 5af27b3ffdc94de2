"""Allowlist of the operations that an untrusted graph may run: pure computation only.

An allowlist, so that unknown operations are rejected. It excludes access to files and network,
Python, printing, queues and assignments of variables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import attributes

_ELEMENTWISE = """
    Abs Acos Acosh Add AddN AddV2 Asin Asinh Atan Atan2 Atanh BiasAdd BiasAddV1 Bitcast Cast Ceil
    ClipByValue Cos Cosh Digamma Div DivNoNan Elu Equal Erf Erfc Exp Expm1 Floor FloorDiv FloorMod
    Greater GreaterEqual Inv Invert IsFinite IsInf IsNan L2Loss LeakyRelu Less LessEqual Lgamma Log
    Log1p LogicalAnd LogicalNot LogicalOr LogSoftmax Maximum Minimum Mod Mul MulNoNan Neg NotEqual
    Pow RealDiv Reciprocal Relu Relu6 Rint Round Rsqrt Select SelectV2 Selu Sigmoid Sign Sin Sinh
    Softmax Softplus Softsign Sqrt Square SquaredDifference Sub Tan Tanh TruncateDiv TruncateMod
    Xdivy Xlogy FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars FakeQuantWithMinMaxVarsPerChannel
"""
_LINEAR = """
    AvgPool AvgPool3D BatchMatMul BatchMatMulV2 BatchMatMulV3 BatchNormWithGlobalNormalization
    Conv2D Conv2DBackpropInput Conv3D DepthwiseConv2dNative Dilation2D Einsum FractionalAvgPool
    FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3 LRN MatMul MaxPool MaxPool3D
    MaxPoolV2 MaxPoolWithArgmax
"""
_REDUCTIONS = """
    All Any ArgMax ArgMin Bincount CheckNumerics Cumprod Cumsum InTopK InTopKV2 Max Mean Min Prod
    SegmentMean SegmentSum Sum TopK TopKV2 UnsortedSegmentSum
"""
_SHAPES = """
    BatchToSpace BatchToSpaceND BroadcastArgs BroadcastTo Concat ConcatV2 Const DepthToSpace
    DynamicPartition DynamicStitch EnsureShape ExpandDims Fill Gather GatherNd GatherV2 Identity
    IdentityN InvertPermutation LinSpace MatrixBandPart MatrixDiag MatrixDiagV2 MatrixDiagV3
    MirrorPad NoOp OneHot OnesLike Pack Pad
    PadV2 ParallelConcat PlaceholderWithDefault PreventGradient Range Rank Reshape Reverse ReverseV2
    ScatterNd Shape ShapeN Size Slice Snapshot SpaceToBatch SpaceToBatchND SpaceToDepth Split SplitV
    Squeeze StopGradient StridedSlice Tile Transpose Unpack Where ZerosLike
"""
_IMAGES = """
    AdjustContrast AdjustContrastv2 AdjustHue AdjustSaturation CropAndResize ExtractImagePatches
    HSVToRGB RGBToHSV ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor
    ScaleAndTranslate
"""
# Dropout and noise. They generate random numbers without other side effects.
_RANDOM = """
    Multinomial RandomShuffle RandomStandardNormal RandomUniform RandomUniformInt
    StatelessRandomGetAlg StatelessRandomGetKeyCounter
    StatelessRandomNormal StatelessRandomNormalV2 StatelessRandomUniform StatelessRandomUniformInt
    StatelessRandomUniformV2 StatelessTruncatedNormal TruncatedNormal
"""

# Function calls (PartitionedCall, If) are not allowed: TensorFlow looks functions up by name among
# all functions of the process, not only in this graph. Neither are Switch and Merge. Loading
# inlines the calls and replaces the conditionals.
ALLOWED_OPS = frozenset(
    " ".join((_ELEMENTWISE, _LINEAR, _REDUCTIONS, _SHAPES, _IMAGES, _RANDOM)).split()
)
RANDOM_OPS = frozenset(_RANDOM.split())
MAX_SPLAT_BYTES = 2**28
"""Maximum total size of constants that are stored as one value and a shape: 256 MB."""


class ForbiddenOpError(ValueError):
    """A graph contains an operation that a loaded model may not run.

    Example:
        >>> import tensorflow as tf
        >>> from transfer import Backbone, ForbiddenOpError, load_meta_graph
        >>> with tf.Graph().as_default():
        ...     images = tf.compat.v1.placeholder(tf.float32, [None, 8, 8, 3], name="images")
        ...     number = tf.strings.to_number(tf.io.read_file("/etc/hostname"))
        ...     _ = tf.add(tf.reduce_mean(images, [1, 2]), number, name="fc7")
        ...     _ = tf.compat.v1.train.export_meta_graph("stranger.meta")
        >>> try:
        ...     Backbone(load_meta_graph("stranger.meta"), tap="fc7")
        ... except ForbiddenOpError as error:
        ...     print("ReadFile" in str(error))
        True
    """


def check(graph_def: GraphDef) -> None:
    """Reject a graph with operations that are not on the allowlist or call functions, with invalid
    attributes, or with constants that are small in the file but huge in memory.

    Raises:
        ForbiddenOpError: with every such operation and a node that uses it.
        ValueError: if the constants are too large or inconsistent, or an attribute would crash
            TensorFlow.
    """
    refused = {node.op: node.name for node in graph_def.node if not _is_arithmetic(node)}
    if refused:
        shown = ", ".join(f"{op} (node {name!r})" for op, name in sorted(refused.items()))
        raise ForbiddenOpError(
            f"the graph uses {shown}; a loaded model may only do arithmetic, and call no "
            "functions. Choose a tap, or an input, such that the graph between them needs none"
        )
    for node in graph_def.node:
        attributes.check(node)
    check_constants(graph_def.node)


def _is_arithmetic(node: NodeDef) -> bool:
    calls = any(attr.HasField("func") or attr.list.func for attr in node.attr.values())
    return node.op in ALLOWED_OPS and not calls


def check_constants(nodes: Iterable[NodeDef]) -> None:
    """Reject constants that are small in the file but huge in memory.

    Raises:
        ValueError: if they are too large, or the data of one do not match its shape and dtype.
    """
    splat_bytes = 0
    for node in nodes:
        if node.op != "Const":
            continue
        tensor = node.attr["value"].tensor
        sizes = [dim.size for dim in tensor.tensor_shape.dim]
        try:
            item_bytes = tf.as_dtype(tensor.dtype).size
        except TypeError:
            item_bytes = 0
        if tensor.dtype != node.attr["dtype"].type or min(sizes, default=0) < 0 or not item_bytes:
            raise ValueError(
                f"the graph is damaged: its constant {node.name!r} has shape {sizes} and elements "
                f"of type {tensor.dtype}"
            )
        num_bytes = math.prod(sizes) * item_bytes
        if tensor.tensor_content and len(tensor.tensor_content) != num_bytes:
            raise ValueError(
                f"the graph is damaged: its constant {node.name!r} has "
                f"{len(tensor.tensor_content)} bytes; its shape {sizes} needs {num_bytes}"
            )
        splat_bytes += 0 if tensor.tensor_content else num_bytes
    if splat_bytes > MAX_SPLAT_BYTES:
        raise ValueError(
            f"the constants of the graph would take {splat_bytes:,} bytes of memory, more than "
            f"{MAX_SPLAT_BYTES:,}, though the file is small; it is damaged or malicious"
        )
