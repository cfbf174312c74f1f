"""CUDA calls on a machine without a GPU.

The first test here leaves its process emulated, as any test that builds a model does; what
follows in the same process only ever sees more calls succeed.
"""

import pytest
import torch

from hybrid_train.runtime import cpu
from hybrid_train.schema.problems import UserError

CUDA = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0), 0]


@pytest.fixture
def emulated() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible: there is nothing to emulate")
    cpu.install()


def test_install_refuses_beside_a_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device, torch.empty
    with pytest.raises(UserError, match=r"a GPU is visible.*CUDA_VISIBLE_DEVICES="):
        cpu.install()
    assert (torch.cuda.current_device, torch.empty) == before


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("device", CUDA, ids=str)
def test_factories_take_a_cuda_device(device: object) -> None:
    made = [
        torch.tensor([1.0], device=device),
        torch.as_tensor([1.0], device=device),
        torch.full((2,), 3.0, device=device),
        torch.arange(3, device=device),
        *(make(2, device=device) for make in (torch.empty, torch.zeros, torch.ones, torch.rand)),
        torch.randn(2, device=device),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[2].tolist() == [3, 3]


@pytest.mark.usefixtures("emulated")
def test_other_devices_stay_what_they_are() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2, device=None).device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"


@pytest.mark.usefixtures("emulated")
def test_what_is_made_on_the_meta_device_has_no_values_there() -> None:
    """As a model of transformers is while it is loaded."""
    with torch.device("meta"):
        made = [torch.arange(3), torch.empty(2), torch.tensor([1.0])]
    assert {tensor.device.type for tensor in made} == {"meta"}


@pytest.mark.usefixtures("emulated")
def test_a_module_that_is_sent_to_a_gpu_stays() -> None:
    device = torch.device(f"cuda:{torch.cuda.current_device()}")
    module = torch.nn.Linear(2, 2).to(device, torch.bfloat16)
    assert module.weight.device.type == "cpu"
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.usefixtures("emulated")
def test_streams_and_events_do_nothing() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        total = torch.ones(3).sum()
    event.record(stream)
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().synchronize()
    torch.cuda.synchronize()
    assert event.query()
    assert total == 3


@pytest.mark.usefixtures("emulated")
def test_types_have_the_cuda_spelling_and_conversion_still_works() -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


@pytest.mark.usefixtures("emulated")
def test_random_state_of_the_device_is_that_of_the_cpu() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(2, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)
    torch.cuda.manual_seed(7)
    seeded = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), seeded)


@pytest.mark.usefixtures("emulated")
def test_nothing_is_compiled() -> None:
    def function(x: int) -> int:
        return x + 1

    assert torch.compile(function) is function
    assert torch.compile(dynamic=True)(function) is function
