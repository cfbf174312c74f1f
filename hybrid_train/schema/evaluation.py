"""Settings of evaluation: tasks of lm-eval, the evaluation harness of EleutherAI."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from hybrid_train.schema.limits import Count, CountOrNone, FileName, Length, Name, Range, Seed
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class Harness:
    """Tasks of lm-eval: one's own YAML files, and its stock ones where their data is cached."""

    tasks: list[Name] = field(default_factory=list)  # names of tasks, groups or tags
    include: FileName | None = None  # folder with YAML files of tasks; these count before stock
    num_fewshot: CountOrNone | None = None  # worked examples in a prompt; None: as the task says
    limit: Count | None = None  # documents of each task; None: all
    apply_chat_template: bool = False  # write prompts as conversations, by the model's template
    template: Name | None = None  # the chat template of this name; None: default
    fewshot_as_multiturn: bool = True  # in a conversation each worked example is a turn
    system: str | None = None  # what a conversation, or a prompt, begins with
    bos: bool | None = None  # texts begin as the tokenizer does; None: if the model was imported
    max_length: Length | None = None  # tokens that the model reads at once; None: as trained
    seed: Seed = 1234  # chooses worked examples, and what tasks draw
    batch: Annotated[int, Range(1, 4096)] = 8  # answers that grow together
    batch_tokens: Length = 2048  # that are read at once where log-probabilities are asked for

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.apply_chat_template:
            return
        if self.template is not None:
            rule = "needs apply_chat_template=true; no template is read without"
            yield Problem("template", self.template, rule, "null")
