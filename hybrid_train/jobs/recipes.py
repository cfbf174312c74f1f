"""The job `recipes`: a table of the experiments."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig, OmegaConf

from hybrid_train.anatomy import counts
from hybrid_train.config import describe
from hybrid_train.jobs.help import console, show_left_out, table
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import show_tokens

if TYPE_CHECKING:
    from hybrid_train.schema.model import Model

_HEADS = ("experiment", "parameters", "active", "tokens", "sequence", "batch", "description")


def run(arguments: Sequence[str]) -> None:
    """Print every experiment with its sizes and one line of description."""
    if arguments:
        raise UserError("recipes takes no settings; run one: hybrid-train train experiment=NAME")
    page = console()
    rows, left_out = describe.each_choice("train", "experiment", _sizes)
    comments = describe.descriptions("experiment")
    page.print(table(((name, *row, comments[name]) for name, row in rows.items()), _HEADS))
    show_left_out(page, left_out)
    page.print("\nRun one: hybrid-train train experiment=NAME")


def _sizes(config: DictConfig) -> tuple[str, ...]:
    """Return the sizes of an experiment, as cells."""
    model = cast("Model", OmegaConf.to_object(config.model))
    rows = model.vocab_size or OmegaConf.select(config, "data.vocab_size") or 0
    parameters = counts.parameters(model, padded_vocab_size(rows, model.vocab_multiple))
    return (
        show_tokens(parameters.total),
        show_tokens(parameters.active),
        str(config.train.tokens),
        str(config.train.sequence_length),
        str(config.train.global_batch),
    )
