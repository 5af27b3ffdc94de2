"""GraphDef to GraphDef: what a tap needs, as a pure function of an input and of weights.

Pure functions throughout: nothing is imported, run or changed in place.
"""

from transfer.surgery.functions import inline
from transfer.surgery.graphs import (
    VARIABLES,
    ancestors,
    canonical,
    check_names,
    data_inputs,
    dtype_of,
    operation_of,
    placeholders,
    split_tensor_name,
    static_shape,
)
from transfer.surgery.modes import Mode
from transfer.surgery.modes import find as find_modes
from transfer.surgery.network import Network, Variable, cut, extract
from transfer.surgery.randomness import SEED, is_seeded
from transfer.surgery.shapes import free_batch, infer

__all__ = [
    "SEED",
    "VARIABLES",
    "Mode",
    "Network",
    "Variable",
    "ancestors",
    "canonical",
    "check_names",
    "cut",
    "data_inputs",
    "dtype_of",
    "extract",
    "find_modes",
    "free_batch",
    "infer",
    "inline",
    "is_seeded",
    "operation_of",
    "placeholders",
    "split_tensor_name",
    "static_shape",
]
