"""Collectives that NCCL has and gloo lacks, on two processes."""

import torch
from torch import distributed as dist

from hybrid_train.runtime import cpu
from tests.distributed.launch import run_distributed


def _exchange_rows(counts: list[int]) -> None:
    cpu.install()
    rank = dist.get_rank()
    given = [torch.arange(2.0 * n).view(n, 2) + 10 * r for r, n in enumerate(counts)]

    gathered = [torch.full_like(part, torch.nan) for part in given]
    dist.all_gather(gathered, given[rank], group=dist.group.WORLD)
    torch.testing.assert_close(gathered, given, rtol=0, atol=0)

    own = torch.empty_like(given[rank])
    dist.reduce_scatter(own, [part * (rank + 1) for part in given], group=dist.group.WORLD)
    torch.testing.assert_close(own, given[rank] * 3, rtol=0, atol=0)  # 1 + 2


def test_ranks_may_gather_and_scatter_different_numbers_of_rows() -> None:
    run_distributed(_exchange_rows, 2, [3, 5])


def test_a_rank_may_have_no_rows() -> None:
    run_distributed(_exchange_rows, 2, [4, 0])


def test_equal_numbers_of_rows_go_the_direct_way() -> None:
    run_distributed(_exchange_rows, 2, [3, 3])
