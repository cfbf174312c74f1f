"""The jobs `count`, `models` and `experiments`: tables of what there is."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig, OmegaConf

from hybrid_train.anatomy import counts
from hybrid_train.config import describe
from hybrid_train.jobs.help import console, show_left_out, show_numbers, table
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.job_roots import CountJob
from hybrid_train.schema.pattern import KINDS, parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import show_tokens

if TYPE_CHECKING:
    from hybrid_train.schema.model import Model

_COUNT_HEADS = (
    "part",
    "layers",
    "tensors",
    "parameters",
    "active",
    "forward FLOPs",
    "training FLOPs",
)
_CACHE_HEADS = ("kept by generation", "for", "bytes")
_PART_NAMES = {letter: f"{kind} ({letter})" for letter, kind in KINDS.items()}
_PART_NAMES |= {"mtp": "MTP", "embedding": "embedding", "head": "head", "final_norm": "final norm"}
_MODEL_HEADS = (
    "model", "layers", "hidden", "tensors", "parameters", "active", "GFLOP/token", "KV/token",
    "state/sequence",
)  # fmt: skip
_EXPERIMENT_HEADS = (
    "experiment",
    "parameters",
    "active",
    "tokens",
    "sequence",
    "batch",
    "description",
)


def run_count(job: CountJob) -> None:
    """Print what the model is made of, what a token costs, and what generation keeps."""
    assert job.model.vocab_size is not None, "the checks ask for it"
    vocab_size = padded_vocab_size(job.model.vocab_size, job.model.vocab_multiple)
    parameters = counts.parameters(job.model, vocab_size)
    page = console()
    page.print(f"{job.model.pattern}\n", soft_wrap=True)
    show_numbers(page, list(_part_rows(job, vocab_size)), _COUNT_HEADS)
    page.print(
        f"\nActive: what one token meets; {parameters.active_without_embedding:,} without the "
        f"embedding,\n{parameters.active - parameters.active_by_kind.get('mtp', 0):,} without MTP. "
        f"FLOPs: of one token, averaged over a sequence of {job.sequence_length:,};\n"
        f"vocabulary {vocab_size:,}.\n",
        soft_wrap=True,
    )
    show_numbers(page, list(_cache_rows(job)), _CACHE_HEADS)


def _part_rows(job: CountJob, vocab_size: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each part of the model, then their sums."""
    pattern = parse(job.model.pattern)
    number = Counter(pattern.main)
    parameters = counts.parameters(job.model, vocab_size)
    tensors = counts.tensors(job.model)
    flops = counts.flops_per_token(job.model, vocab_size, job.sequence_length)
    for part, name in _PART_NAMES.items():
        if part not in parameters.by_kind:
            continue
        layers = f"{pattern.mtp_depths} x {pattern.mtp}" if part == "mtp" else number[part] or ""
        figures = (
            tensors.by_kind[part],
            parameters.by_kind[part],
            parameters.active_by_kind[part],
            flops.by_kind.get(part, 0),
            flops.training_of(part) if part in flops.by_kind else 0,
        )
        yield (name, str(layers), *(f"{figure:,}" for figure in figures))
    sums = tensors.total, parameters.total, parameters.active, flops.forward, flops.training
    yield ("total", str(len(pattern.main)), *(f"{figure:,}" for figure in sums))


def _cache_rows(job: CountJob) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each thing that generation keeps, then a sequence as a whole."""
    cache = counts.cache_size(job.model)
    yield "keys and values (bf16)", "a token", f"{cache.kv_per_token:,}"
    yield "Mamba states (fp32)", "a sequence", f"{cache.ssm_per_sequence:,}"
    yield "convolution inputs (bf16)", "a sequence", f"{cache.conv_per_sequence:,}"
    whole = cache.of_sequence(job.sequence_length)
    yield "all of it", f"{job.sequence_length:,} tokens", f"{whole:,}"


def run_models(arguments: Sequence[str]) -> None:
    """Print every named model with its sizes."""
    if arguments:
        raise UserError("models takes no settings; hybrid-train count model=NAME does")
    page = console()
    found, left_out = describe.each_choice("count", "model", _model_cells)
    by_size = sorted(found.items(), key=lambda item: item[1][0])
    show_numbers(page, [(name, *cells) for name, (_, cells) in by_size], _MODEL_HEADS)
    show_left_out(page, left_out)
    page.print(
        "\nGFLOP/token: training, at a sequence of 8,192. KV and state: bytes that generation "
        "keeps.\nA dash: the model takes the vocabulary of the tokenizer; "
        "hybrid-train count model=NAME model.vocab_size=N counts it.",
        soft_wrap=True,
    )


def _model_cells(config: DictConfig) -> tuple[int, tuple[str, ...]]:
    """Return the number of parameters of a model, and its cells."""
    job = cast("CountJob", OmegaConf.to_object(config))
    model, cache = job.model, counts.cache_size(job.model)
    return counts.parameters(model, model.vocab_size or 0).total, (
        parse(model.pattern).in_words(),
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


def run_experiments(arguments: Sequence[str]) -> None:
    """Print every experiment with its sizes and one line of description."""
    if arguments:
        raise UserError(
            "experiments takes no settings; run one: hybrid-train train experiment=NAME"
        )
    page = console()
    rows, left_out = describe.each_choice("train", "experiment", _experiment_cells)
    comments = describe.descriptions("experiment")
    page.print(
        table(((name, *row, comments[name]) for name, row in rows.items()), _EXPERIMENT_HEADS)
    )
    show_left_out(page, left_out)
    page.print("\nRun one: hybrid-train train experiment=NAME")


def _experiment_cells(config: DictConfig) -> tuple[str, ...]:
    """Return the sizes of an experiment, as cells."""
    model = cast("Model", OmegaConf.to_object(config.model))
    rows = model.vocab_size or OmegaConf.select(config, "data.vocab_size") or 0
    parameters = counts.parameters(model, padded_vocab_size(rows, model.vocab_multiple))
    return (
        show_tokens(parameters.total),
        show_tokens(parameters.active),
        str(config.train.tokens),
        str(config.train.sequence_length),
        str(config.train.global_batch),
    )
