"""Underflow, saturation and error of quantized operands, counted in steps that are asked for."""

from hybrid_train.anatomy.product_formats import Linear
from hybrid_train.precision.operands import OperandStatistics
from hybrid_train.precision.recipes import Operand
from hybrid_train.schema.precision import Product

Counted = dict[tuple[Linear, Product, Operand], OperandStatistics]


class Statistics:
    """Hands out what quantization counts into while it listens; costs nothing otherwise."""

    def __init__(self) -> None:
        self._listening = False
        self._counted: Counted = {}

    def start(self) -> None:
        """Begin to listen."""
        self._listening, self._counted = True, {}

    def stop(self) -> Counted:
        """Return what was counted, and listen no more."""
        self._listening = False
        return self._counted

    def of(self, linear: Linear, product: Product, operand: Operand) -> OperandStatistics | None:
        """Return where to count an operand; None where nobody listens."""
        if not self._listening:
            return None
        return self._counted.setdefault((linear, product, operand), OperandStatistics())


STATISTICS = Statistics()
