"""The root of a generation job."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least, within
from hybrid_train.config.schema.runtime import Runtime


@dataclass(kw_only=True)
class GenerateJob:
    """Text from a checkpoint. Without temperature the most likely token is taken each time."""

    checkpoint: str = MISSING  # a run folder or one checkpoint of it
    prompt: list[str] = field(default_factory=list)  # prompt=TEXT; repeat it for several
    prompt_file: str | None = None  # one prompt per line
    bos: bool | None = None  # begin as the tokenizer does; None: if the model was imported
    special_tokens: bool = False  # <|im_start|> in a prompt is that token, not its letters
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    seed: int = 1234
    runtime: Runtime = field(default_factory=Runtime)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, max_new_tokens=self.max_new_tokens)
        yield from at_least(0, temperature=self.temperature, top_k=self.top_k, seed=self.seed)
        yield from within(0, 1, top_p=self.top_p)
