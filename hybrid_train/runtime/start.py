"""Starts and stops a process of a run: device, threads, process group, random numbers."""

import contextlib
import datetime
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.runtime import Device, Runtime
from hybrid_train.runtime import cpu, ranks
from hybrid_train.runtime.logs import start_logging


def choose_device(runtime: Runtime) -> torch.device:
    """Return the device that the section asks for; `auto` is a GPU where there is one."""
    gpu = torch.cuda.is_available()
    if runtime.device is Device.cuda and not gpu:
        raise UserError(
            "runtime.device=cuda, but torch sees no GPU; use runtime.device=cpu, "
            "or check the driver (nvidia-smi) and that torch is a CUDA build"
        )
    if runtime.device is Device.cpu or not gpu:
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank())


@contextlib.contextmanager
def process(runtime: Runtime, seed: int) -> Iterator[torch.device]:
    """Make this process part of its run for as long as the context lasts.

    On a CPU Megatron's CUDA calls are redirected (`runtime/cpu.py`), so import Megatron inside.
    """
    start_logging()
    device = choose_device(runtime)
    if device.type == "cpu":
        cpu.install()
        cpu.keep_freed_memory()
        torch.set_num_threads(runtime.threads or _share_of_cores())
    else:
        torch.cuda.set_device(device)
    _seed(seed)
    _join_group(device, runtime.timeout_s)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _share_of_cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size())


def _join_group(device: torch.device, timeout_s: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if ranks.world_size() == 1 and "MASTER_ADDR" not in os.environ:
        store: dist.Store = dist.HashStore()  # alone: no port, no network
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    shared, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store = dist.PrefixStore(_restart(), shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _restart() -> str:
    """Name this start of the workers, where the processes of an earlier one used the same store.

    torchrun 2.11 keeps one store over its restarts (rendezvous.py 189 says otherwise), and gloo
    would connect to processes that are gone. On several nodes the counts of restarts differ; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start a store of its own, as launch/ sets it.
    """
    one_node = ranks.world_size() == ranks.local_world_size()
    return f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if one_node else ""


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
