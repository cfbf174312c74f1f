"""What a job says is what Megatron's config gets."""

import math
from typing import Any

import pytest
import torch

from hybrid_train.schema.model import Mtp
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.tiny import MEGATRON_WARNINGS, tiny_job

pytestmark = MEGATRON_WARNINGS


@pytest.fixture(scope="module")
def config_of(groups: Any) -> Any:
    """Megatron must be imported behind the emulation, hence the fixture."""
    from hybrid_train.megatron.transformer_config import transformer_config

    return lambda job: transformer_config(job, on_gpu=False)


def test_sizes_arrive_where_they_belong(config_of: Any) -> None:
    config = config_of(tiny_job(objective=NextToken(moe_aux_loss_scale=0.02)))
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (6, 32, 64)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 8)
    assert (config.mamba_num_heads, config.mamba_head_dim) == (4, 16)
    assert (config.mamba_num_groups, config.mamba_state_dim) == (2, 8)
    assert (config.num_moe_experts, config.moe_router_topk) == (4, 2)
    assert (config.moe_ffn_hidden_size, config.moe_shared_expert_intermediate_size) == (32, 48)
    assert (config.moe_latent_size, config.moe_router_topk_scaling_factor) == (16, 2.5)
    assert config.moe_aux_loss_coeff == 0.02
    assert (config.mtp_num_layers, config.mtp_use_repeated_layer) == (2, True)


def test_family_traits_do_not_depend_on_the_job(config_of: Any) -> None:
    config = config_of(tiny_job("M*-"))
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert config.activation_func(x).tolist() == [0, 0, 9]
    assert (config.normalization, config.gated_linear_unit) == ("RMSNorm", False)
    assert (config.add_bias_linear, config.add_qkv_bias) == (False, False)
    assert (config.hidden_dropout, config.attention_dropout) == (0, 0)
    assert config.num_moe_experts is None
    assert config.mtp_num_layers is None


def test_router_is_that_of_the_family(config_of: Any) -> None:
    config = config_of(tiny_job("E"))
    assert config.moe_router_score_function == "sigmoid"
    assert config.moe_router_enable_expert_bias
    assert config.moe_router_dtype == "fp32"
    assert config.moe_router_load_balancing_type == "seq_aux_loss"


def test_first_weights_have_the_published_deviation(config_of: Any) -> None:
    job = tiny_job("-")
    assert config_of(job).init_method_std == pytest.approx(0.9 / math.sqrt(32))
    job.model.init_std = 0.02
    assert config_of(job).init_method_std == 0.02


@pytest.mark.parametrize(
    ("tensor", "chosen", "expected"),
    [(1, None, False), (1, True, False), (2, None, True), (2, True, True), (2, False, False)],
)
def test_sequence_is_split_with_tensors_unless_said(
    config_of: Any, tensor: int, chosen: bool | None, expected: bool
) -> None:
    job = tiny_job("M*-", parallel=Parallel(tensor=tensor, sequence=chosen))
    assert config_of(job).sequence_parallel is expected


@pytest.mark.parametrize(("chosen", "expected"), [(None, 2), (1, 1)])
def test_experts_are_split_as_tensors_are_unless_said(
    config_of: Any, chosen: int | None, expected: int
) -> None:
    config = config_of(tiny_job("E", parallel=Parallel(tensor=2, expert_tensor=chosen)))
    assert config.expert_tensor_parallel_size == expected


def test_number_format_decides_the_parameters(config_of: Any) -> None:
    fp32 = config_of(tiny_job("-"))
    bf16 = config_of(tiny_job("-", precision=Precision(format=GemmFormat.bf16)))
    assert (fp32.params_dtype, fp32.bf16) == (torch.float32, False)
    assert (bf16.params_dtype, bf16.bf16) == (torch.bfloat16, True)


def test_blocks_of_their_own_are_passed_on(config_of: Any) -> None:
    job = tiny_job()
    job.model.mtp = Mtp(repeated_block=False)
    assert not config_of(job).mtp_use_repeated_layer
