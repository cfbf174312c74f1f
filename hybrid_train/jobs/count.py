"""The job `count`: tables of the parameters, tensors, FLOPs and cache bytes of a model."""

from collections import Counter
from collections.abc import Iterator

from hybrid_train.anatomy import counts
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.count import CountJob
from hybrid_train.schema.pattern import KINDS, Pattern, parse

_HEADS = ("part", "layers", "tensors", "parameters", "active", "forward FLOPs", "training FLOPs")
_CACHE_HEADS = ("kept by generation", "for", "bytes")
_NAMES = {letter: f"{kind} ({letter})" for letter, kind in KINDS.items()}
_NAMES |= {"mtp": "MTP", "embedding": "embedding", "head": "head", "final_norm": "final norm"}


def run(job: CountJob) -> None:
    """Print what the model is made of, what a token costs, and what generation keeps."""
    assert job.model.vocab_size is not None, "the checks ask for it"
    vocab_size = padded_vocab_size(job.model.vocab_size, job.model.vocab_multiple)
    parameters = counts.parameters(job.model, vocab_size)
    page = console()
    page.print(f"{job.model.pattern}\n", soft_wrap=True)
    show_numbers(page, list(_parts(job, vocab_size)), _HEADS)
    page.print(
        f"\nActive: what one token meets; {parameters.active_without_embedding:,} without the "
        f"embedding,\n{parameters.active - parameters.active_by_kind.get('mtp', 0):,} without MTP. "
        f"FLOPs: of one token, averaged over a sequence of {job.sequence_length:,};\n"
        f"vocabulary {vocab_size:,}.\n",
        soft_wrap=True,
    )
    show_numbers(page, list(_cache(job)), _CACHE_HEADS)


def layers_in_words(pattern: Pattern) -> str:
    """Say how many layers of each kind there are: "23M 6* 23E", with "+ 2 x *E" for MTP."""
    number = Counter(pattern.main)
    main = " ".join(f"{number[letter]}{letter}" for letter in KINDS if number[letter])
    return f"{main} + {pattern.mtp_depths} x {pattern.mtp}" if pattern.mtp else main


def _parts(job: CountJob, vocab_size: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each part of the model, then their sums."""
    pattern = parse(job.model.pattern)
    number = Counter(pattern.main)
    parameters = counts.parameters(job.model, vocab_size)
    tensors = counts.tensors(job.model)
    flops = counts.flops_per_token(job.model, vocab_size, job.sequence_length)
    for part, name in _NAMES.items():
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


def _cache(job: CountJob) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each thing that generation keeps, then a sequence as a whole."""
    cache = counts.cache_size(job.model)
    yield "keys and values (bf16)", "a token", f"{cache.kv_per_token:,}"
    yield "Mamba states (fp32)", "a sequence", f"{cache.ssm_per_sequence:,}"
    yield "convolution inputs (bf16)", "a sequence", f"{cache.conv_per_sequence:,}"
    whole = cache.of_sequence(job.sequence_length)
    yield "all of it", f"{job.sequence_length:,} tokens", f"{whole:,}"
