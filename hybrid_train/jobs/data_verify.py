"""The job `data verify`: token files read whole; what is wrong with them, all of it."""

import sys

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.prepare.manifest import TokenizerFacts
from hybrid_train.data.prepare.prefixes import find_prefixes
from hybrid_train.data.prepare.verification import verify_whole
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.prepare import VerifyTokensJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_tokens


def run(job: VerifyTokensJob) -> None:
    """Verify each prefix and say what was found.

    Raises:
        UserError: with every fault.
    """
    facts = None
    if job.tokenizer is not None:
        facts = TokenizerFacts.of(job.tokenizer, open_tokenizer(job.tokenizer))
    faults = []
    for prefix in find_prefixes(listed_paths(job.input)):
        found = verify_whole(prefix, facts)
        faults += [f"  {prefix}: {fault}" for fault in found.faults]
        state = "faulty" if found.faults else "whole"
        size = f"{counted(found.documents, 'document')}, {show_tokens(found.tokens)} tokens"
        sys.stdout.write(f"{prefix}: {state}, {size}\n")
        for unchecked in found.unchecked:
            sys.stdout.write(f"  not checked: {unchecked}\n")
    if faults:
        text = "\n".join(faults)
        many = counted(len(faults), "fault")
        raise UserError(f"{many} in token files:\n{text}\nWrite these files anew")
