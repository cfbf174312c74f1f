"""The job `generate`: continues prompts, and shows each text as it grows."""

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style

from hybrid_train.config.launcher import require_alone
from hybrid_train.data.any_tokenizer import AnyTokenizer
from hybrid_train.hf.files import refusals_named
from hybrid_train.hf.origin import Origin
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.runtime.logs import start_logging
from hybrid_train.runtime.start import process
from hybrid_train.schema.job_roots import GenerateJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

if TYPE_CHECKING:
    from hybrid_train.jobs.networks import LoadedModel

_INCOMPLETE = "\ufffd"  # what the bytes of a character read like before its last one is there
_log = logging.getLogger(__name__)


class GrowingText:
    """The continuation of one prompt, given out in pieces that will not change any more.

    It is decoded together with its prompt: a tokenizer may write a token differently where a text
    begins.
    """

    def __init__(self, tokenizer: AnyTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._given = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special=True)

    def add(self, token: int | None) -> None:
        """Append a token; None appends nothing."""
        if token is not None:
            self._tokens.append(token)

    def fresh(self, *, last: bool = False) -> str:
        """Return what has come since the last call.

        Args:
            last: whether nothing follows; if not, the bytes of an unfinished character are held
                back.
        """
        text = self._decode()
        if not last and text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece


def run(job: GenerateJob) -> None:
    """Write each prompt with its continuation to stdout, and the speed to stderr."""
    texts = _prompts(job)
    require_alone("generate")
    start_logging()
    checkpoint = folder_of(job.checkpoint, "checkpoint")
    with process(job.runtime, job.seed):
        from hybrid_train.generation.decode import Settings, stream  # needs the process
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            with refusals_named(checkpoint=checkpoint):
                loaded = load_model(str(checkpoint), job.runtime)
                origin = Origin.of(loaded.run_dir)
                ends = origin.ends(loaded.tokenizer)
            prompts = _encoded(job, texts, loaded, origin)
            settings = Settings(
                temperature=job.temperature, top_k=job.top_k, top_p=job.top_p, seed=job.seed,
                max_new_tokens=job.max_new_tokens, vocab_size=_known_tokens(loaded), ends=ends,
            )  # fmt: skip
            growing = [GrowingText(loaded.tokenizer, prompt) for prompt in prompts]
            write_continuations(texts, growing, stream(loaded.model, prompts, settings))
        finally:
            destroy_groups()


def _prompts(job: GenerateJob) -> list[str]:
    """Return the prompts of the command line, then those of the file."""
    if job.prompt_file is None:
        return job.prompt
    try:
        lines = Path(job.prompt_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file = {job.prompt_file}: cannot be read: {error}") from error
    prompts = job.prompt + [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file = {job.prompt_file}: needs one prompt per line; it is empty")
    return prompts


def _encoded(
    job: GenerateJob, texts: Sequence[str], loaded: "LoadedModel", origin: Origin
) -> list[list[int]]:
    """Turn the prompts into token ids.

    Raises:
        UserError: if one of them has no token, or one that the model does not know.
    """
    tokenizer = loaded.tokenizer
    begin = job.bos if job.bos is not None else origin.is_same_tokenizer
    around = tokenizer.encode_prompt("", begin=True, special=False)
    if job.bos is None and around and not begin:
        _log.info(
            "the tokenizer puts %r around a text; what this run was trained on has none, nor have "
            "the prompts: bos=true puts it there",
            tokenizer.decode(around),
        )
    found = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer.encode_prompt(text, begin=begin, special=job.special_tokens)
        if text and len(ids) == len(around) * begin:
            raise UserError(
                f"prompt {number} = {text!r}: the tokenizer makes no token of it; write another "
                "text, or none (prompt=) for one that begins anew"
            )
        found.append(ids or [tokenizer.end_of_document])  # behind the end of the one before
        _check_tokens(f"prompt {number}", found[-1], loaded)
    return found


def _check_tokens(prompt: str, ids: Sequence[int], loaded: "LoadedModel") -> None:
    """Refuse tokens that the model does not know; say what it has not learned to go on from.

    Raises:
        UserError: if the embedding has no row for a token.
    """
    rows, length = loaded.job.model.vocab_size, loaded.job.train.sequence_length
    if rows is not None and max(ids) >= rows:
        raise UserError(
            f"{prompt}: token {max(ids)} ({loaded.tokenizer.decode([max(ids)])!r}) is beyond the "
            f"vocabulary of the model, which has {rows}"
        )
    if len(ids) > length:
        _log.warning(
            "%s has %s, and the model was trained on sequences of %d: what follows is "
            "beyond what it has learned",
            *(prompt, counted(len(ids), "token"), length),
        )
    begin = loaded.tokenizer.special_ids.get("bos_token")
    if len(ids) > 1 and ids[0] == ids[1] == begin:
        _log.warning(
            "%s begins with %r twice, since the tokenizer puts it there, too: bos=false does not",
            *(prompt, loaded.tokenizer.decode([begin])),
        )


def _known_tokens(loaded: "LoadedModel") -> int:
    """Return the number of ids that model and tokenizer both know."""
    rows = loaded.job.model.vocab_size or loaded.tokenizer.vocab_size
    return min(rows, loaded.tokenizer.vocab_size)


def write_continuations(
    prompts: Sequence[str], texts: Sequence[GrowingText], steps: Iterable[Sequence[int | None]]
) -> None:
    """Write prompts with their continuations to stdout, and the speed to stderr.

    On a terminal prompts are bold, and a single text is written as it grows.

    Args:
        prompts: what the texts continue.
        texts: one for each prompt; they take the tokens.
        steps: a token, or None, for each prompt, as `generation.decode.stream` yields them.
    """
    bold = Style(bold=Console().is_terminal)
    live = Console().is_terminal and len(texts) == 1
    if live:
        _put(bold.render(prompts[0]))
    start, count = time.perf_counter(), 0
    for step in steps:
        for text, token in zip(texts, step, strict=True):
            text.add(token)
            count += token is not None
        if live:
            _put(texts[0].fresh())
    seconds = time.perf_counter() - start
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        if len(texts) > 1:
            _put(f"--- prompt {number} of {len(texts)} ---\n")
        _put(("" if live else bold.render(prompt)) + text.fresh(last=True) + "\n")
    sys.stderr.write(
        f"{counted(count, 'token')} in {seconds:.1f} s: {count / seconds:.0f} tokens/s\n"
    )


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
