"""GraphDef to GraphDef: what a tap needs, as a pure function of an input and of weights.

Pure functions throughout: nothing is imported, run or changed in place.
"""

from transfer.surgery.graphs import (
    ancestors,
    canonical,
    dtype_of,
    placeholders,
    split_tensor_name,
    static_shape,
)
from transfer.surgery.network import VARIABLES, Network, Variable, cut, extract

__all__ = [
    "VARIABLES",
    "Network",
    "Variable",
    "ancestors",
    "canonical",
    "cut",
    "dtype_of",
    "extract",
    "placeholders",
    "split_tensor_name",
    "static_shape",
]
