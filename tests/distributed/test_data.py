"""The data of a run on two processes: one writes, both read, together they see what one sees."""

from pathlib import Path

import torch
from torch import distributed as dist

from hybrid_train.config.schema.data import Quickstart
from hybrid_train.config.schema.train import Train, TrainJob
from hybrid_train.data.build import DataBundle, build_data
from hybrid_train.data.quickstart import prepare
from tests.distributed.launch import run_distributed


def _bundle(folder: str, rank: int, size: int, *, alone: bool) -> DataBundle:
    train = Train(tokens="2k", sequence_length=16, microbatch=2, global_batch=8)
    return build_data(
        TrainJob(train=train, data=Quickstart(folder=folder, vocab_size=300)),
        data_rank=rank,
        data_size=size,
        consumed_sequences=0,
        barrier=(lambda: None) if alone else dist.barrier,
        is_main=alone or rank == 0,
    )


def _read_together(folder: str) -> None:
    rank = dist.get_rank()
    found = _bundle(folder, rank, 2, alone=False)
    mine = torch.stack([next(found.train).tokens for _ in range(4)])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    alone = _bundle(folder, 0, 1, alone=True)  # written by now, so any rank may read it all
    whole = torch.stack([next(alone.train).tokens for _ in range(8)])
    assert torch.equal(torch.stack(both, dim=1).flatten(0, 1), whole)


def test_two_processes_read_the_batches_of_one(tmp_path: Path) -> None:
    source = tmp_path / "lib"
    source.mkdir()
    for i in range(40):
        (source / f"m{i}.py").write_text(f"def f{i}(x):\n    return {i} * x\n" * 10)
    folder = str(tmp_path / "out")
    prepare(Quickstart(folder=folder, vocab_size=300), source)
    run_distributed(_read_together, 2, folder)
