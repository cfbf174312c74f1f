"""What the linear layers of this process really multiplied, product by product."""

import torch

from hybrid_train.anatomy.product_formats import Linear
from hybrid_train.schema.precision import Product

# The formats of both operands in words; experts of one layer multiply alike, or show up twice.
Seen = dict[tuple[Linear, Product], set[tuple[str, str]]]


class Audit:
    """Takes notes while it listens; costs nothing otherwise."""

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


AUDIT = Audit()


def type_in_words(kind: torch.dtype) -> str:
    """Say what an operand is that is not quantized: "bfloat16"."""
    return str(kind).removeprefix("torch.")
