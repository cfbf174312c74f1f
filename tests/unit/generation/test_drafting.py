"""What is counted of drafts, and the length that `auto` settles on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS


class Clock:
    """Time that passes when it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def network(depths: int = 1, repeated: bool = True) -> Any:
    one = SimpleNamespace(size=lambda: 1)
    config = SimpleNamespace(mtp_num_layers=depths, mtp_use_repeated_layer=repeated)
    return SimpleNamespace(
        groups=SimpleNamespace(tp=one, dp=one, pp=one),
        device=torch.device("cpu"),
        chunks=[SimpleNamespace(config=config)],
    )


def grown(length: int, accepted: list[int]) -> list[Any]:
    from hybrid_train.generation.requests import NewTokens

    return [
        NewTokens(request=0, tokens=[1] * (one + 1), log_probs=[], drafted=length, accepted=one)
        for one in accepted
    ]


def settled(
    monkeypatch: pytest.MonkeyPatch, share: float, draft_s: float, steps: int = 300
) -> dict[int, int]:
    """Steps by length of draft, where each draft is accepted with one probability."""
    from hybrid_train.generation import drafting

    clock, record = Clock(), drafting.Record()
    monkeypatch.setattr(drafting, "time", clock)
    chosen = drafting.Drafting(network(), None, record)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        length = chosen.start_step()
        clock.now += 1.0 + draft_s * length
        with chosen.learning():
            clock.now += 0.4  # which a model without drafts does not need
        right = torch.rand(4, length, generator=generator) < share
        accepted = right.long().cumprod(1).sum(1).tolist()
        chosen.end_step(grown(length, accepted))
    return record.lengths


def most(lengths: dict[int, int]) -> int:
    return max(lengths, key=lambda length: lengths[length])


def test_auto_drafts_far_where_drafts_are_right_and_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    # A draft costs 5 % of a step and 9 of 10 are right: 7 of them give 5.7 tokens in 1.75 steps.
    assert most(settled(monkeypatch, share=0.9, draft_s=0.05)) == 7


def test_auto_drafts_little_where_they_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    # 80 % right at 30 % of a step: 1.8 / 1.7 with one, 2.44 / 2.0 with two, 2.95 / 2.3 with three,
    # 3.69 / 2.9 with five, 4.16 / 3.5 with seven.
    assert most(settled(monkeypatch, share=0.8, draft_s=0.3)) in (2, 3, 5)


def test_auto_switches_drafts_off_where_they_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = settled(monkeypatch, share=0.2, draft_s=0.4)
    assert most(lengths) == 0
    assert lengths[0] > 0.8 * sum(lengths.values())


@pytest.mark.parametrize(
    ("draft_s", "longest"), [(0.15, 200), (1.0, 40)], ids=["nearly pays", "far from it"]
)
def test_the_block_reads_on_only_while_drafts_may_pay(
    draft_s: float, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.generation import drafting

    clock, chosen = Clock(), drafting.Drafting(network(), None, drafting.Record())
    monkeypatch.setattr(drafting, "time", clock)
    reads = []
    for _ in range(300):
        length = chosen.start_step()
        clock.now += 1.0 + draft_s * length
        reads.append(chosen.on)
        chosen.end_step(grown(length, [0]))
    assert reads == sorted(reads, reverse=True)
    assert all(reads[: 128 if longest == 200 else 36])  # which the first trials take
    assert not any(reads[longest:])


def test_auto_comes_back_to_drafts_when_the_text_becomes_easy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hybrid_train.generation import drafting

    clock, record = Clock(), drafting.Record()
    monkeypatch.setattr(drafting, "time", clock)
    chosen = drafting.Drafting(network(), None, record)
    latest = []
    for number in range(1200):
        length = chosen.start_step()
        clock.now += 1.0 + 0.1 * length
        chosen.end_step(grown(length, [0 if number < 120 else length] * 2))
        latest.append(length)
    assert sorted(latest[70:120])[25] == 0
    assert sorted(latest[-100:])[50] >= 3


def test_the_record_counts_what_each_place_was_accepted() -> None:
    from hybrid_train.generation.drafting import Record

    record = Record()
    record.count(2, grown(2, [2, 0, 1]))
    record.count(3, grown(3, [3]))
    record.count(3, grown(1, [1]))  # an answer that was over with its first draft
    record.count(0, grown(0, [0, 0]))
    assert (record.drafted, record.accepted) == ([5, 4, 1], [4, 2, 1])
    assert record.shares == [0.8, 0.5, 1.0]
    assert record.acceptance_length == 10 / 4  # of steps in which all drafts were judged
    assert record.lengths == {2: 1, 3: 2, 0: 1}


def test_more_drafts_than_blocks_with_weights_of_their_own_can_give_are_refused() -> None:
    from hybrid_train.generation.drafting import Drafting, Record

    with pytest.raises(UserError, match="the first alone can draft; set drafts=1"):
        Drafting(network(depths=2, repeated=False), 2, Record())
    with pytest.raises(UserError, match="no MTP block that could draft; set drafts=0"):
        Drafting(network(depths=0), 1, Record())
    assert Drafting(network(depths=0), None, Record()).start_step() == 0
