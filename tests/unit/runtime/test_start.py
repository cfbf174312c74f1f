"""A process of a run: its device, its group, its random numbers."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.runtime import Device, Runtime
from hybrid_train.runtime.start import choose_device, process
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
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(Runtime(device=wanted)) == expected


def test_missing_gpu_is_an_error_where_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"runtime.device=cuda, but torch sees no GPU"):
        choose_device(Runtime(device=Device.cuda))


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
