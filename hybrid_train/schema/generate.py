"""The root of a generation job."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import CountOrNone, Factor, FileName, Range, Seed, Share
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Runtime

COLDEST = 1e-4  # divides logits; what is much smaller divides by 0 in float32


@dataclass(kw_only=True)
class GenerateJob:
    """Text from a checkpoint. Without temperature the most likely token is taken each time."""

    checkpoint: FileName = MISSING  # a run folder or one checkpoint of it
    prompt: list[str] = field(default_factory=list)  # prompt=TEXT; repeat it for several
    prompt_file: FileName | None = None  # one prompt per line
    bos: bool | None = None  # begin as the tokenizer does; None: if the model was imported
    special_tokens: bool = False  # <|im_start|> in a prompt is that token, not its letters
    max_new_tokens: Annotated[int, Range(1, 2**20)] = 128
    temperature: Factor = 0.0  # 0: greedy
    top_k: CountOrNone = 0  # 0: all tokens
    top_p: Share = 1.0
    seed: Seed = 1234
    runtime: Runtime = field(default_factory=Runtime)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if 0 < self.temperature < COLDEST:
            rule = f"must be 0, the most likely token, or at least {COLDEST}"
            yield Problem("temperature", self.temperature, rule, 0)
