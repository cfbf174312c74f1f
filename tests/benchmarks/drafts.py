"""Drafts of MTP blocks: is the text the same, how many are accepted, does it pay?

    python tests/benchmarks/drafts.py RUN [RUN ...] [--prompts 200] [--tokens 48]

Each RUN is a run folder of a model with an MTP block, as of

    hybrid-train train experiment=parent_hybrid run_dir=runs/parent_hybrid

Prompts are beginnings of the run's own validation rows. Printed for each run: how often the first
draft is the model's own most likely token on the validation text; how many greedy answers with 1 to
7 drafts differ from those without, and of these how many first differ where the two most likely
tokens lie within the rounding of a logit; then a table by length of drafts: the share of drafts at
each place that were accepted with all before them, the acceptance length (tokens of a step, the
verifier's own one counted), and tokens a second against plain decoding, in turns, at temperatures 0
and 1, alone and eight answers together. Ends with 1 if an answer differs for another reason.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from hybrid_train.config import frozen
from hybrid_train.runtime.start import process
from tests.benchmarks.parents import held_out

if TYPE_CHECKING:
    from hybrid_train.generation.drafting import Record
    from hybrid_train.generation.requests import Request
    from hybrid_train.jobs.networks import LoadedModel

LENGTHS = range(1, 8)
SHORTEST, LONGEST = 16, 128  # prompts
TIMED = {1: 12, 8: 48}  # rows -> requests that are timed
ROUNDS = 3


@dataclass(frozen=True)
class Parent:
    """A loaded run and the beginnings of its validation rows."""

    loaded: "LoadedModel"
    texts: list[list[int]]
    new: int  # tokens of each answer

    @property
    def vocab_size(self) -> int:
        size = self.loaded.job.model.vocab_size
        assert size is not None
        return size

    def requests(self, number: int, temperature: float = 0.0) -> "list[Request]":
        from hybrid_train.generation.requests import Request
        from hybrid_train.generation.sampling import Sampling

        spread = LONGEST - SHORTEST
        return [
            Request(
                prompt=text[: SHORTEST + place * 37 % spread],
                max_new_tokens=self.new,
                sampling=Sampling(temperature=temperature, seed=place),
            )
            for place, text in enumerate(self.texts[:number])
        ]

    def answers(
        self, asked: "Sequence[Request]", rows: int, drafts: int | None
    ) -> "tuple[list[list[int]], Record, float]":
        from hybrid_train.generation.batching import Batching, stream
        from hybrid_train.generation.drafting import Record

        record, found = Record(), [[] for _ in asked]  # type: ignore[var-annotated]
        batching = Batching(vocab_size=self.vocab_size, rows=rows, drafts=drafts)
        start = time.perf_counter()
        for new in stream(self.loaded.network, asked, batching, record):
            found[new.request] += new.tokens
        return found, record, time.perf_counter() - start


def acceptance_on_text(parent: Parent) -> float:
    """Share of places in the texts where the first draft is the model's own choice."""
    (model,) = parent.loaded.network.chunks
    equal = count = 0
    with torch.no_grad():
        for text in parent.texts:
            tokens = torch.tensor([text])
            outputs = model(tokens, torch.arange(len(text))[None])
            own, drafted = (
                outputs.head.logits(hidden)[0, :, : parent.vocab_size].argmax(-1)
                for hidden in (outputs.hidden, outputs.mtp_hidden[0])
            )
            equal += int((drafted[:-2] == own[1:-1]).sum())
            count += len(text) - 2
    return equal / count


def differences(parent: Parent, asked: "Sequence[Request]", plain: list[list[int]]) -> bool:
    """Compare greedy answers with drafts against those without; tell whether one is wrong."""
    wrong = False
    for drafts in LENGTHS:
        found, _, _ = parent.answers(asked, 8, drafts)
        other = [place for place, answer in enumerate(found) if answer != plain[place]]
        ties = sum(is_tie(parent, asked[one].prompt, plain[one], found[one]) for one in other)
        print(f"  {drafts} drafts: {len(other)} of {len(found)} answers differ, {ties} at a tie")
        wrong |= ties < len(other)
    return wrong


def is_tie(parent: Parent, prompt: Sequence[int], one: list[int], other: list[int]) -> bool:
    """Tell whether two answers first differ where their two tokens are as likely, up to rounding.

    A logit is a sum over the hidden units of what every layer added; the roundings of a sum of K
    terms are a random walk of K steps of half an ulp, once in each layer and once in the head.
    """
    pairs = enumerate(zip(one, other, strict=True))
    first = next(place for place, (mine, theirs) in pairs if mine != theirs)
    with torch.no_grad():
        (model,) = parent.loaded.network.chunks
        logits = model(torch.tensor([[*prompt, *one[:first]]])).logits()[0, -1].float()
    model_sizes = parent.loaded.job.model
    layers = len(model_sizes.pattern.split("/")[0]) + 1
    widest = max(model_sizes.hidden_size, model_sizes.mlp.intermediate_size)
    eps = torch.finfo(torch.float32).eps
    bound = 2 * layers * widest**0.5 * eps * float(logits.abs().max())
    gap = abs(float(logits[one[first]] - logits[other[first]]))
    if gap > bound:
        print(f"    a gap of {gap:.2e} is above the rounding bound of {bound:.2e}")
    return gap <= bound


def table(parent: Parent) -> None:
    """Print what is accepted and what it is worth."""
    for temperature in (0.0, 1.0):
        for rows, number in TIMED.items():
            asked = parent.requests(number, temperature)
            choices: list[int | None] = [0, *LENGTHS, None]
            best: dict[int | None, float] = {}
            records = {}
            for _ in range(ROUNDS):
                for drafts in choices:
                    _, records[drafts], seconds = parent.answers(asked, rows, drafts)
                    best[drafts] = min(seconds, best.get(drafts, seconds))
            plain = number * parent.new / best[0]
            print(f"  T = {temperature:.0f}, {rows} together: plain {plain:.0f} tokens/s")
            for drafts in choices[1:]:
                record, name = records[drafts], "auto" if drafts is None else str(drafts)
                shares = " ".join(f"{share:.0%}" for share in record.shares)
                lengths = f", steps by length {record.lengths}" if drafts is None else ""
                print(
                    f"    {name:>4}: {best[0] / best[drafts]:.2f} times, "
                    f"{record.acceptance_length:.2f} tokens a step, accepted {shares}{lengths}"
                )


def measure(run_dir: Path, prompts: int, new: int) -> bool:
    job = frozen.load(run_dir)
    with process(job.runtime, job.train.seed):
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            loaded = load_model(str(run_dir), job.runtime)
            texts = [row.tolist() for batch in held_out(job) for row in batch.tokens][:prompts]
            parent = Parent(loaded, texts, new)
            share = acceptance_on_text(parent)
            print(f"{run_dir} ({job.model.pattern}), {len(texts)} prompts, {new} tokens each")
            print(f"  the first draft is the model's own choice at {share:.1%} of the text")
            asked = parent.requests(prompts)
            plain, _, _ = parent.answers(asked, 8, 0)
            wrong = differences(parent, asked, plain)
            table(parent)
        finally:
            destroy_groups()
    return wrong


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description="what drafts of MTP blocks are worth")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    wrong = [measure(run, given.prompts, given.tokens) for run in given.runs]
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
