"""One process stands for one rank of a run of any size: nobody else is there, nothing has memory.

torch's process group "fake" answers each collective at once, and its meta device gives tensors
sizes and formats alone. So what a rank builds can be counted before there is a cluster. What a rank
hears from others is what it says itself: values must not matter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybrid_train.runtime import cpu
from hybrid_train.runtime.replacements import OBJECTS


@contextlib.contextmanager
def one_rank(rank: int, processes: int) -> Iterator[None]:
    """Be a rank of a run of so many processes for as long as the block lasts.

    Raises:
        UserError: if a GPU is visible.
    """
    cpu.install()
    others = OBJECTS.present()
    OBJECTS.put(all_gather_object=_say_for_all)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        with cpu.without_memory():
            yield
    finally:
        dist.destroy_process_group()
        OBJECTS.put(**others)


def _say_for_all(heard: list[Any], said: Any, group: Any = None) -> None:
    """Stand for `all_gather_object` where all ranks say the same."""
    del group
    heard[:] = [said] * len(heard)
