"""Underflow, saturation and error of quantized operands, counted in the steps that are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from hybrid_train.config.product_formats import Linear
from hybrid_train.config.schema.precision import Product
from hybrid_train.precision.quantize import OperandStatistics
from hybrid_train.precision.recipes import Operand

Counted = dict[tuple[Linear, Product, Operand], OperandStatistics]


class Statistics:
    """Hands out what quantization counts into while it listens; costs nothing otherwise."""

    def __init__(self) -> None:
        self.listening = False
        self.counted: Counted = {}

    @contextmanager
    def listen(self) -> Iterator[Counted]:
        """Count until the block ends; yields the counts."""
        self.listening, self.counted = True, {}
        try:
            yield self.counted
        finally:
            self.listening = False

    def of(self, linear: Linear, product: Product, operand: Operand) -> OperandStatistics | None:
        """Return where to count an operand; None where nobody listens."""
        if not self.listening:
            return None
        return self.counted.setdefault((linear, product, operand), OperandStatistics())


STATISTICS = Statistics()
