"""The job `recipes`: a table of the experiments."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from omegaconf import OmegaConf

from hybrid_train.config import describe
from hybrid_train.config.degrees import padded_vocab_size
from hybrid_train.config.problems import UserError
from hybrid_train.config.units import show_tokens
from hybrid_train.jobs.help import console, table
from hybrid_train.model import counts

if TYPE_CHECKING:
    from hybrid_train.config.schema.model import Model

_HEADS = ("experiment", "parameters", "active", "tokens", "sequence", "batch", "description")


def run(arguments: Sequence[str]) -> None:
    """Print every experiment with its sizes and one line of description."""
    if arguments:
        raise UserError("recipes takes no settings; run one: hybrid-train train experiment=NAME")
    page = console()
    page.print(table(_rows(), _HEADS))
    page.print("\nRun one: hybrid-train train experiment=NAME")


def _rows() -> Iterator[tuple[str, ...]]:
    """Yield the cells of each experiment."""
    for name, description in describe.descriptions("experiment").items():
        config = describe.sound_draft("train", [f"experiment={name}"])
        model = cast("Model", OmegaConf.to_object(config.model))
        rows = model.vocab_size or OmegaConf.select(config, "data.vocab_size") or 0
        parameters = counts.parameters(model, padded_vocab_size(rows, model.vocab_multiple))
        sizes = (
            show_tokens(parameters.total),
            show_tokens(parameters.active),
            config.train.tokens,
            config.train.sequence_length,
            config.train.global_batch,
        )
        yield (name, *map(str, sizes), description)
