"""The calls of a capture, in core's order; the capture itself needs a GPU and has not run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import MEGATRON_WARNINGS, batch_of, losses_of, some_rows, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS


@pytest.mark.parametrize("gathers", [True, False])
def test_hooks_that_gather_weights_are_off_while_layers_are_captured(
    groups: Any, monkeypatch: pytest.MonkeyPatch, gathers: bool
) -> None:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from hybrid_train.megatron import forward_backward
    from hybrid_train.megatron.router import BalanceLosses

    calls: list[Any] = []

    class Helper:
        def __init__(self, **arguments: Any) -> None:
            calls.append((arguments["seq_length"], arguments["micro_batch_size"]))

        def create_cudagraphs(self) -> None:
            calls.append(f"capture of {get_num_microbatches()} microbatches")

        def cuda_graph_set_manual_hooks(self) -> None:
            calls.append("hooks of captured layers")

    monkeypatch.setattr(forward_backward, "TECudaGraphHelper", Helper)
    monkeypatch.setattr(forward_backward, "_device", lambda: torch.device("cpu"))
    chunk = SimpleNamespace(
        config=SimpleNamespace(cuda_graph_impl="transformer_engine"),
        ddp_config=SimpleNamespace(overlap_param_gather=gathers, use_distributed_optimizer=True),
        disable_forward_pre_hook=lambda param_sync: calls.append("hooks off"),
        enable_forward_pre_hook=lambda: calls.append("hooks on"),
    )
    monkeypatch.setattr(forward_backward, "get_model_config", lambda one: one.config)
    forward_backward.capture_layers(
        [chunk], SimpleNamespace(), groups, BalanceLosses(), shape=(2, 64), global_batch=8
    )
    captured = [(64, 2), "capture of 4 microbatches"]
    expected = ["hooks off", *captured, "hooks on", "hooks of captured layers"]
    assert calls == (expected if gathers else captured)


def test_a_record_that_stays_in_place_tells_the_same_sums(groups: Any) -> None:
    """A replayed graph adds to the memory of the sum, and reads the scale from where it was."""
    model = tiny_model(tiny_job("E"), groups)
    batch = batch_of(some_rows())
    record = next(one.balance_losses for one in model.modules() if hasattr(one, "balance_losses"))
    record.scale = torch.tensor(2.0)
    losses_of(model, batch)
    expected = record.take()
    record.stay_in_place(torch.device("cpu"))
    place, scale = record._sum.data_ptr(), record.scale.data_ptr()
    for factor in (2.0, 3.0):
        record.scale = torch.tensor(factor)
        losses_of(model, batch)
        assert (record._sum.data_ptr(), record.scale.data_ptr()) == (place, scale)
        assert record.scale == factor
        assert torch.equal(record.take(), expected)
        assert record.take() == 0
