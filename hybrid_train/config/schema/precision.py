"""Number formats of weights, activations and reductions."""

import enum
from dataclasses import dataclass


class NumberFormat(enum.Enum):
    """Format of the matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class Precision:
    """Format of the matrix products; that of master weights and moments is the optimizer's."""

    format: NumberFormat = NumberFormat.bf16
    reduce_gradients_in_fp32: bool = True
