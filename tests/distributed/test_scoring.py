"""Scores of texts under every layout of two processes are those of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.distributed.test_packed import engine_of
from tests.tiny import MEGATRON_WARNINGS, VOCAB, alone, microbatches, some_rows

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "virtual pipeline": Parallel(pipeline=2, virtual_pipeline=2),
    "expert": Parallel(expert=2),
    "data": Parallel(),
    "context": Parallel(context=2),
    "fsdp": Parallel(fsdp=True),
}
LENGTHS = (2, 9, 33, 1, 17, 70, 16, 5, 24)
ROUNDING = 2e-5  # nats; float32 sums of another order, through eight layers


def _scores(layouts: dict[str, Parallel]) -> dict[str, list[list[Tensor]]]:
    """Log-probabilities, greedy matches and entropies of each text, before and after a step.

    And the divergence from another model, and where both agree; FSDP has no head between passes.
    """
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, parallel in layouts.items():
        groups = build_groups(parallel, timeout_s=60)
        engine = engine_of(parallel, groups)
        other = None if parallel.fsdp else engine_of(parallel, groups)
        if other is not None:
            for weight in (w for chunk in other.network.chunks for w in chunk.parameters()):
                weight.data.mul_(1.5)
        before = _score(engine, other)
        rank, size = groups.dp.rank(), groups.dp.size()
        engine.step(microbatches(some_rows()[rank::size], 1), tokens_seen=0)
        found[name] = before + _score(engine, other)
        destroy_groups()
    return found


def _score(engine: Any, other: Any) -> list[list[Tensor]]:
    from hybrid_train.generation.scoring import Rows, Text, score
    from hybrid_train.generation.shared_contexts import score_continuations

    generator = torch.Generator().manual_seed(3)
    texts = [
        Text(torch.randint(VOCAB, (length,), generator=generator).tolist(), 1 + 7 * n % length)
        for n, length in enumerate(LENGTHS)
    ]
    against = None if other is None else other.network
    found = score(engine.network, texts, rows=Rows(32, 64), entropy=True, against=against)
    own = [[one.log_probs, one.greedy.float(), one.entropy] for one in found]
    both = [] if other is None else [[one.divergence, one.agrees.float()] for one in found]
    values = [[*one, *pair] for one, pair in zip(own, both or [()] * len(own), strict=True)]
    # Each text but the shortest with another end, so that contexts are shared.
    texts += [Text([*text.tokens[:-2], 5, 7, 9], text.start) for text in texts if text.scored > 1]
    texts += [Text([*texts[5].tokens[:40], n, n, n], 42) for n in (3, 4, 6)]  # a stem of 40
    shared = score_continuations(engine.network, texts, rows=Rows(32, 64))
    return values + [[one.log_probs, one.greedy.float(), one.log_probs] for one in shared]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[list[Tensor]]]]:
    return run_distributed(_scores, 2, LAYOUTS)


@pytest.fixture(scope="module")
def expected() -> list[list[Tensor]]:
    with alone():
        from hybrid_train.megatron.data_parallel import destroy_groups

        destroy_groups()
        return _scores({"one": Parallel()})["one"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_scores_of_one_process(
    layout: str, ranks: list[dict[str, list[list[Tensor]]]], expected: list[list[Tensor]]
) -> None:
    one, other = (rank[layout] for rank in ranks)
    apart = []
    for found, same, wanted in zip(one, other, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, same, strict=True))
        assert torch.equal(found[1], wanted[1])
        apart += [(found[0] - wanted[0]).abs(), (found[2] - wanted[2]).abs()]
        if len(found) > 3:
            assert torch.equal(found[4], wanted[4])
            apart.append((found[3] - wanted[3]).abs())
            assert layout != "fsdp"
    largest = float(torch.cat(apart).max())
    print(f"{layout}: largest difference {largest:.2g} nats")
    assert largest < ROUNDING
