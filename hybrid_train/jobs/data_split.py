"""The job `data split`: a pair of token files becomes several."""

from hybrid_train.data.prepare.prefixes import find_prefixes
from hybrid_train.data.prepare.shards import split_by_shares, split_by_tokens
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.prepare import SplitJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import tokens


def run(job: SplitJob) -> None:
    """Split, and show the parts.

    Raises:
        UserError: if the input is not one prefix.
    """
    prefix, *more = find_prefixes(listed_paths(job.input))
    if more:
        raise UserError(
            f"input={','.join(job.input)} names {1 + len(more)} prefixes, {prefix} and {more[0]} "
            "among them; split takes one: merge first"
        )
    if job.tokens_per_shard is not None:
        size = tokens(job.tokens_per_shard)
        parts = split_by_tokens(prefix, job.output, size, overwrite=job.overwrite)
    else:
        names = job.names or [f"{number:05d}" for number in range(len(job.shares))]
        outputs = [f"{job.output}-{name}" for name in names]
        parts = split_by_shares(prefix, outputs, job.shares, job.seed, overwrite=job.overwrite)
    rows = [(name, f"{documents:,}", f"{count:,}") for name, documents, count in parts]
    show_numbers(console(), rows, ("prefix", "documents", "tokens"))
