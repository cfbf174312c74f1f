"""What every family says of itself: its keys of config.json both ways, and its names of tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hybrid_train.hf.names import Spelling, Stored
from hybrid_train.hf.padding import one_width, uneven
from hybrid_train.schema.model import Model

LENGTH = "max_position_embeddings"
DTYPE_KEYS = ("torch_dtype", "dtype")


class Family(ABC):
    """A kind of model of Hugging Face, by its `model_type`.

    Attributes:
        model_type: in config.json.
        architecture: the class in transformers, or in the code beside a model.
        spelling: what its tensors are called.
        stores_tied_head: whether files have the head, too, where it is the embedding.
        has_class: whether transformers can compute it.
        length: positions, where a config leaves them out.
    """

    model_type: str
    architecture: str
    spelling: Spelling
    length: int
    stores_tied_head: ClassVar[bool] = False
    has_class: ClassVar[bool] = True

    def of_config(self, config: Mapping[str, Any]) -> "Family":
        """Return the family as a config has it, where names of tensors depend on that."""
        del config
        return self

    @abstractmethod
    def to_model(self, config: Mapping[str, Any], path: Path) -> Model:
        """Translate a config into our model section.

        Raises:
            UserError: naming every key that is missing, senseless, or of another kind of model.
        """

    @abstractmethod
    def refusals(self, model: Model) -> Iterator[str]:
        """Yield why its class cannot compute a model, in words."""

    @abstractmethod
    def to_config(
        self, model: Model, *, vocab_size: int, length: int, dtype: str,
        token_ids: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Translate a model section into a complete config.json.

        Args:
            model: our section, as the family tells it.
            vocab_size: tokens of the embedding, without padding.
            length: positions it was trained for.
            dtype: number format of most tensors, "bfloat16".
            token_ids: of special tokens, by their keys; empty if there is no tokenizer.
        """

    @abstractmethod
    def computation_keys(self, model: Model) -> set[str]:
        """Return every key, former spellings included, that decides what a model computes."""

    @abstractmethod
    def table(self, model: Model, vocab_size: int) -> Iterator[Stored]:
        """Yield every tensor of a model with their names; `vocab_size` without padding."""

    def released(self, name: str) -> str | None:
        """Return the name that the released files have for one of a file; None: left out."""
        return name

    def uneven(self, model: Model) -> Iterator[str]:
        """Yield what differs from layer to layer and cannot be told, in words."""
        yield from uneven(model)

    def told(self, model: Model) -> Model:
        """Return a model that its class can compute as a config.json says it."""
        return one_width(model)

    def as_trained(self, said: Mapping[str, Any], *, length: int, dtype: str) -> dict[str, Any]:
        """Return a config of the same model in another number format, trained for longer texts."""
        config = dict(said)
        for key in DTYPE_KEYS:
            if config.get(key) is not None:
                config[key] = dtype
        before = config.get(LENGTH)
        if type(before) is int and before < length:
            config[LENGTH] = length
        return config
