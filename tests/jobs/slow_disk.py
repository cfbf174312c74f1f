"""Runs `hybrid-train train` on a disk that never ends a write from the second save on."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hybrid_train.jobs import cli, train

FOREVER_S = 600


@contextlib.contextmanager
def slow_process(*args: Any) -> Iterator[torch.device]:
    """Be the context of the job, with a writer that begins its second file and hangs."""
    with start(*args) as device:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync,
        )

        true_write, saves = FileSystemWriterAsync.write_preloaded_data, []

        def write(transforms: Any, number: int, bucket: Any, *args: Any, **kwargs: Any) -> Any:
            saves.append(number)
            if len(saves) > 1:
                Path(bucket[0]).write_bytes(b"half of it")
                time.sleep(FOREVER_S)
            return true_write(transforms, number, bucket, *args, **kwargs)

        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
        yield device


start = train.process
train.process = slow_process
sys.exit(cli.main())
