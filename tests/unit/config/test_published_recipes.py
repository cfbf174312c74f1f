"""Recipes that NVIDIA publishes for this family, said in our settings: composed and accepted.

Source: NVIDIA-NeMo/Megatron-Bridge at 067f987d, src/megatron/bridge/perf_recipes/nemotronh/ and
recipes/nemotronh/, each by the name of its function. docs/gpu.md lists what they ask for beside it
that has no setting here. One thing is refused: Ultra recomputes `moe_act` under Megatron-FSDP.
"""

import pytest

from hybrid_train.config.compose import compose

# What all of them share: one length, no ramp, gradients reduced in bfloat16, both overlaps.
SHARED = (
    *("train.phases=[]", "train.sequence_length=8192", "train.batch_ramp.tokens=0"),
    *("train.microbatch=1", "precision.reduce_gradients_in_fp32=false", "runtime.gc_interval=100"),
    *("parallel.pipeline=1", "parallel.context=1", "parallel.expert=1", "parallel.tensor=1"),
    *("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
)
GRAPHS = "gpu.cuda_graphs=layers"
ALL_PARTS = "gpu.cuda_graph_parts=[attn,mamba,moe_router,moe_preprocess]"
BENCHMARK = "profile.equal_load=true"
DENSE_56B = ("experiment=nemotron_h_56b", "train.global_batch=192", GRAPHS)
NANO = (
    *("experiment=nemotron3_nano", "parallel.expert=8", "parallel.dispatcher=hybridep"),
    *("gpu.dispatcher_sms=16", "gpu.fused_permutation=true", "gpu.fused_squared_relu=true"),
    *(BENCHMARK, GRAPHS),
)
NANO_H100 = (*NANO, "gpu.cuda_graph_parts=[attn,mamba]", "train.global_batch=1024")
NANO_BLACKWELL = (*NANO, ALL_PARTS, "train.global_batch=512", "train.microbatch=2")
LIGHTNING = (
    "model.pattern=MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME/*E/*E",
    *("model.mtp.repeated_block=true", "objective.mtp_loss_scale=0.3"),
)
SUPER = (
    *("experiment=nemotron3_super", "train.global_batch=512", "parallel.dispatcher=hybridep"),
    *(
        "parallel.expert_tensor=1",
        "gpu.dispatcher_sms=32",
        "gpu.fused_squared_relu=true",
        BENCHMARK,
    ),
)
FP8_CURRENT = "precision=fp8_tensorwise"
RECOMPUTE = "parallel.recompute=selective"

RECIPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "nemotronh_4b_pretrain_1gpu_h100_bf16_config": (
        1, ("experiment=nemotron_h_4b", "precision=bf16", "train.global_batch=768",
            "parallel.overlap_param_gather=false"),
    ),
    "nemotronh_8b_pretrain_2gpu_h100_bf16_config": (
        2, ("experiment=nemotron_h_8b", "precision=bf16", "train.global_batch=768",
            "parallel.tensor=2", "parallel.overlap_tensor=true",
            "parallel.overlap_param_gather=false"),
    ),
    "nemotronh_47b_pretrain_8gpu_h100_bf16_config": (
        8, ("experiment=nemotron_h_47b", FP8_CURRENT, "train.global_batch=768",
            "parallel.tensor=8", "parallel.overlap_tensor=true",
            "parallel.overlap_param_gather=false"),
    ),
    "nemotron_nano_9b_v2_pretrain_2gpu_h100_bf16_config": (
        2, ("experiment=nemotron_nano_v2_9b", "precision=bf16", "train.global_batch=768",
            "parallel.tensor=2", "parallel.overlap_tensor=true",
            "parallel.overlap_param_gather=false"),
    ),
    "nemotron_nano_12b_v2_pretrain_4gpu_h100_bf16_config": (
        4, ("experiment=nemotron_nano_v2_12b", FP8_CURRENT, "train.global_batch=768",
            "parallel.tensor=4", "parallel.overlap_param_gather=false"),
    ),
    "nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config": (
        8, ("experiment=nemotron3_nano_4b", "precision=bf16", "train.global_batch=1024"),
    ),
    "nemotronh_56b_pretrain_64gpu_h100_fp8cs_config": (
        64, (*DENSE_56B, FP8_CURRENT, "parallel.tensor=8", "gpu.cuda_graph_parts=[mamba]"),
    ),
    "nemotronh_56b_pretrain_64gpu_b200_fp8cs_config": (
        64, (*DENSE_56B, FP8_CURRENT, "parallel.tensor=2", "gpu.cuda_graph_parts=[mamba,attn]"),
    ),
    "nemotronh_56b_pretrain_256gpu_gb300_bf16_config": (
        256, (*DENSE_56B, "precision=bf16", "parallel.tensor=2", "train.global_batch=256",
              "gpu.cuda_graph_parts=[mamba,attn]"),
    ),
    "nemotronh_56b_pretrain_256gpu_gb300_fp8cs_config": (
        256, (*DENSE_56B, FP8_CURRENT, "parallel.tensor=2", "train.global_batch=768",
              "gpu.cuda_graph_parts=[mamba,attn]"),
    ),
    "nemotron_3_nano_pretrain_16gpu_h100_bf16_config": (
        16, (*NANO_H100, RECOMPUTE, "parallel.recompute_modules=[moe,layernorm]"),
    ),
    "nemotron_3_nano_pretrain_16gpu_h100_fp8cs_config": (
        16, (*NANO_H100, FP8_CURRENT, "parallel.expert=16", RECOMPUTE,
             "parallel.recompute_modules=[layernorm]"),
    ),
    "nemotron_3_nano_pretrain_8gpu_b200_bf16_config": (8, NANO_BLACKWELL),
    "nemotron_3_nano_pretrain_8gpu_b200_nvfp4_config": (
        8, (*NANO_BLACKWELL, "precision=nvfp4", "precision.exceptions=[]"),
    ),
    "nemotron_3_nano_pretrain_8gpu_gb300_fp8mx_config": (
        8, (*NANO_BLACKWELL, "precision=mxfp8", "precision.fp8_attention=true",
            "gpu.dispatcher_sms=16", "train.microbatch=4"),
    ),
    "nemotron_3_5_lightning_pretrain_16gpu_h100_bf16_config": (
        16, (*NANO_H100, *LIGHTNING, "train.global_batch=512", "optimizer.first_moment=bfloat16",
             "optimizer.main_gradients=bfloat16", RECOMPUTE,
             "parallel.recompute_modules=[moe_act,layernorm]", "gpu.fused_router=true",
             "gpu.offloaded_parts=[expert_fc1]"),
    ),
    "nemotron_3_5_lightning_pretrain_8gpu_gb200_fp8mx_fsdp_config": (
        8, (*NANO_BLACKWELL, *LIGHTNING, "precision=mxfp8", "gpu.cuda_graphs=none",
            "gpu.cuda_graph_parts=null", "train.microbatch=3", "train.global_batch=384",
            "parallel.fsdp=true", "parallel.overlap_grad_reduce=false",
            "parallel.overlap_param_gather=false"),
    ),
    "nemotron_3_super_pretrain_16gpu_h100_bf16_config": (
        16, (*SUPER, "precision=bf16", "precision.exceptions=[]", "train.global_batch=1024",
             "parallel.dispatcher=alltoall", "gpu.dispatcher_sms=null", "parallel.tensor=8",
             "parallel.expert=16", GRAPHS, ALL_PARTS, "profile.equal_load=false",
             "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false",
             "optimizer.master_weights=float16", "optimizer.first_moment=bfloat16",
             "optimizer.main_gradients=bfloat16"),
    ),
    "nemotron_3_super_pretrain_64gpu_b200_bf16_config": (
        64, (*SUPER, "precision=bf16", "precision.exceptions=[]", "parallel.expert=64", RECOMPUTE,
             "parallel.recompute_modules=[moe_act,moe,layernorm,core_attn]"),
    ),
    "nemotron_3_super_pretrain_64gpu_b200_nvfp4_config": (
        64, (*SUPER, "parallel.tensor=2", "parallel.expert=64", GRAPHS, ALL_PARTS),
    ),
    "nemotron_3_super_pretrain_64gpu_gb300_fp8mx_config": (
        64, (*SUPER, "precision=mxfp8", "precision.exceptions=[]", "parallel.expert=64", GRAPHS,
             ALL_PARTS, "precision.fp8_attention=true"),
    ),
    "nemotron_3_ultra_pretrain_256gpu_gb300_fp8mx_config": (
        256, ("experiment=nemotron3_ultra", "precision=mxfp8", "precision.exceptions=[]",
              "train.global_batch=512", "parallel.tensor=2", "parallel.expert=64",
              "parallel.expert_tensor=1", "parallel.dispatcher=hybridep", "parallel.fsdp=true",
              "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false",
              "gpu.fused_permutation=true", "gpu.fused_router=true", "gpu.fused_squared_relu=true",
              "gpu.high_priority_groups=[ep]", BENCHMARK),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_is_accepted_in_our_settings(name: str) -> None:
    processes, words = RECIPES[name]
    kept = {word.partition("=")[0]: word for word in (*SHARED, *words)}  # the last one counts
    groups = [word for key, word in kept.items() if "." not in key]
    rest = [word for key, word in kept.items() if "." in key]
    job = compose("check", [f"processes={processes}", *groups, *rest])
    assert job.processes == processes
