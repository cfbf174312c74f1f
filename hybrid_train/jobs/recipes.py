"""The job `recipes`: a table of the experiments."""

from collections.abc import Iterator, Sequence

from hybrid_train.config import describe
from hybrid_train.config.problems import UserError
from hybrid_train.jobs.help import console, table

_HEADS = ("experiment", "pattern", "hidden", "tokens", "sequence", "batch", "description")


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
        sizes = (
            config.model.pattern,
            config.model.hidden_size,
            config.train.tokens,
            config.train.sequence_length,
            config.train.global_batch,
        )
        yield (name, *map(str, sizes), description)
