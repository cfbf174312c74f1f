"""The router: what it records, and for which network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.tracking import Profile
from tests.tiny import LENGTH, MEGATRON_WARNINGS, VOCAB, some_rows, tiny_job

pytestmark = MEGATRON_WARNINGS


def built(groups: Any, scale: float = 0.1, top_k: int = 2) -> Any:
    from hybrid_train.model.build import build_model

    job = tiny_job("ME-E")
    job.objective.moe_aux_loss_scale = scale
    job.model.moe.top_k = top_k
    return build_model(job, groups, VOCAB, on_gpu=False)


def run(model: Any, seed: int = 0) -> Tensor:
    logits: Tensor = model.chunks[0](some_rows(seed=seed)[:, :LENGTH]).logits()
    return logits


def test_two_networks_of_a_process_do_not_mix_their_balance_losses(groups: Any) -> None:
    alone, one, other = (built(groups) for _ in range(3))
    run(alone)
    expected = alone.balance_losses.take()
    run(one)
    run(other, seed=1)
    run(other, seed=2)
    assert torch.equal(one.balance_losses.take(), expected)
    assert one.balance_losses.take() is None
    assert other.balance_losses.take() > 1.5 * expected  # of two passes


def test_validation_and_a_frozen_teacher_record_nothing(groups: Any) -> None:
    model = built(groups)
    with torch.no_grad():
        run(model)
    model.chunks[0].eval()
    run(model)
    assert model.balance_losses.take() is None


def test_the_scale_of_a_record_multiplies_the_gradient_alone(groups: Any) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    gradients, recorded = [], []
    for factor in (None, 1.0, 3.0):
        model = built(groups)
        model.balance_losses.scale = None if factor is None else torch.tensor(factor)
        (0.0 * run(model)).sum().backward()  # what is left is the gradient of the balance loss
        (weight,) = [w for n, w in model.chunks[0].named_parameters() if "1.mlp.router.weight" in n]
        gradients.append(weight.grad)
        recorded.append(model.balance_losses.take())
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[2], 3 * gradients[0])
    assert gradients[0].abs().max() > 0
    assert recorded[0] == recorded[1] == recorded[2]


def test_it_has_the_name_by_which_megatron_fsdp_knows_it() -> None:
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter

    from hybrid_train.megatron.router import TopKRouter

    source = Path(mcore_fsdp_adapter.__file__).read_text()
    assert f'"{TopKRouter.__name__}",' in source


def test_equal_load_gives_each_expert_its_share_whatever_the_router_says(groups: Any) -> None:
    from hybrid_train.model.build import build_model

    loads = []
    for equal in (False, True):
        job = tiny_job("E", profile=Profile(equal_load=equal))
        model = build_model(job, groups, VOCAB, on_gpu=False).chunks[0]
        (router,) = [one for one in model.modules() if hasattr(one, "local_tokens_per_expert")]
        router.weight.data[1:] = -router.weight.data[:1]  # one expert, or all of the others
        for seed in range(8):
            model(some_rows(seed=seed)[:, :LENGTH])
        load = router.local_tokens_per_expert
        loads.append(float(load.max() / load.mean()))
    routed, forced = loads
    assert routed > 1.5
    assert forced < 1.25


@pytest.mark.parametrize("top_k", [1, 2])
def test_lists_of_chosen_experts_say_what_cores_table_says(groups: Any, top_k: int) -> None:
    router = built(groups, top_k=top_k).chunks[0].decoder.layers[1].mlp.router
    router.expert_bias.copy_(torch.randn(len(router.expert_bias)) / 4)
    x = torch.randn(50, 1, router.weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weights, chosen = router.eval()(x)
        few, numbers = router.as_lists(x.squeeze(1))
    assert torch.zeros_like(chosen).scatter(1, numbers, True).equal(chosen)
    torch.testing.assert_close(torch.zeros_like(weights).scatter(1, numbers, few), weights)


def test_experts_that_are_masked_are_not_chosen_nor_in_the_lists(groups: Any) -> None:
    from hybrid_train.megatron.router import routers

    model = built(groups)
    router = next(routers(model.chunks))
    router.kept = torch.tensor([False, True, True, True])
    with torch.no_grad():  # the best of all, by far
        router.expert_bias.copy_(torch.tensor([9.0, -9.0, -9.0, -9.0]))
    x = torch.randn(32, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    weights, chosen = router.routing(router.gating(x[:, None]))
    assert not chosen[:, 0].any()
    assert (chosen.sum(1) == 2).all()
    of_lists, numbers = router.as_lists(x)
    assert (numbers > 0).all()
    torch.testing.assert_close(weights.gather(1, numbers), of_lists.float())


def test_biases_of_the_experts_that_are_left_move_by_the_mean_of_their_tokens(groups: Any) -> None:
    from hybrid_train.megatron.router import routers, update_expert_biases

    masked, whole = routers(built(groups).chunks)
    masked.kept = torch.tensor([True, True, False, True])
    tokens = torch.tensor([6.0, 2.0, 0.0, 4.0])  # 3 of all four, 4 of the three
    update_expert_biases([(one.train(), tokens) for one in (masked, whole)], 0.5, groups.tp_dp_cp)
    assert masked.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert whole.expert_bias.tolist() == [-0.5, 0.5, 0.5, -0.5]
