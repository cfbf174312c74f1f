"""Texts that the ranks of a layout generate are those of one process; so is a run that does so.

Where a tolerance comes from: tests/parity/verdict.py. A logit has gone through two sums of at most
64 terms (the inner width of Mamba and MLP) in each of 6 layers, and one of the head: sqrt(13 * 64)
/ 2 ulps of the largest logit. A log-probability is a difference of two such numbers, as is the
distance of two logits.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.config import frozen
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.problems import UserError
from tests.distributed.launch import run_distributed
from tests.tiny import (
    EVERY_KIND,
    LENGTH,
    MEGATRON_WARNINGS,
    RUNTIME,
    VOCAB,
    alone,
    as_family,
    microbatches,
    tiny_engine,
    tiny_job,
)

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
ON_TWO = {  # tensor ranks split sequences while they train
    "TP2": Parallel(tensor=2),
    "TP2, experts by number": Parallel(tensor=2, expert=2, expert_tensor=1),
    "PP2": Parallel(pipeline=2),
    "VPP": Parallel(pipeline=2, virtual_pipeline=2),
    "EP2, DP2": Parallel(expert=2),
    "DP2": Parallel(),
}
ON_FOUR = {
    "TP2, EP2": Parallel(tensor=2, expert=2),
    "PP2, DP2": Parallel(pipeline=2, expert=2),
}
OVERLAPPED = Parallel(overlap_grad_reduce=True, overlap_param_gather=True, bucket_parameters=4096)
TRAINED = {
    "TP2, bfloat16": (Parallel(tensor=2), Precision(format=GemmFormat.bf16)),
    "VPP": (ON_TWO["VPP"], Precision(format=GemmFormat.fp32)),
    "DP2, weights gathered late": (OVERLAPPED, Precision(format=GemmFormat.fp32)),
    "EP2, weights in FP8": (
        Parallel(expert=2),
        Precision(format=GemmFormat.fp8_delayed, fp8_param_gather=True),
    ),
}
REFUSED = {
    "parallel.context=1": Parallel(context=2),
    "parallel.fsdp=false": Parallel(fsdp=True),
}
SHORT = dataclasses.replace(RUNTIME, timeout_s=60)  # a rank that waits for another has lost it
STEPS = 120  # after which drafts are accepted more often than not
PROMPTS = (1, 9, 3, 21, 2, 5, 13)  # tokens; twice, in rows of fewer requests
ROWS = 3
ULPS = math.sqrt(13 * 64) / 2
EPSILON = torch.finfo(torch.float32).eps


def rows_to_learn(number: int) -> Tensor:
    """Rows that count up by one or two from anywhere, with a tenth of tokens by chance."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randint(VOCAB, (number, 1), generator=generator)
    pace = torch.randint(1, 3, (number, 1), generator=generator)
    rows = (start + pace * torch.arange(LENGTH + 1)) % VOCAB
    chance = torch.randint(VOCAB, rows.shape, generator=generator)
    return torch.where(torch.rand(rows.shape, generator=generator) < 0.1, chance, rows)


def requests() -> list[Any]:
    """Prompts and answers of unequal lengths, every second one sampled."""
    from hybrid_train.generation.requests import Request
    from hybrid_train.generation.sampling import Sampling

    rows = rows_to_learn(2 * len(PROMPTS)).repeat(1, 2)
    samplings = [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=7)]
    return [
        Request(
            prompt=row[:length].tolist(),
            sampling=samplings[number % 2],
            max_new_tokens=6 + 5 * (number % 4),
        )
        for number, (row, length) in enumerate(zip(rows, PROMPTS * 2, strict=True))
    ]


@dataclass
class Texts:
    """What was generated, by request, and how often drafts were right."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    record: Any


def texts_of(network: Any, drafts: int | None, wanted: Sequence[Any]) -> Texts:
    from hybrid_train.generation.batching import Batching, stream
    from hybrid_train.generation.drafting import Record

    found = Texts([[] for _ in wanted], [[] for _ in wanted], Record())
    settings = Batching(vocab_size=VOCAB, rows=ROWS, drafts=drafts, log_probs=True)
    for new in stream(network, wanted, settings, found.record):
        found.tokens[new.request] += new.tokens
        found.log_probs[new.request] += new.log_probs
    return found


def all_texts(network: Any) -> dict[str, Texts]:
    return {
        "no drafts": texts_of(network, 0, requests()),
        "drafts of three": texts_of(network, 3, requests()),
        "as many drafts as pay": texts_of(network, None, requests()[:5]),
        "a rank without a request": texts_of(network, 3, requests()[:1]),
    }


def _under_layouts(run_dir: Path, layouts: dict[str, Parallel]) -> dict[str, dict[str, Texts]]:
    cpu.install()
    from hybrid_train.jobs.networks import load_model
    from hybrid_train.megatron.data_parallel import destroy_groups

    found = {}
    with pytest.raises(UserError, match=r"parallel.tensor = 8: must divide .*; nearest: 2"):
        load_model(str(run_dir), SHORT, parallel=Parallel(tensor=8))
    for name, parallel in layouts.items():
        found[name] = all_texts(load_model(str(run_dir), SHORT, parallel=parallel).network)
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to count."""
    from hybrid_train.checkpoint import store

    run_dir = tmp_path_factory.mktemp("generation") / "run"
    job = tiny_job(EVERY_KIND, run_dir=str(run_dir))
    as_family(job.model, "hybrid")  # positions, biases, norms of heads
    job.model.vocab_size = VOCAB
    job.train.global_batch = job.train.microbatch = 16
    job.schedule.peak_lr = 1e-2
    frozen.freeze(job, run_dir)
    with alone() as groups:
        from hybrid_train.training.hooks.checkpointing import content_of

        engine = tiny_engine(job, groups)
        batches = microbatches(rows_to_learn(64), 16)
        for _ in range(STEPS):
            engine.step(batches, tokens_seen=0)
        store.save(run_dir, content_of(engine), {"step": 1, "tokens": 64}, keep=1)
    return run_dir


@dataclass
class Expected:
    """The texts of one process, and what rounding may do to them.

    Attributes:
        texts: by the way in which they were made.
        distances: of the two top logits at each token of each answer.
        bound: of a log-probability and of such a distance.
    """

    texts: dict[str, Texts]
    distances: list[list[float]]
    bound: float


@pytest.fixture(scope="module")
def expected(run_dir: Path) -> Expected:
    with alone() as groups:
        from hybrid_train.jobs.networks import load_model

        loaded = load_model(str(run_dir), SHORT, groups=groups)
        texts = all_texts(loaded.network)
        distances, largest = [], 0.0
        for request, answer in zip(requests(), texts["no drafts"].tokens, strict=True):
            with torch.no_grad():
                logits = loaded.model(torch.tensor([[*request.prompt, *answer]])).logits()[0]
            logits = logits[len(request.prompt) - 1 : -1, :VOCAB]
            largest = max(largest, float(logits.abs().amax()))
            first, second = logits.topk(2).values.unbind(-1)
            distances.append((first - second).tolist())
    return Expected(texts, distances, 2 * ULPS * EPSILON * largest)


@pytest.fixture(scope="module")
def found(run_dir: Path) -> dict[str, list[dict[str, Texts]]]:
    """What each rank has of each layout."""
    two = run_distributed(_under_layouts, 2, run_dir, ON_TWO)
    four = run_distributed(_under_layouts, 4, run_dir, ON_FOUR)
    of_two = {layout: [rank[layout] for rank in two] for layout in ON_TWO}
    return of_two | {layout: [rank[layout] for rank in four] for layout in ON_FOUR}


def same_until(request: int, tokens: list[int], expected: Expected, wanted: list[int]) -> int:
    """Return how many tokens of an answer are equal; one that is not lies within rounding."""
    pairs = enumerate(zip(tokens, wanted, strict=True))
    place = next((place for place, (one, other) in pairs if one != other), len(wanted))
    if place < len(wanted):
        assert request % 2 == 0, f"request {request} draws another token at {place}"
        distance = expected.distances[request][place]
        assert distance <= expected.bound, f"request {request}, token {place}: {distance}"
    return place


@pytest.mark.parametrize("layout", [*ON_TWO, *ON_FOUR])
def test_texts_of_a_layout_are_those_of_one_process(
    found: dict[str, list[dict[str, Texts]]], expected: Expected, layout: str
) -> None:
    first, *others = found[layout]
    for other in others:
        assert {kind: (one.tokens, one.log_probs) for kind, one in other.items()} == {
            kind: (one.tokens, one.log_probs) for kind, one in first.items()
        }, "ranks have different texts"
    within_rounding = 0
    for kind, wanted in expected.texts.items():
        for request, tokens in enumerate(first[kind].tokens):
            same = same_until(request, tokens, expected, wanted.tokens[request])
            within_rounding += same < len(tokens)
            assert first[kind].log_probs[request][:same] == pytest.approx(
                wanted.log_probs[request][:same], rel=0, abs=expected.bound
            ), f"{kind}, request {request}"
    print(f"{layout}: {within_rounding} answers part where two logits lie within rounding")


@pytest.mark.parametrize("layout", [*ON_TWO, *ON_FOUR])
def test_as_many_drafts_are_accepted_as_in_one_process(
    found: dict[str, list[dict[str, Texts]]], expected: Expected, layout: str
) -> None:
    wanted = expected.texts["drafts of three"].record
    assert wanted.shares[0] > 0.5, "drafts that are never right try nothing"
    for rank in found[layout]:
        record = rank["drafts of three"].record
        assert (record.row_steps, record.tokens) == (wanted.row_steps, wanted.tokens)
        assert (record.drafted, record.accepted) == (wanted.drafted, wanted.accepted)


@dataclass
class Trained:
    """A short run: losses, all that is left in the end, and what it generated on the way."""

    reports: list[dict[str, float]]
    left: dict[str, Tensor]
    texts: list[Texts]


def trained(job: Any, groups: Any, *, generates: bool) -> Trained:
    """Take three steps, and generate between them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from hybrid_train.megatron.data_parallel import complete_parameters
    from hybrid_train.runtime.start import random_state

    torch.manual_seed(3)
    engine, found = tiny_engine(job, groups), Trained([], {}, [])
    # Every data-parallel rank has the same request.
    wanted = requests()[1:2] * groups.dp.size()
    batches = microbatches(rows_to_learn(64), 1)
    for step in range(3):
        report = engine.step(batches, tokens_seen=step)
        found.reports.append({"loss": report.loss, "norm": report.grad_norm, **report.metrics})
        if generates:
            found.texts.append(texts_of(engine.network, 2, wanted))
    complete_parameters(engine.network.chunks)
    for number, chunk in enumerate(engine.network.chunks):
        assert chunk.training
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
            found.left[f"{number}: {name}"] = tensor.detach().clone()
    states = get_cuda_rng_tracker().get_states()
    return dataclasses.replace(found, left=found.left | states | random_state())


def _train() -> dict[str, tuple[Trained, Trained]]:
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, (parallel, precision) in TRAINED.items():
        job = tiny_job(parallel=parallel, precision=precision)
        job.train.microbatch = 1
        job.schedule.peak_lr = 1e-2
        groups = build_groups(parallel, timeout_s=60)
        found[name] = tuple(trained(job, groups, generates=one) for one in (False, True))
        destroy_groups()
    for advice, parallel in REFUSED.items():
        groups = build_groups(parallel, timeout_s=60)
        network = tiny_engine(tiny_job(parallel=parallel), groups).network
        with pytest.raises(UserError, match=advice):
            texts_of(network, 0, requests())
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def runs() -> list[dict[str, tuple[Trained, Trained]]]:
    """On each rank the runs of every layout, without generation and with it."""
    return run_distributed(_train, 2)


@pytest.mark.parametrize("layout", TRAINED)
def test_a_run_that_generates_on_the_way_is_the_run_that_does_not(runs: Any, layout: str) -> None:
    for rank in runs:
        without, generating = rank[layout]
        assert generating.reports == without.reports
        assert generating.left.keys() == without.left.keys()
        for name, tensor in without.left.items():
            assert torch.equal(generating.left[name], tensor), name


def test_weights_that_are_gathered_late_are_there_when_a_run_generates(runs: Any) -> None:
    for texts in runs[0]["DP2, weights gathered late"][1].texts:
        # Two ranks, one request: where one had old weights, it would know other probabilities.
        assert texts.tokens[0] == texts.tokens[1]
        assert texts.log_probs[0] == texts.log_probs[1]
