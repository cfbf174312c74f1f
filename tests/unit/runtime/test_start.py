"""A process of a run: its device, its group, its random numbers."""

import os
import random
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hybrid_train.config import launcher
from hybrid_train.runtime.start import choose_device, process
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Device, Runtime
from tests.tiny import RUNTIME


@pytest.mark.parametrize(
    ("wanted", "gpu", "expected"),
    [
        (Device.auto, False, torch.device("cpu")),
        (Device.auto, True, torch.device("cuda", 3)),
        (Device.cpu, False, torch.device("cpu")),
        (Device.cpu, True, torch.device("cpu")),
        (Device.cuda, True, torch.device("cuda", 3)),
    ],
)
def test_device_is_the_wanted_one(
    wanted: Device, gpu: bool, expected: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(Runtime(device=wanted)) == expected


def test_missing_gpu_is_an_error_where_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"runtime.device=cuda, but torch sees no GPU"):
        choose_device(Runtime(device=Device.cuda))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK = 2: torch sees 2 GPUs"):
        choose_device(Runtime())


def test_a_process_alone_is_a_group_of_one_while_it_lasts() -> None:
    with process(RUNTIME, seed=1) as device:
        assert device.type == "cpu"
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        assert torch.get_num_threads() == 1
    assert not dist.is_initialized()


def test_group_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), process(RUNTIME, seed=1):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_every_generator_starts_from_the_seed() -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        with process(RUNTIME, seed):
            return random.random(), np.random.rand(), torch.rand(1).item()

    assert draws(5) == draws(5)
    assert all(one != other for one, other in zip(draws(5), draws(6), strict=True))
    draws(2**40)  # more than numpy takes


def test_a_second_process_that_finds_no_first_says_so_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    several(monkeypatch, rank=1, port=port)  # nobody listens there any more
    with pytest.raises(UserError) as error, process(replace(RUNTIME, timeout_s=1), seed=1):
        pass
    for text in ("rank 1", f"127.0.0.1:{port}", "runtime.timeout_s=1", "unset WORLD_SIZE"):
        assert text in str(error.value)
    assert not dist.is_initialized()


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        several(monkeypatch, rank=0, port=port)
        text = f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}: another program uses this port"
        with pytest.raises(UserError, match=text), process(RUNTIME, seed=1):
            pass


def several(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    """Be one of two processes that a script has started, without torchrun."""
    told = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name in (*launcher.NAMES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("values", [{"MASTER_ADDR": "login1"}, {"RANK": "", "MASTER_PORT": "1"}])
def test_variables_left_over_are_said_once_and_not_used(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in launcher.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with process(RUNTIME, seed=1):
        assert dist.get_world_size() == 1
    said = f"alone, without a launcher: the variables {', '.join(values)} are not used\n"
    assert capsys.readouterr().err.count(said) == 1


def test_a_deterministic_process_takes_such_kernels_and_leaves_what_the_user_has_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "CUBLAS_WORKSPACE_CONFIG",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "MAMBA_DETERMINISTIC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with process(replace(RUNTIME, deterministic=True), seed=1):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert os.environ["NCCL_ALGO"] == "Tree"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
