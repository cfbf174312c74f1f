"""Losses over a vocabulary split over two processes and more, in one chunk and in several."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from hybrid_train.ops import logits as core
from hybrid_train.ops.divergence import Comparison, Distillation
from hybrid_train.ops.logits import CrossEntropy, HeadPart, LabelScores, read, weighted_sum
from hybrid_train.ops.reference import Reference, TopTokens, aligned
from tests.distributed.launch import RankFailedError, run_distributed
from tests.unit.ops.test_logits import entropy

LENGTH, SEQUENCES, WIDTH = 6, 3, 4


def _compare_with_one_process(rows: int, vocab_size: int, *, split: bool) -> None:
    """Each rank has its rows of the head and, with `split`, its part of the sequence."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    hidden = torch.randn(LENGTH, SEQUENCES, WIDTH, **kind)
    head = 500 * torch.randn(rows, WIDTH, **kind)  # far apart: exp alone would overflow
    labels = torch.randint(vocab_size, (LENGTH * SEQUENCES,), generator=generator)
    weights = torch.rand(LENGTH * SEQUENCES, **kind)
    one, here = _references(rows, vocab_size)
    for alone, term in _terms(rows, vocab_size, labels):
        for chunk in (LENGTH * SEQUENCES, 5):
            core.CHUNK_ELEMENTS = chunk * rows
            whole = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
            part = HeadPart(whole[1], vocab_size)
            total, expected = weighted_sum(whole[0], part, alone, weights)
            total.backward()

            core.CHUNK_ELEMENTS = chunk * (rows // size)
            own = hidden.chunk(size)[rank] if split else hidden
            x = own.clone().requires_grad_()
            weight = head.chunk(size)[rank].clone().requires_grad_()
            part = HeadPart(weight, vocab_size, dist.group.WORLD, split)
            total, values = weighted_sum(x, part, term, weights)
            total.backward()
            _assert_close(values, expected)
            grad = whole[0].grad
            _assert_close(x.grad, grad.chunk(size)[rank] if split and grad is not None else grad)
            _assert_close(weight.grad, whole[1].grad.chunk(size)[rank])
    places = torch.arange(0, LENGTH * SEQUENCES, 2)
    head[vocab_size - 1] = head[0]  # equals on two ranks: the first is the greedy token
    greedy = (hidden.flatten(0, 1)[places] @ head[:vocab_size].t()).argmax(-1)
    for label in (greedy, labels[places], torch.full_like(greedy, vocab_size - 1)):
        reading = LabelScores(label, with_entropy=True)
        expected = read(hidden, HeadPart(head, vocab_size), reading, places)
        weight = head.chunk(size)[rank]
        own = hidden.chunk(size)[rank] if split else hidden
        part = HeadPart(weight, vocab_size, dist.group.WORLD, split)
        _assert_close(read(own, part, reading, places), expected)
    alone, term = (Comparison(Reference(each.hidden[places], each.head)) for each in (one, here))
    expected = read(hidden, HeadPart(head, vocab_size), alone, places)
    _assert_close(read(own, part, term, places), expected)


def _terms(rows: int, vocab_size: int, labels: torch.Tensor) -> list[tuple[Any, Any]]:
    """Terms of the logits, each as one process has it and as this rank does."""
    found: list[tuple[Any, Any]] = [(each, each) for each in (CrossEntropy(labels), entropy)]
    pairs = _references(rows, vocab_size), _references(rows, vocab_size, 2)
    for settings in SETTINGS:
        teachers = ([(0.75, first), (0.25, second)] for first, second in zip(*pairs, strict=True))
        alone, split_up = (Distillation(each, labels, **settings) for each in teachers)
        found.append((alone, split_up))
    for number in (4, vocab_size):
        mixed = [[(0.75, one), (0.25, _stored(pairs[1][0], number))] for one in pairs[0]]
        alone, split_up = (Distillation(each, labels, reverse_share=0.4) for each in mixed)
        found.append((alone, split_up))
    return found


def _stored(reference: Reference, number: int) -> TopTokens:
    """What is stored of the most likely tokens of a model is the same for every rank."""
    head = reference.head
    logits = reference.hidden @ head.weight[: head.vocab_size].t()
    top = logits.topk(number)
    return TopTokens(top.indices.int(), top.values, logits.logsumexp(-1))


def _references(rows: int, vocab_size: int, seed: int = 1) -> tuple[Reference, Reference]:
    """Another model, as one process has it and as this rank does; the second has more padding."""
    kind: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(seed),
        "dtype": torch.float64,
    }
    size, rank = dist.get_world_size(), dist.get_rank()
    rows += (seed - 1) * 3 * size
    head = torch.randn(rows, WIDTH, **kind)
    hidden = torch.randn(LENGTH * SEQUENCES, WIDTH, **kind)
    own = HeadPart(head.chunk(size)[rank], vocab_size, dist.group.WORLD)
    model = HeadPart(head[: rows // size - (seed - 1) * 3], vocab_size, dist.group.WORLD)
    return (
        Reference(hidden, HeadPart(head, vocab_size)),
        Reference(hidden, aligned(own, model)),
    )


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "reverse_share": 0.4, "cross_entropy_share": 0.3},
    {"top_k": 4, "temperature": 2.0, "reverse_share": 0.4, "agreement": True},
]


def _assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def _compare_whole_vocabulary() -> None:
    for split in (False, True):
        _compare_with_one_process(14, 14, split=split)


def _compare_padded() -> None:
    """13 tokens in 24 rows over 4 ranks: the third holds one token, the fourth none."""
    _compare_with_one_process(24, 13, split=False)


def _compare_planted(plant: str) -> None:
    """Give every rank, but not the one process that it is compared with, a loss with a fault."""
    right = Distillation.__call__

    def wrong(self: Any, logits: Any, rows: slice, head: HeadPart) -> Any:
        if head.group is None:
            return right(self, logits, rows, head)
        if plant == "factor of tp":
            values, pullback = right(self, logits, rows, head)
            return values, lambda weights: dist.get_world_size() * pullback(weights)
        return right(*PLANTS[plant](self, logits, rows, head))

    Distillation.__call__ = wrong  # type: ignore[method-assign]
    _compare_with_one_process(16, 13, split=False)


def _with_padded_row(self: Any, logits: Any, rows: slice, head: HeadPart) -> Any:
    one_more = head.vocab_size + 1
    targets = [
        (weight, replace(target, head=replace(target.head, vocab_size=one_more)))
        for weight, target in self.targets
    ]
    return replace(self, targets=targets), logits, rows, replace(head, vocab_size=one_more)


def _with_shifted_labels(self: Any, *others: Any) -> Any:
    return replace(self, labels=self.labels.roll(1)), *others


def _without_square(self: Any, *others: Any) -> Any:
    targets = [(weight / self.temperature**2, target) for weight, target in self.targets]
    return replace(self, targets=targets), *others


PLANTS: dict[str, Any] = {
    "none": lambda *given: given,
    "factor of tp": None,  # what autograd makes of an all-reduce in the loss
    "padded row": _with_padded_row,
    "label shift": _with_shifted_labels,
    "temperature without its square": _without_square,
}


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one is broken")


def test_split_vocabulary_gives_the_losses_and_gradients_of_the_whole() -> None:
    run_distributed(_compare_whole_vocabulary, 2)


def test_padding_of_a_split_vocabulary_has_no_influence_even_where_a_rank_holds_nothing_else() -> (
    None
):
    run_distributed(_compare_padded, 4)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_fault_in_a_split_distillation_is_noticed(plant: str) -> None:
    if plant == "none":
        run_distributed(_compare_planted, 2, plant)
        return
    with pytest.raises(RankFailedError, match="Greatest absolute difference") as error:
        run_distributed(_compare_planted, 2, plant)
    (figure,) = re.findall(r"Greatest absolute difference: (\S+)", str(error.value))[:1]
    print(f"{plant}: off by {figure}")
    assert float(figure) > 1e-3


def test_launcher_raises_the_error_of_a_rank() -> None:
    with pytest.raises(RankFailedError, match="rank one is broken"):
        run_distributed(_fail_on_rank_one, 2)
