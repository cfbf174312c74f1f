"""What the linear layers of this process really multiplied, product by product."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hybrid_train.config.product_formats import Linear
from hybrid_train.config.schema.precision import Product, ProductFormat

# The formats of both operands in words; experts of one layer multiply alike, or show up twice.
Seen = dict[tuple[Linear, Product], set[tuple[str, str]]]


class Audit:
    """Takes notes while it listens; costs nothing otherwise."""

    def __init__(self) -> None:
        self.listening = False
        self.seen: Seen = {}

    @contextmanager
    def listen(self) -> Iterator[Seen]:
        """Note every product until the block ends; yields the notes."""
        self.listening, self.seen = True, {}
        try:
            yield self.seen
        finally:
            self.listening = False

    def note(self, linear: Linear, product: Product, left: str, right: str) -> None:
        """Note the formats of the two operands that a product is about to multiply."""
        if self.listening:
            self.seen.setdefault((linear, product), set()).add((left, right))


AUDIT = Audit()
