"""Decoding: speed and cache of generation by length of the prompt, and how many drafts are right.

Prompts are held-out text; behind each the most likely tokens are written, one text at a time (on
each data-parallel rank), as `generate` does with batch=1. What is timed are steps of the real loop,
with all that is in them.

    prompt_tokens_per_s  tokens of the prompt / seconds until the first new token
    tokens_per_s         new tokens behind the first / seconds between the first and the last
    cache_bytes          what all layers keep of the text at its end, on all processes together
    acceptance_length    new tokens of a step with drafts, the verifier's own one counted

Seconds are those of this machine and of what else runs on it.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from hybrid_train.data.documents import Joined
from hybrid_train.evaluation.heldout import drawn
from hybrid_train.evaluation.runner import ItemResult, Subject, digest
from hybrid_train.generation.batching import Batching, stream
from hybrid_train.generation.drafting import Record
from hybrid_train.generation.requests import NewTokens, Request
from hybrid_train.runtime import heartbeat, ranks
from hybrid_train.schema.evaluation import Decoding as Settings
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

NAME = "decoding"


class Decoding:
    """Prompts of held-out text, each gone on with by a model alone; a `Measure` as tasks are."""

    def __init__(self, sources: Mapping[str, Joined], settings: Settings, *, seed: int) -> None:
        """Cut the prompts.

        Args:
            sources: the held-out documents by source.
            settings: lengths of prompts, drafts, new tokens.
            seed: which documents these are of follows from it.

        Raises:
            UserError: if there is too little held-out text for the longest prompt.
        """
        self.name = NAME
        self._asked = settings
        longest = max(settings.lengths)
        text = [
            token
            for name, source in sources.items()
            for _, ids in drawn(name, source, seed, longest * settings.prompts, None)
            for token in ids
        ]
        if len(text) < longest:
            raise UserError(
                f"task.decoding.lengths = {settings.lengths}: the held-out text has {len(text)} "
                "tokens; ask for shorter prompts, or name more text: task.heldout.files=[PREFIX]"
            )
        self._prompts = {
            length: list(_cut(text, length, settings.prompts)) for length in settings.lengths
        }
        self.settings: dict[str, Any] = asdict(settings)
        self.items_hash = digest(list(self._prompts.values()))

    def run(self, subject: Subject) -> list[ItemResult]:
        """Go on with every prompt; see `Measure`. Seconds are those of the first process.

        Raises:
            UserError: if drafts are asked of a model without an MTP block, or the layout does not
                let tokens be read one by one.
        """
        found = list(self._measured(subject))
        return ranks.broadcast_from_main(lambda: found)

    def _measured(self, subject: Subject) -> Iterator[ItemResult]:
        for length, drafts in itertools.product(self._asked.lengths, self._asked.drafts):
            group = f"length={length} drafts={drafts}"
            for number, one in enumerate(self._decoded(subject, self._prompts[length], drafts)):
                yield ItemResult(f"{group}/{number}", one.values(length, drafts), group)

    def _decoded(
        self, subject: Subject, prompts: Sequence[Sequence[int]], drafts: int
    ) -> list["_Timed"]:
        """Go on with prompts of one length, one after the other on each data-parallel rank."""
        count, ranks_of_data = self._asked.new_tokens, subject.network.groups.dp.size()
        # First one more on each rank: with it a pass makes what it finds there from then on.
        texts = [*[prompts[0]] * ranks_of_data, *prompts]
        requests = [Request(prompt=one, max_new_tokens=count) for one in texts]
        settings = Batching(vocab_size=subject.vocab_size, rows=1, drafts=drafts)
        record, timed = Record(), [_Timed() for _ in requests]
        latest = [time.perf_counter()] * ranks_of_data  # when each rank was over with its last step
        for new in stream(subject.network, requests, settings, record):
            heartbeat.enter(heartbeat.last().part)  # still there
            rank = new.request % ranks_of_data  # requests are dealt to ranks in turn
            latest[rank] = timed[new.request].take(new, latest[rank], drafts)
        kept = _on_all_stages(record.cache_bytes, subject.network)
        for one in timed:
            one.cache_bytes = kept
        return timed[ranks_of_data:]


@dataclass
class _Timed:
    """One answer as it grows; seconds and tokens of its parts."""

    prompt_s: float = 0.0
    decoding_s: float = 0.0
    tokens: int = 0  # behind the first
    steps: int = 0  # of which all drafts were right or wrong
    gained: int = 0  # tokens of these
    cache_bytes: int = 0

    def take(self, new: NewTokens, before: float, drafts: int) -> float:
        """Add what a step has brought; return when that was.

        Args:
            new: of the step.
            before: when the step before it, of this answer or the one before, was over.
            drafts: that a step has.
        """
        now = time.perf_counter()
        if not self.prompt_s:
            self.prompt_s = now - before
            return now
        self.decoding_s += now - before
        self.tokens += len(new.tokens)
        if drafts and new.drafted == drafts:
            self.steps += 1
            self.gained += new.accepted + 1
        return now

    def values(self, length: int, drafts: int) -> dict[str, tuple[float, float]]:
        """Return the metrics of a prompt of some length."""
        found = {
            "tokens_per_s": (float(self.tokens), self.decoding_s),
            "prompt_tokens_per_s": (float(length), self.prompt_s),
            "cache_bytes": (float(self.cache_bytes), 1.0),
        }
        return found | (
            {"acceptance_length": (float(self.gained), float(self.steps))} if drafts else {}
        )


def _cut(text: Sequence[int], length: int, count: int) -> Iterator[list[int]]:
    """Yield prompts of one length, which lie evenly in a text."""
    for number in range(count):
        start = (len(text) - length) * number // max(1, count - 1)
        yield list(text[start : start + length])


def _on_all_stages(number: int, network: Network) -> int:
    """Add up what the processes of one model have."""
    total = torch.tensor(number, device=network.device)
    for group in (network.groups.tp, network.groups.pp):
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return int(total)
