"""What is noted while a network multiplies, and the bits it rounds with: its own, nobody else's."""

from dataclasses import dataclass, field

import torch

from hybrid_train.anatomy.product_formats import Linear
from hybrid_train.precision.noise import Noise
from hybrid_train.precision.operands import OperandStatistics
from hybrid_train.precision.recipes import Operand
from hybrid_train.schema.precision import Product

# The formats of both operands in words; experts of one layer multiply alike, or show up twice.
Seen = dict[tuple[Linear, Product], set[tuple[str, str]]]
Counted = dict[tuple[Linear, Product, Operand], OperandStatistics]


class Audit:
    """What linear layers really multiplied, product by product.

    Takes notes while it listens; costs nothing otherwise.
    """

    def __init__(self) -> None:
        self.listening = False
        self._seen: Seen = {}

    def start(self) -> None:
        """Begin to listen."""
        self.listening, self._seen = True, {}

    def stop(self) -> Seen:
        """Return what was noted, and listen no more."""
        self.listening = False
        return self._seen

    def note(self, linear: Linear, product: Product, left: str, right: str) -> None:
        """Note the formats of the two operands that a product is about to multiply."""
        if self.listening:
            self._seen.setdefault((linear, product), set()).add((left, right))


class Statistics:
    """Underflow, saturation and error of quantized operands.

    Hands out what quantization counts into while it listens; costs nothing otherwise.
    """

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


@dataclass(frozen=True)
class Records:
    """Those of one network: two networks in a process share none of them."""

    audit: Audit = field(default_factory=Audit)
    statistics: Statistics = field(default_factory=Statistics)
    noise: Noise = field(default_factory=Noise)


def type_in_words(kind: torch.dtype) -> str:
    """Say what an operand is that is not quantized: "bfloat16"."""
    return str(kind).removeprefix("torch.")
