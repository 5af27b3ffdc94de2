"""GraphDef to GraphDef: what a tap needs, as a pure function of an input and of weights.

Pure functions throughout: nothing is imported, run or changed in place.
"""

from transfer.surgery.conditionals import NORMS
from transfer.surgery.dropout import find as find_dropout
from transfer.surgery.functions import inline
from transfer.surgery.graphs import (
    MAX_TRACE,
    VARIABLES,
    ancestors,
    canonical,
    check,
    constant,
    data_inputs,
    downstream,
    dtype_of,
    operation_of,
    outputs,
    placeholders,
    split_tensor_name,
    static_shape,
    with_nodes,
)
from transfer.surgery.guards import ranks_of, unproven, with_guards
from transfer.surgery.layout import channels_last, is_channels_first
from transfer.surgery.modes import Mode
from transfer.surgery.modes import find as find_modes
from transfer.surgery.network import Network, Variable, cut, extract, variable
from transfer.surgery.randomness import SEED, is_seeded
from transfer.surgery.scales import find_scales
from transfer.surgery.shapes import Shape, free_batch, infer, output_shapes

__all__ = [
    "MAX_TRACE",
    "NORMS",
    "SEED",
    "VARIABLES",
    "Mode",
    "Network",
    "Shape",
    "Variable",
    "ancestors",
    "canonical",
    "channels_last",
    "check",
    "constant",
    "cut",
    "data_inputs",
    "downstream",
    "dtype_of",
    "extract",
    "find_dropout",
    "find_modes",
    "find_scales",
    "free_batch",
    "infer",
    "inline",
    "is_channels_first",
    "is_seeded",
    "operation_of",
    "output_shapes",
    "outputs",
    "placeholders",
    "ranks_of",
    "split_tensor_name",
    "static_shape",
    "unproven",
    "variable",
    "with_guards",
    "with_nodes",
]
