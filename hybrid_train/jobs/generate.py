"""The job `generate`: answers prompts and chats, shows each text as it grows or writes a file."""

import contextlib
import functools
import hashlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style

from hybrid_train.checkpoint import layout as files
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.generation.answers import Answer, AnswerFile, Question, all_of
from hybrid_train.generation.chat import open_template
from hybrid_train.generation.prompts import Prompt, read_prompts
from hybrid_train.generation.requests import NewTokens, Request
from hybrid_train.generation.thinking import Budget, blanks_of
from hybrid_train.hf.files import refusals_named
from hybrid_train.hf.origin import Origin
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from hybrid_train.schema.job_roots import AnswerSettings, GenerateJob, Reasoning
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

if TYPE_CHECKING:
    from hybrid_train.generation.drafting import Record

_log = logging.getLogger(__name__)


def run(job: GenerateJob) -> None:
    """Write each prompt with its answers to stdout or to a file, and the speed to stderr."""
    prompts = read_prompts(job)
    with process(job.runtime, job.seed):
        from hybrid_train.generation.batching import Batching, stream  # these need the process
        from hybrid_train.generation.drafting import Record
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.data_parallel import destroy_groups

        checkpoint, opened = folder_of(job.checkpoint, "checkpoint"), contextlib.ExitStack()
        try:
            with refusals_named(checkpoint=checkpoint):
                reader = PromptReader.of(checkpoint)
                file, wanted = _wanted(job, reader, prompts)
                if file is not None:
                    opened.enter_context(file)
                if not wanted:
                    return
                layout = Parallel(**vars(job.parallel))
                loaded = load_model(str(checkpoint), job.runtime, parallel=layout)
            answering, record = Answering(reader.tokenizer, wanted), Record()
            batching = Batching(
                vocab_size=reader.known_tokens, rows=job.batch, drafts=job.drafts,
                log_probs=job.log_probs,
            )  # fmt: skip
            steps = stream(loaded.network, answering.requests(), batching, record)
            with answering.timed(record):
                answering.show(steps) if job.output is None else answering.write(steps, file)
        finally:
            opened.close()
            destroy_groups()


def _wanted(
    job: GenerateJob, reader: "PromptReader", prompts: Sequence[Prompt]
) -> tuple[AnswerFile | None, list[tuple[Question, int]]]:
    """Return the file of answers, which the main process writes, and what is not in it yet."""
    questions = [reader.question(prompt) for prompt in prompts]
    wanted, file = list(all_of(questions)), None
    if job.output is None:
        return None, wanted
    output = Path(job.output)

    def places() -> list[int]:
        nonlocal file
        with contextlib.ExitStack() as unfit:
            file = unfit.enter_context(AnswerFile(output, reader.checkpoint, job.log_probs))
            left = {(id(one), number) for one, number in file.missing(questions)}
            unfit.pop_all()  # it stays open
        found = ((id(one), number) in left for one, number in wanted)
        return [place for place, is_missing in enumerate(found) if is_missing]

    missing = [wanted[place] for place in ranks.broadcast_from_main(places)]
    return file, missing


@dataclass(frozen=True)
class PromptReader:
    """Turns prompts into the tokens of a run, without its weights.

    Attributes:
        job: of the run.
        tokenizer: of the run.
        origin: what the run says of special tokens.
        checkpoint: name of run and checkpoint, and a digest of its checksums.
    """

    job: TrainJob
    tokenizer: FolderTokenizer
    origin: Origin
    checkpoint: str

    @classmethod
    def of(cls, checkpoint: Path) -> "PromptReader":
        """Open what lies beside the weights of a run folder or checkpoint.

        Raises:
            UserError: if there is no checkpoint, or a file is damaged.
        """
        found = files.locate(checkpoint)
        tokenizer = open_tokenizer(found.run_dir / files.TOKENIZER)
        sums = found.path / files.CHECKSUMS
        digest = hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else ""
        name = f"{found.run_dir.name}/{found.path.name}/{digest}"
        return cls(frozen.load(found.run_dir), tokenizer, Origin.of(found.run_dir), name)

    @property
    def known_tokens(self) -> int:
        """The number of ids that model and tokenizer both know."""
        rows = self.job.model.vocab_size or self.tokenizer.vocab_size
        return min(rows, self.tokenizer.vocab_size)

    def question(self, prompt: Prompt) -> Question:
        """Return a prompt as the model reads it.

        Raises:
            UserError: if it has no token, one that the model does not know, or no room to think in.
        """
        text, tokens = self._encoded(prompt)
        self._check_tokens(prompt.where, tokens)
        ends = frozenset[int]() if prompt.settings.ignore_end else self._ends
        budget = self._budget(prompt, tokens)
        return Question(prompt=prompt, text=text, tokens=tokens, budget=budget, ends=ends)

    @functools.cached_property
    def _ends(self) -> frozenset[int]:
        return self.origin.ends(self.tokenizer)

    def _encoded(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return the text of a prompt and its tokens."""
        content, settings = prompt.content, prompt.settings
        if isinstance(content, str):
            return content, self._of_text(prompt.where, content, settings)
        if not isinstance(content[0], dict):
            return None, [int(token) for token in content]
        text = self._chat(prompt)
        ids = self.tokenizer.encode_prompt(text, begin=False, special=True)
        if not ids:
            raise UserError(f"{prompt.where}: the tokenizer makes no token of its text, {text!r}")
        return text, ids

    def _of_text(self, where: str, text: str, settings: AnswerSettings) -> list[int]:
        begin = self._begin if settings.bos is None else settings.bos
        around = self.tokenizer.encode_prompt("", begin=True, special=False)
        ids = self.tokenizer.encode_prompt(text, begin=begin, special=settings.special_tokens)
        if text and len(ids) == len(around) * begin:
            raise UserError(
                f"{where} = {text!r}: the tokenizer makes no token of it; write another text, or "
                "none (prompt=) for one that begins anew"
            )
        return ids or [self.tokenizer.end_of_document]  # behind the end of the one before

    @functools.cached_property
    def _begin(self) -> bool:
        """Whether prompts begin as the tokenizer says: as what the model was trained on did."""
        around = self.tokenizer.encode_prompt("", begin=True, special=False)
        if around and not self.origin.is_same_tokenizer:
            _log.info(
                "the tokenizer puts %r around a text; what this run was trained on has none, nor "
                "have the prompts: bos=true puts it there",
                self.tokenizer.decode(around),
            )
        return self.origin.is_same_tokenizer

    def _chat(self, prompt: Prompt) -> str:
        """Write messages by the template of the tokenizer's folder."""
        folders = [self.origin.run_dir / files.TOKENIZER]
        if self.origin.folder is not None and self.origin.is_same_tokenizer:
            folders.insert(0, self.origin.folder)
        settings, variables = prompt.settings, prompt.variables
        try:
            template = open_template(folders, settings.template, has_tools=prompt.tools is not None)
            template.require_variables(list(variables))
            if settings.reasoning is not None:
                is_on = settings.reasoning is Reasoning.on
                variables |= template.with_reasoning(is_on=is_on)
            return template.render(prompt.content, variables, prompt.tools)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error

    def _budget(self, prompt: Prompt, tokens: Sequence[int]) -> Budget | None:
        """Return the budget of thinking; say where there is no thought to end."""
        settings = prompt.settings
        if settings.thinking_budget is None:
            return None
        opened, closed = settings.thinking_markers
        end = self.tokenizer.encode_prompt(settings.thinking_end, begin=False, special=True)
        budget = Budget(
            tokens=settings.thinking_budget, grace=settings.thinking_grace, opened=opened,
            closed=closed, end=end,
        )  # fmt: skip
        if settings.max_new_tokens <= budget.longest:
            raise UserError(
                f"{prompt.where}: max_new_tokens = {settings.max_new_tokens}: leaves no room to "
                f"answer, since thinking may take {budget.longest} tokens: thinking_budget "
                f"{budget.tokens}, thinking_grace {budget.grace}, and {len(end)} for thinking_end; "
                f"set max_new_tokens to {budget.longest + 1} or more"
            )
        if blanks_of(self.tokenizer, tokens, opened) is None:
            _log.warning(
                "%s does not end with %s, so the model may not be thinking: thinking_budget does "
                "nothing there",
                *(prompt.where, opened),
            )
            return None
        return budget

    def _check_tokens(self, where: str, ids: Sequence[int]) -> None:
        """Refuse tokens that the model does not know; say what it has not learned to go on from.

        Raises:
            UserError: if a token is no row of the embedding, or a row that stands for none.
        """
        known, length = self.known_tokens, self.job.train.sequence_length
        if (last := max(ids)) >= known:
            is_known = last < self.tokenizer.vocab_size
            text = f" ({self.tokenizer.decode([last])!r})" if is_known else ""
            whose = "model" if is_known else "tokenizer"
            raise UserError(
                f"{where}: token {last}{text} is beyond the vocabulary of the {whose}, which has "
                f"{known}"
            )
        if len(ids) > length:
            _log.warning(
                "%s has %s, and the model was trained on sequences of %d: what follows is "
                "beyond what it has learned",
                *(where, counted(len(ids), "token"), length),
            )
        begin = self.tokenizer.special_ids.get("bos_token")
        if len(ids) > 1 and ids[0] == ids[1] == begin:
            _log.warning(
                "%s begins with %r twice, since the tokenizer puts it there, too: bos=false "
                "does not",
                *(where, self.tokenizer.decode([begin])),
            )


class Answering:
    """All answers of a job: those that grow, by the number of their request."""

    def __init__(self, tokenizer: FolderTokenizer, wanted: Sequence[tuple[Question, int]]) -> None:
        """Begin.

        Args:
            tokenizer: makes text of tokens.
            wanted: questions, each with the number of an answer.
        """
        self._tokenizer, self._wanted = tokenizer, wanted
        self._num_prompts = len({question.prompt.name for question, _ in wanted})
        self._growing: dict[int, Answer] = {}
        self._tokens = 0

    def requests(self) -> Iterator[Request]:
        """Yield what the engine is asked for, as it has room."""
        for number, (question, answer) in enumerate(self._wanted):
            yield question.request(answer, functools.partial(self._answer, number))

    def _answer(self, number: int) -> Answer:
        """Return an answer that grows, here or on another data-parallel rank."""
        if number not in self._growing:
            self._growing[number] = Answer(*self._wanted[number], self._tokenizer)
        return self._growing[number]

    def _taken(self, steps: Iterable[NewTokens]) -> Iterator[tuple[int, Answer, str]]:
        """Yield number, answer and new text of each step; let go of answers that are over."""
        for new in steps:
            answer = self._answer(new.request)
            self._tokens += len(new.tokens)
            text = answer.add(new)
            if new.finish is not None:
                del self._growing[new.request]
            yield new.request, answer, text

    def write(self, steps: Iterable[NewTokens], file: AnswerFile | None) -> None:
        """Write the line of each answer as soon as it is over; None: another process does."""
        for _, answer, _ in self._taken(steps):
            if answer.finish is not None and file is not None:
                file.write(answer)

    def show(self, steps: Iterable[NewTokens]) -> None:
        """Write prompts with their answers to stdout, in their order, each as soon as it can be.

        On a terminal prompts are bold, and a single text is written as it grows. Of a chat the
        answer alone is shown.
        """
        live = Console().is_terminal and len(self._wanted) == 1
        if live:
            _put(self._shown(0))
        waiting: dict[int, str] = {}
        following = 0
        for number, answer, text in self._taken(steps):
            if live:
                _put(text)
            if answer.finish is not None:
                waiting[number] = answer.text
            while following in waiting:
                text = waiting.pop(following)
                _put("\n" if live else self._shown(following) + text + "\n")
                following += 1

    def _shown(self, number: int) -> str:
        """Return what stands in front of an answer."""
        question, answer = self._wanted[number]
        bold = Style(bold=Console().is_terminal)
        prompt = question.prompt
        text = bold.render(prompt.content) if isinstance(prompt.content, str) else ""
        if len(self._wanted) == 1:
            return text
        of = f", answer {answer + 1} of {prompt.settings.n}" if prompt.settings.n > 1 else ""
        count = "" if "id" in prompt.fields else f" of {self._num_prompts}"
        return f"--- prompt {prompt.name}{count}{of} ---\n{text}"

    @contextlib.contextmanager
    def timed(self, record: "Record") -> Iterator[None]:
        """Say on stderr how fast tokens came, and what became of drafts."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if not ranks.is_main():
            return
        sys.stderr.write(
            f"{counted(self._tokens, 'token')} in {seconds:.1f} s: "
            f"{self._tokens / seconds:.0f} tokens/s\n"
        )
        if record.row_steps:
            shares = ", ".join(f"{share:.0%}" for share in record.shares)
            sys.stderr.write(
                f"drafts: {record.acceptance_length:.2f} tokens a step; accepted by place: "
                f"{shares}\n"
            )


def _put(text: str) -> None:
    if ranks.is_main():  # all processes have all texts
        sys.stdout.write(text)
        sys.stdout.flush()
