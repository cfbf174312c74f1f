"""The job `models`: a table of the models that have a name, with their counts."""

from collections.abc import Iterator, Sequence
from typing import cast

from omegaconf import OmegaConf

from hybrid_train.config import describe
from hybrid_train.config.degrees import padded_vocab_size
from hybrid_train.config.pattern import parse
from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.count import CountJob
from hybrid_train.config.units import show_tokens
from hybrid_train.jobs.count import layers_in_words
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.model import counts

_HEADS = (
    "model", "layers", "hidden", "tensors", "parameters", "active", "GFLOP/token", "KV/token",
    "state/sequence",
)  # fmt: skip


def run(arguments: Sequence[str]) -> None:
    """Print every named model with its sizes."""
    if arguments:
        raise UserError("models takes no settings; hybrid-train count model=NAME does")
    page = console()
    show_numbers(page, list(_rows()), _HEADS)
    page.print(
        "\nGFLOP/token: training, at a sequence of 8,192. KV and state: bytes that generation "
        "keeps.\nA dash: the model takes the vocabulary of the tokenizer; "
        "hybrid-train count model=NAME model.vocab_size=N counts it.",
        soft_wrap=True,
    )


def _rows() -> Iterator[tuple[str, ...]]:
    """Yield the cells of each model, small models first."""
    jobs = {name: _job(name) for name in describe.descriptions("model")}
    for name, job in sorted(jobs.items(), key=lambda item: _size(item[1])):
        model, cache = job.model, counts.cache_size(job.model)
        yield (
            name,
            layers_in_words(parse(model.pattern)),
            str(model.hidden_size),
            f"{counts.tensors(model).total:,}",
            *_with_vocabulary(job),
            f"{cache.kv_per_token:,}",
            f"{cache.ssm_per_sequence + cache.conv_per_sequence:,}",
        )


def _job(name: str) -> CountJob:
    return cast("CountJob", OmegaConf.to_object(describe.sound_draft("count", [f"model={name}"])))


def _size(job: CountJob) -> int:
    return counts.parameters(job.model, job.model.vocab_size or 0).total


def _with_vocabulary(job: CountJob) -> tuple[str, str, str]:
    """Return parameters, active ones and FLOPs; dashes without a vocabulary."""
    if job.model.vocab_size is None:
        return "-", "-", "-"
    rows = padded_vocab_size(job.model.vocab_size, job.model.vocab_multiple)
    parameters = counts.parameters(job.model, rows)
    flops = counts.flops_per_token(job.model, rows, job.sequence_length).training
    return f"{parameters.total:,}", show_tokens(parameters.active), f"{flops / 1e9:,.3g}"
