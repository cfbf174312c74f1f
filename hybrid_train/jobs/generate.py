"""The job `generate`: text from a checkpoint, for one or several prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_train.config.launcher import require_alone
from hybrid_train.generation.text import GrowingText, show
from hybrid_train.hf.files import refusals_named
from hybrid_train.hf.origin import Origin
from hybrid_train.runtime.start import process
from hybrid_train.schema.generate import GenerateJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

if TYPE_CHECKING:
    from hybrid_train.jobs.networks import LoadedModel

_log = logging.getLogger(__name__)


def run(job: GenerateJob) -> None:
    """Write each prompt with its continuation to stdout, and the speed to stderr."""
    texts = _prompts(job)
    require_alone("generate")
    with process(job.runtime, job.seed):
        from hybrid_train.generation.decode import Settings, stream  # needs the process
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.groups import destroy_groups

        try:
            with refusals_named(checkpoint=Path(job.checkpoint)):
                loaded = load_model(job.checkpoint, job.runtime)
                origin = Origin.of(loaded.run_dir)
                ends = origin.ends(loaded.tokenizer)
            prompts = _encoded(job, texts, loaded, origin)
            settings = Settings(
                temperature=job.temperature, top_k=job.top_k, top_p=job.top_p, seed=job.seed,
                max_new_tokens=job.max_new_tokens, vocab_size=_known_tokens(loaded), ends=ends,
            )  # fmt: skip
            growing = [GrowingText(loaded.tokenizer, prompt) for prompt in prompts]
            show(texts, growing, stream(loaded.model, prompts, settings))
        finally:
            destroy_groups()


def _known_tokens(loaded: "LoadedModel") -> int:
    """Return the number of ids that model and tokenizer both know."""
    rows = loaded.job.model.vocab_size or loaded.tokenizer.vocab_size
    return min(rows, loaded.tokenizer.vocab_size)


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
