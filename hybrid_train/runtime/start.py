"""Starts and ends a process of a run: device, threads, process group; and its random numbers."""

import contextlib
import datetime
import itertools
import logging
import os
import random
import re
import socket
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from hybrid_train.config import launcher
from hybrid_train.runtime import cpu, ranks
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Device, Runtime
from hybrid_train.schema.units import counted

_log = logging.getLogger(__name__)
_TRY_S = 1.0  # between two tries to reach rank 0
_DETERMINISTIC = {  # read when a library starts
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
    "MAMBA_DETERMINISTIC": "1",
}
_starts = itertools.count()  # of this process; all processes of a run start as often


@contextlib.contextmanager
def process(runtime: Runtime, seed: int) -> Iterator[torch.device]:
    """Make this process part of its run for as long as the context lasts.

    On a CPU Megatron's CUDA calls are redirected (`runtime/cpu.py`), so import Megatron inside.
    """
    launcher.require_sound()
    start_logging()
    if unused := launcher.unused():
        _log.info("alone, without a launcher: the variables %s are not used", ", ".join(unused))
    device = choose_device(runtime)
    if device.type == "cpu":
        cpu.install()
        cpu.keep_freed_memory()
        torch.set_num_threads(runtime.threads or _share_of_cores())
    else:
        torch.cuda.set_device(device)
    _seed(seed)
    with _deterministic() if runtime.deterministic else contextlib.nullcontext():
        _join_group(device, runtime.timeout_s)
        try:
            yield device
        finally:
            dist.destroy_process_group()


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
    if ranks.local_rank() >= torch.cuda.device_count():
        number = counted(torch.cuda.device_count(), "GPU")
        raise UserError(
            f"LOCAL_RANK = {ranks.local_rank()}: torch sees {number} on this machine, and "
            "each process needs one of its own; start fewer processes on it"
        )
    return torch.device("cuda", ranks.local_rank())


def _share_of_cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size())


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Let libraries take kernels that give the same numbers in every run, before they start.

    What the user has set stays. Sources: torch's notes on reproducibility; Transformer Engine,
    docs/envvars; NCCL fixes the order of its sums by its algorithm.
    """
    ours = {name: value for name, value in _DETERMINISTIC.items() if name not in os.environ}
    os.environ.update(ours)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for name in ours:
            os.environ.pop(name, None)


def _join_group(device: torch.device, timeout_s: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if ranks.world_size() == 1:
        store: dist.Store = dist.HashStore()  # alone: no port, no network
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if not launcher.by_torchrun():
        _log.warning(
            "rank %d of %d waits at %s for the others, for up to %g s (as RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT of the environment say)",
            *(ranks.rank(), ranks.world_size(), ":".join(launcher.meeting_point()), timeout_s),
        )
    try:
        _reach_rank_0(timeout_s)
        shared, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store = dist.PrefixStore(_name_of_start(), shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (dist.DistError, OSError) as error:  # of the store, the network or the collectives
        raise _lonely(error, timeout_s) from error


def _reach_rank_0(timeout_s: float) -> None:
    """Wait until rank 0 listens: torch would write a stack of C++ for every try that fails.

    Raises:
        OSError: if it does not in time.
    """
    host, port = launcher.meeting_point()
    end = time.monotonic() + timeout_s
    while True:
        try:
            if ranks.rank() == 0:
                socket.getaddrinfo(host, int(port))
            else:
                socket.create_connection((host, int(port)), _TRY_S).close()
        except OSError:  # a name may become known late, as that of a new container does
            if time.monotonic() > end:
                raise
            time.sleep(_TRY_S)
        else:
            return


def _lonely(error: Exception, timeout_s: float) -> UserError:
    """Say why the processes of a run did not find each other."""
    text, where = str(error), ":".join(launcher.meeting_point())
    if "EADDRINUSE" in text:
        return UserError(
            f"MASTER_ADDR:MASTER_PORT = {where}: another program uses this port; "
            "choose another one for all processes of the run"
        )
    joined = re.search(r"(\d+)/\d+ clients joined", text)
    came = f": {joined[1]} came" if joined else ""
    leave = "" if launcher.by_torchrun() else ", or unset WORLD_SIZE for a run of one process"
    return UserError(
        f"rank {ranks.rank()} did not find the others: {ranks.world_size()} processes should meet "
        f"at {where} within runtime.timeout_s={timeout_s:g}{came}. Start all of them, where that "
        f"address and port can be reached{leave} ({_first_sentence(text)})"
    )


def _first_sentence(text: str) -> str:
    """Return what a library says before it comes to its stack."""
    return re.split(r"\.\s|\n|; this is|Exception raised", text.strip(), maxsplit=1)[0].strip()


def _name_of_start() -> str:
    """Name this start, where an earlier one of this process or of its forerunners used the store.

    torchrun 2.11 keeps one store over its restarts (rendezvous.py 189 says otherwise), and gloo
    would connect to processes that are gone. On several nodes the counts of restarts differ; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start a store of its own, as launch/ sets it.
    """
    one_node = ranks.world_size() == ranks.local_world_size()
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else ""
    return f"restart {restarts}, start {next(_starts)}"


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of every generator of this process as tensors."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.tensor(keys.astype(np.int64)),
        "numbers": torch.tensor([version, position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([gauss or 0.0, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
    }


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put every generator back to where `random_state` found it."""
    version, position, has_gauss = (int(number) for number in state["numbers"])
    gauss, cached = (float(number) for number in state["gauss"])
    random.setstate((version, tuple(state["python"].tolist()), gauss or None))
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
