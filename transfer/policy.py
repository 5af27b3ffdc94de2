"""Which operations a stranger's graph may run: arithmetic, and nothing else.

A list of what is allowed rather than of what is not: an operation that nobody has thought of is
refused. Files, network, Python, printing, queues, variables' own assignments: none are on it.
"""

from __future__ import annotations

from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

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
    IdentityN InvertPermutation LinSpace MatrixBandPart MirrorPad NoOp OneHot OnesLike Pack Pad
    PadV2 ParallelConcat PlaceholderWithDefault PreventGradient Range Rank Reshape Reverse ReverseV2
    ScatterNd Shape ShapeN Size Slice Snapshot SpaceToBatch SpaceToBatchND SpaceToDepth Split SplitV
    Squeeze StopGradient StridedSlice Tile Transpose Unpack Where ZerosLike
"""
_IMAGES = """
    AdjustContrast AdjustContrastv2 AdjustHue AdjustSaturation CropAndResize ExtractImagePatches
    HSVToRGB RGBToHSV ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor
    ScaleAndTranslate
"""
# Dropout and noise. They draw numbers and touch nothing else.
_RANDOM = """
    Multinomial RandomShuffle RandomStandardNormal RandomUniform RandomUniformInt
    StatelessRandomNormal StatelessRandomUniform StatelessRandomUniformV2 TruncatedNormal
"""
# Conditionals of TensorFlow 1. Calls of functions (If, PartitionedCall) are not on the list:
# TensorFlow looks a function up by name among all that the process knows, not in this graph alone.
_CONTROL = "Merge Switch"

ALLOWED_OPS = frozenset(
    " ".join((_ELEMENTWISE, _LINEAR, _REDUCTIONS, _SHAPES, _IMAGES, _RANDOM, _CONTROL)).split()
)
RANDOM_OPS = frozenset(_RANDOM.split())


class ForbiddenOpError(ValueError):
    """A graph holds an operation that a loaded model may not run."""


def check_ops(graph_def: GraphDef) -> None:
    """Refuse a graph with an operation that is not on the list, or that calls a function.

    Raises:
        ForbiddenOpError: names every such operation with a node that uses it.
    """
    refused = {node.op: node.name for node in graph_def.node if not _is_arithmetic(node)}
    if refused:
        found = ", ".join(f"{op} (node {name!r})" for op, name in sorted(refused.items()))
        raise ForbiddenOpError(
            f"the graph uses {found}; a loaded model may only do arithmetic, and call no "
            "functions. Choose a tap, or an input, so that what lies between does without"
        )


def _is_arithmetic(node: NodeDef) -> bool:
    calls = any(attr.HasField("func") or attr.list.func for attr in node.attr.values())
    return node.op in ALLOWED_OPS and not calls
