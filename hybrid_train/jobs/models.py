"""The job `models`: a table of the models that have a name, with their counts."""

from collections.abc import Sequence
from typing import cast

from omegaconf import DictConfig, OmegaConf

from hybrid_train.anatomy import counts
from hybrid_train.config import describe
from hybrid_train.jobs.count import layers_in_words
from hybrid_train.jobs.help import console, show_left_out, show_numbers
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.count import CountJob
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import show_tokens

_HEADS = (
    "model", "layers", "hidden", "tensors", "parameters", "active", "GFLOP/token", "KV/token",
    "state/sequence",
)  # fmt: skip


def run(arguments: Sequence[str]) -> None:
    """Print every named model with its sizes."""
    if arguments:
        raise UserError("models takes no settings; hybrid-train count model=NAME does")
    page = console()
    found, left_out = describe.each_choice("count", "model", _cells)
    by_size = sorted(found.items(), key=lambda item: item[1][0])
    show_numbers(page, [(name, *cells) for name, (_, cells) in by_size], _HEADS)
    show_left_out(page, left_out)
    page.print(
        "\nGFLOP/token: training, at a sequence of 8,192. KV and state: bytes that generation "
        "keeps.\nA dash: the model takes the vocabulary of the tokenizer; "
        "hybrid-train count model=NAME model.vocab_size=N counts it.",
        soft_wrap=True,
    )


def _cells(config: DictConfig) -> tuple[int, tuple[str, ...]]:
    """Return the number of parameters of a model, and its cells."""
    job = cast("CountJob", OmegaConf.to_object(config))
    model, cache = job.model, counts.cache_size(job.model)
    return counts.parameters(model, model.vocab_size or 0).total, (
        layers_in_words(parse(model.pattern)),
        str(model.hidden_size),
        f"{counts.tensors(model).total:,}",
        *_with_vocabulary(job),
        f"{cache.kv_per_token:,}",
        f"{cache.ssm_per_sequence + cache.conv_per_sequence:,}",
    )


def _with_vocabulary(job: CountJob) -> tuple[str, str, str]:
    """Return parameters, active ones and FLOPs; dashes without a vocabulary."""
    if job.model.vocab_size is None:
        return "-", "-", "-"
    rows = padded_vocab_size(job.model.vocab_size, job.model.vocab_multiple)
    parameters = counts.parameters(job.model, rows)
    flops = counts.flops_per_token(job.model, rows, job.sequence_length).training
    return f"{parameters.total:,}", show_tokens(parameters.active), f"{flops / 1e9:,.3g}"
