"""The root of a count: a model, and the length at which its attention is counted."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_train.schema.limits import Length
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse, repair
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class CountJob:
    """Parameters, tensors, FLOPs and cache bytes of a model."""

    model: Model = field(default_factory=Model)
    sequence_length: Length = 8192  # tokens; attention and its cache grow with it

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.model.vocab_size is None:
            rule = "must be set: the model takes that of the tokenizer, and here is none"
            yield Problem("model.vocab_size", "null", rule, 131072)
        try:
            parse(self.model.pattern)
        except ValueError as error:
            pattern = self.model.pattern
            yield Problem("model.pattern", pattern, str(error), repair(pattern))
