"""Graph transformations: extract a network from a GraphDef, as a function of input and weights.

All are pure functions: no graph is imported, run or changed in place.
"""

from transfer.graph.concatenation import concatenated
from transfer.graph.conditionals import NORMS
from transfer.graph.dropout import find as find_dropout
from transfer.graph.functions import inline
from transfer.graph.graph_def import (
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
from transfer.graph.guards import ranks_of, unproven, with_guards
from transfer.graph.layout import channels_last, is_channels_first
from transfer.graph.modes import Mode
from transfer.graph.modes import find as find_modes
from transfer.graph.network import Network, Variable, cut, extract, variable
from transfer.graph.nonlinearities import activations
from transfer.graph.randomness import SEED, is_seeded
from transfer.graph.scales import find_scales
from transfer.graph.shapes import Shape, free_batch, infer, output_shapes

__all__ = [
    "MAX_TRACE",
    "NORMS",
    "SEED",
    "VARIABLES",
    "Mode",
    "Network",
    "Shape",
    "Variable",
    "activations",
    "ancestors",
    "canonical",
    "channels_last",
    "check",
    "concatenated",
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
