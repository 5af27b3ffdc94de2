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
)
from transfer.surgery.guards import ranks_of, unproven, with_guards
from transfer.surgery.modes import Mode
from transfer.surgery.modes import find as find_modes
from transfer.surgery.network import Network, Variable, cut, extract, variable
from transfer.surgery.randomness import SEED, is_seeded
from transfer.surgery.shapes import free_batch, infer

__all__ = [
    "MAX_TRACE",
    "NORMS",
    "SEED",
    "VARIABLES",
    "Mode",
    "Network",
    "Variable",
    "ancestors",
    "canonical",
    "check",
    "constant",
    "cut",
    "data_inputs",
    "downstream",
    "dtype_of",
    "extract",
    "find_dropout",
    "find_modes",
    "free_batch",
    "infer",
    "inline",
    "is_seeded",
    "operation_of",
    "outputs",
    "placeholders",
    "ranks_of",
    "split_tensor_name",
    "static_shape",
    "unproven",
    "variable",
    "with_guards",
]
