"""The job `data merge`: token files of one tokenizer become one pair."""

import sys

from hybrid_train.data.prepare.prefixes import find_prefixes
from hybrid_train.data.prepare.shards import merge
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.prepare import MergeJob
from hybrid_train.schema.units import counted, show_tokens


def run(job: MergeJob) -> None:
    """Merge, and say how much it is."""
    prefixes = find_prefixes(listed_paths(job.input))
    documents, tokens = merge(prefixes, job.output, overwrite=job.overwrite)
    sys.stdout.write(
        f"{job.output}: {counted(documents, 'document')}, {show_tokens(tokens)} tokens of "
        f"{counted(len(prefixes), 'prefix')}\n"
    )
