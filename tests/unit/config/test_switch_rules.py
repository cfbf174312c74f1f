"""What a switch of speed needs is refused in words where it is missing, with what is accepted."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from hybrid_train.config.compose import compose, draft
from hybrid_train.config.rules_of_switches import SWITCH_RULES
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.problems import ConfigError

HYBRID = ("experiment=tiny_cpu", "model.pattern=MEM*-E", "processes=4", "train.global_batch=8")
FULL_WIDTH = "model.moe.latent_size=null"
HOSTED = "optimizer.offload_share=0.5"
GRAPHS = "gpu.cuda_graphs=layers"
DENSE = "model.pattern=MM*-"
STEPS = ("gpu.cuda_graphs=step", DENSE)
SELECTIVE = "parallel.recompute=selective"
PHASES = "train.phases=[{name: a}, {name: b, start: '50%', sequence_length: 32}]"
LAYOUTS = "train.phases=[{name: a}, {name: b, start: '50%', tensor: 2}]"
RAMP = (
    *("train.global_batch=16", "train.batch_ramp.tokens=1k", "train.batch_ramp.start_batch=8"),
    "train.batch_ramp.increment=8",
)
# Settings -> the path that is refused, words of the rule, the nearest value.
REFUSED: list[tuple[tuple[str, ...], str, str, object]] = [
    (("parallel.dispatcher=deepep",), "parallel.dispatcher", "on several ranks", "alltoall"),
    (("parallel.dispatcher=allgather", DENSE), "parallel.dispatcher", "no expert", "alltoall"),
    (("profile.equal_load=true", DENSE), "profile.equal_load", "no expert layers", "false"),
    (("gpu.fused_router=true", DENSE), "gpu.fused_router", "no expert layers", "false"),
    (("gpu.dispatcher_sms=16",), "gpu.dispatcher_sms", "not alltoall", "null"),
    (("parallel.overlap_shared_experts=true",), "parallel.overlap_shared_experts", "latent",
     "false"),
    (("parallel.overlap_shared_experts=true", FULL_WIDTH, "parallel.dispatcher=allgather"),
     "parallel.overlap_shared_experts", "needs parallel.dispatcher", "false"),
    (("parallel.overlap_shared_experts=true", FULL_WIDTH, SELECTIVE,
      "parallel.recompute_modules=[shared_experts]"),
     "parallel.overlap_shared_experts", "recompute_modules", "false"),
    (("parallel.overlap_shared_experts=true", FULL_WIDTH,
      "model.moe.shared_intermediate_size=null"),
     "parallel.overlap_shared_experts", "there are none", "false"),
    (("parallel.overlap_expert_gradients=true",), "parallel.overlap_expert_gradients",
     "expert > 1", "false"),
    (("parallel.overlap_tensor=true",), "parallel.overlap_tensor", "tensor > 1", "false"),
    (("parallel.overlap_tensor=true", "parallel.tensor=2", DENSE, "parallel.sequence=false"),
     "parallel.overlap_tensor", "along the sequence", "false"),
    (("parallel.overlap_tensor=true", "parallel.tensor=2", PHASES), "parallel.overlap_tensor",
     "phases have other lengths", "false"),
    ((GRAPHS, PHASES), "gpu.cuda_graphs", "phases have other lengths", "none"),
    ((GRAPHS, LAYOUTS), "gpu.cuda_graphs", "phases have other layouts", "none"),
    ((GRAPHS, *RAMP), "gpu.cuda_graphs", "lets the batch grow", "none"),
    ((GRAPHS, "parallel.fsdp=true"), "gpu.cuda_graphs", "fsdp", "none"),
    ((GRAPHS, "data.packing=best_fit"), "gpu.cuda_graphs", "documents end", "none"),
    ((GRAPHS, "parallel.recompute=full"), "gpu.cuda_graphs", "recompute=full", "none"),
    ((GRAPHS, SELECTIVE), "gpu.cuda_graph_parts", "(mamba)", "[attn]"),
    ((GRAPHS, SELECTIVE, "parallel.recompute_modules=[moe]",
      "gpu.cuda_graph_parts=[attn,moe_router]"), "gpu.cuda_graph_parts", "(moe)", "[attn]"),
    ((GRAPHS, "gpu.cuda_graph_parts=[mamba,mlp]"), "gpu.cuda_graph_parts", "beside", "[mamba]"),
    ((GRAPHS, "gpu.cuda_graph_parts=[mamba,attn]", "model.attention.rope.theta=10000"),
      "gpu.cuda_graph_parts", "positions", "[mamba]"),
    ((GRAPHS, "gpu.cuda_graph_parts=[mamba,moe_preprocess]"), "gpu.cuda_graph_parts",
     "must name moe_router", "[mamba,moe_preprocess,moe_router]"),
    ((GRAPHS, "gpu.cuda_graph_parts=[]"), "gpu.cuda_graph_parts", "must name a part", "null"),
    (("gpu.cuda_graph_parts=[mamba]",), "gpu.cuda_graph_parts", "needs gpu.cuda_graphs", "null"),
    ((GRAPHS, DENSE, "gpu.cuda_graph_parts=[mamba,moe_router]"), "gpu.cuda_graph_parts",
     "has no moe_router", "[mamba]"),
    (("gpu.offloaded_parts=[attn_proj]",), "gpu.offloaded_parts", "must name core_attn",
     "[attn_proj,core_attn]"),
    (("gpu.offloaded_parts=[expert_fc1]", DENSE), "gpu.offloaded_parts", "has no expert_fc1",
     "[]"),
    (("gpu.offloaded_parts=[expert_fc1,qkv_linear]", SELECTIVE), "gpu.offloaded_parts",
     "computes again", "[qkv_linear]"),
    (("gpu.offloaded_parts=[qkv_linear]", "parallel.recompute=full"), "gpu.offloaded_parts",
     "keeps nothing", "[]"),
    (("precision.fp8_attention=true",), "precision.fp8_attention", "needs precision.format",
     "false"),
    (("precision=fp8_tensorwise", "precision.fp8_attention=true", "model.pattern=MM-E"),
     "precision.fp8_attention", "no attention", "false"),
    (("gpu.fused_permutation=true", "runtime.kernels=plain"), "gpu.fused_permutation",
     "runtime.kernels", "false"),
    ((GRAPHS, "runtime.kernels=plain"), "gpu.cuda_graphs", "runtime.kernels", "none"),
    (("parallel.bucket_parameters=1000",), "parallel.bucket_parameters", "overlap_grad_reduce",
     "null"),
    (("parallel.bucket_parameters=1000", "parallel.fsdp=true"), "parallel.bucket_parameters",
     "cuts by layers", "null"),
    (("gpu.nccl_user_buffers=true", "parallel.pipeline=2"), "gpu.nccl_user_buffers",
     "pipeline=1", "false"),
    (("gpu.nccl_user_buffers=true", "parallel.fsdp=true"), "gpu.nccl_user_buffers", "fsdp=false",
     "false"),
    (("parallel.overlap_expert_gradients=true", "parallel.expert=2", "parallel.fsdp=true"),
     "parallel.overlap_expert_gradients", "reduces gradients as they come", "false"),
    ((GRAPHS, "model.pattern=EE-E"), "gpu.cuda_graphs", "no M or * layer", "none"),
    ((GRAPHS, "model.pattern=MM-E/*E", "gpu.cuda_graph_parts=[mamba,attn]"),
     "gpu.cuda_graph_parts", "has no attn", "[mamba]"),
    ((GRAPHS, SELECTIVE, "parallel.recompute_modules=[core_attn]"), "gpu.cuda_graph_parts",
     "(core_attn)", "[mamba]"),
    ((GRAPHS, SELECTIVE, "parallel.recompute_modules=[layernorm]",
      "gpu.cuda_graph_parts=[mamba,moe_router,moe_preprocess]"), "gpu.cuda_graph_parts",
     "(layernorm)", "[mamba,moe_router]"),
    ((GRAPHS, SELECTIVE, "parallel.recompute_modules=[shared_experts]",
      "gpu.cuda_graph_parts=[mamba,moe_router]"), "gpu.cuda_graph_parts", "(shared_experts)",
     "[mamba]"),
    ((GRAPHS, "gpu.offloaded_parts=[attn_norm,qkv_linear]"), "gpu.offloaded_parts", "attn_norm",
     "[qkv_linear]"),
    (("gpu.offloaded_parts=[core_attn,qkv_linear]", SELECTIVE,
      "parallel.recompute_modules=[core_attn]"), "gpu.offloaded_parts", "core_attn",
     "[qkv_linear]"),
    (("gpu.cuda_graphs=step",), "gpu.cuda_graphs", "no expert layers", "none"),
    ((*STEPS, PHASES), "gpu.cuda_graphs", "phases have other lengths", "none"),
    ((*STEPS, "data.packing=best_fit"), "gpu.cuda_graphs", "documents end", "none"),
    ((*STEPS, "parallel.pipeline=2"), "gpu.cuda_graphs", "waits between stages", "none"),
    ((*STEPS, "parallel.recompute=full"), "gpu.cuda_graphs", "parallel.recompute", "none"),
    ((*STEPS, "gpu.offloaded_parts=[qkv_linear]"), "gpu.cuda_graphs", "hooks move", "none"),
    ((*STEPS, "precision=mxfp8", "precision.backend=emulated"), "gpu.cuda_graphs", "emulated",
     "none"),
    ((*STEPS, "precision=mxfp8"), "precision.statistics_interval", "no hooks", 0),
    ((*STEPS, "parallel.overlap_param_gather=true"), "parallel.overlap_param_gather", "no note",
     "false"),
    ((*STEPS, "gpu.cuda_graph_parts=[mamba]"), "gpu.cuda_graph_parts", "cuda_graphs=layers",
     "null"),
    (("recovery.checksum_interval=10", "parallel.fsdp=true"), "recovery.checksum_interval",
     "keeps no weight twice", 0),
    ((HOSTED, "parallel.distributed_optimizer=false"), "optimizer.offload_share",
     "distributed_optimizer=true", 0),
    ((HOSTED, "parallel.fsdp=true"), "optimizer.offload_share", "fsdp=false", 0),
    ((HOSTED, "optimizer.second_moment=bfloat16"), "optimizer.offload_share", "second_moment", 0),
    ((HOSTED, "precision=bf16", "precision.reduce_gradients_in_fp32=false"),
     "optimizer.offload_share", "reduce_gradients_in_fp32=true", 0),
    ((HOSTED, "precision=fp8_tensorwise", "precision.fp8_param_gather=true"),
     "optimizer.offload_share", "fp8_param_gather=false", 0),
]  # fmt: skip


@pytest.mark.parametrize(("words", "path", "rule", "nearest"), REFUSED)
def test_a_switch_without_what_it_needs_is_refused_with_what_is_accepted(
    words: tuple[str, ...], path: str, rule: str, nearest: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("check", [*HYBRID, *words])
    found = {problem.path: problem for problem in caught.value.problems}
    assert path in found, caught.value
    assert rule in found[path].rule
    assert found[path].nearest == nearest
    kept = [word for word in words if not word.startswith(f"{path}=")]
    compose("check", [*HYBRID, *kept, f"{path}={nearest}"])


@pytest.mark.parametrize(
    "words",
    [
        (GRAPHS, "gpu.cuda_graph_parts=[attn,mamba,moe_router,moe_preprocess]"),
        (GRAPHS, DENSE),
        STEPS,
        (*STEPS, "model.pattern=M*-/*-", "parallel.tensor=2", "precision.statistics_interval=0"),
        (GRAPHS, SELECTIVE, "parallel.recompute_modules=[moe]"),
        ("parallel.dispatcher=hybridep", "parallel.expert=2", "gpu.dispatcher_sms=16"),
        ("parallel.overlap_shared_experts=true", FULL_WIDTH),
        ("parallel.overlap_tensor=true", "parallel.tensor=2"),
        ("precision=fp8_tensorwise", "precision.fp8_attention=true"),
        ("gpu.offloaded_parts=[core_attn,attn_proj,expert_fc1]",),
        (
            HOSTED,
            "precision=bf16",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ),
        (HOSTED, "precision.reduce_gradients_in_fp32=false"),  # a float32 run reduces float32
    ],
)
def test_a_switch_with_what_it_needs_is_accepted(words: tuple[str, ...]) -> None:
    compose("check", [*HYBRID, *words])


def test_steps_of_another_objective_are_not_captured() -> None:
    """Its turns would be one graph, and what it reads on the host would be read once."""

    class Other(NextToken):
        pass

    job: Any = OmegaConf.to_object(draft("check", [*HYBRID, *STEPS]).config)
    assert [one for rule in SWITCH_RULES for one in rule(job, 4)] == []
    job.objective = Other()
    (problem,) = [one for rule in SWITCH_RULES for one in rule(job, 4)]
    assert "objective.kind=next_token alone" in problem.rule


def test_every_rule_has_a_case_that_breaks_it() -> None:
    unbroken = {rule.__name__ for rule in SWITCH_RULES}
    for words, *_ in REFUSED:
        drafted = OmegaConf.to_object(draft("check", [*HYBRID, *words]).config)
        unbroken -= {rule.__name__ for rule in SWITCH_RULES if list(rule(drafted, 4))}
    assert unbroken == set()
