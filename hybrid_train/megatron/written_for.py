"""What of Megatron-Core and torch our parts were written for: one table, checked without importing.

Rows with names are replaced (`patches.py`); the others are classes and functions that ours
derive from or reach into. When the pinned version changes, `hybrid-train doctor` and a test list
the rows whose source did: read them again, then write the new digest.
"""

from hybrid_train.runtime.replacements import TORCH, Replacement

LATENT_LINEARS = Replacement(
    "megatron.core.transformer.moe.moe_layer",
    ("TELinear",),
    "core names Transformer Engine's class itself; plain layers need ours for latent projections",
    {"MoELayer.__init__": "a0f32a2831f4"},
)
LATENT_WITHOUT_TE = Replacement(
    "megatron.core.transformer.moe.moe_layer",
    ("HAVE_TE",),
    "without Transformer Engine core refuses latent projections",
    {"MoELayer.__init__": "a0f32a2831f4"},
)
MAMBA_KERNELS = Replacement(
    "megatron.core.ssm.mamba_mixer",
    (
        "HAVE_MAMBA_SSM",
        "ExtendedRMSNorm",
        "mamba_split_conv1d_scan_combined",
        "MAMBA_HAS_STATE_DTYPE",
        "_check_mamba_sequence_packing_support",
    ),
    "core's mixer calls kernels of mamba-ssm and causal-conv1d by these names; ours are plain",
    {
        "MambaMixer.__init__": "164d59e24d12",
        "MambaMixer._ssm_training": "83a6faace6e0",
        "_check_mamba_sequence_packing_support": "204f9f8fdc5e",
    },
)
GRADIENT_ACCUMULATION = Replacement(
    "megatron.core.tensor_parallel.layers",
    ("fused_weight_gradient_mlp_cuda", "_grad_accum_fusion_available"),
    "core asks apex's extension to add a weight gradient to its buffer as it multiplies; without "
    "one the result of the GEMM is stored, then added",
    {
        "LinearWithGradAccumulationAndAsyncCommunication.backward": "637c37267646",
        "ColumnParallelLinear.__init__": "ba749cf4afd3",
    },
    optional=("fused_weight_gradient_mlp_cuda",),
)
CHECKPOINT_WITHOUT_OUTPUT = Replacement(
    "megatron.core.tensor_parallel",
    ("CheckpointWithoutOutput",),
    "core asks Transformer Engine for the state of FP8 even where there is none (random.py 741: "
    "False is not None)",
    {"megatron.core.tensor_parallel.random:CheckpointWithoutOutput": "1c6632824f2f"},
)
SHARED_STORAGE = Replacement(
    "megatron.core.tensor_parallel.random",
    ("_get_share_storage",),
    "core shares storage by an extension that it compiles in the middle of a step (821)",
    {"_get_share_storage": "70283d765e75", "CheckpointWithoutOutput._recompute": "5899b2952324"},
)
RANDOM_STATES = Replacement(
    "megatron.core.tensor_parallel.random",
    ("_get_cuda_rng_state", "_set_cuda_rng_state"),
    "the tracker of random states asks CUDA generators by functions of its own",
    {"_get_cuda_rng_state": "2509183eb3c0", "_set_cuda_rng_state": "519f7aaa452f"},
)
CUSTOM_RECIPES = Replacement(
    "megatron.core.fp8_utils",
    ("_get_custom_recipe",),
    "core makes recipes that it knows by name without any option; of a custom one it asks a "
    "function for quantizers, by its path, for which a name of ours stands",
    {"_get_custom_recipe": "f71a764fd165", "get_fp8_recipe": "44ee9320aeb0"},
)
FP8_WEIGHTS = Replacement(
    "megatron.core.fp8_utils",
    (
        "HAVE_TE_FP8_TENSOR_CLASS",
        "FP8_TENSOR_CLASS",
        "_modify_underlying_storage_impl",
        "_quantize_param_shard_impl",
    ),
    "core's buffers and optimizer know weights in FP8 by Transformer Engine's class; on a CPU they "
    "are to know ours",
    {
        "is_float8tensor": "5d1459dccb75",
        "modify_underlying_storage": "66480115b232",
        "quantize_param_shard": "5d9015081eba",
    },
)
GRADIENT_CLIPPING = Replacement(
    "megatron.core.optimizer.clip_grads",
    ("l2_norm_impl", "multi_tensor_scale_impl"),
    "core's stand-ins for apex copy each gradient, and read each norm back alone (utils.py 1325)",
    {"get_grad_norm_fp32": "861e83d7a3e5", "clip_grad_by_total_norm_fp32": "3c11879a7cc9"},
)
FUSED_ADAM = Replacement(
    "megatron.core.optimizer",
    ("Adam", "USING_PYTORCH_OPTIMIZER", "is_te_min_version"),
    "with reduced-precision state core asks for Transformer Engine's FusedAdam, and its version",
    {"_get_megatron_optimizer_based_on_param_groups": "cfcca7ec3a9a"},
)
FUSED_ADAM_CONFIG = Replacement(
    "megatron.core.optimizer.optimizer_config",
    ("is_te_min_version",),
    "with reduced-precision state core asks for Transformer Engine's FusedAdam, and its version",
    {"OptimizerConfig.__post_init__": "cd660cba1d17"},
)
OFFLOADED = Replacement(
    "megatron.core.optimizer",
    ("HybridDeviceOptimizer",),
    "core makes its optimizer in host memory by this name; it takes no float32 weight beside "
    "bfloat16 ones",
    {
        "_get_megatron_optimizer_based_on_param_groups": "cfcca7ec3a9a",
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer": (
            "736f37da8329"
        ),
    },
    fault="core's optimizer in host memory",
)
OFFLOADED_PARTS = Replacement(
    "megatron.core.optimizer.distrib_optimizer",
    ("HybridDeviceOptimizer",),
    "core makes its optimizer in host memory by this name; it takes no float32 weight beside "
    "bfloat16 ones",
    {
        "DistributedOptimizer.__init__": "6a20109ff02c",
        "DistributedOptimizer._copy_model_grads_to_main_grads": "ed07c5f84f33",
    },
    fault="core's optimizer in host memory",
)
DDP_COALESCING = Replacement(
    "megatron.core.distributed.param_and_grad_buffer",
    ("_coalescing_manager",),
    "gloo makes one tensor of what is gathered together, codes and bfloat16 weights alike: of one "
    "type, which is wrong for the others",
    {"_ParamAndGradBucketGroup": "11c01036a44c"},
    fault="gloo makes one tensor of what is gathered together",
)
FSDP_COALESCING = Replacement(
    "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
    ("_coalescing_manager",),
    "gloo gathers together what Megatron-FSDP waits for one by one",
    {"AllGatherPipeline": "b414c06aa928", "GradReducePipeline": "9be171ad5f60"},
)
RESULTS_QUEUE = Replacement(
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    ("_results_queue",),
    "core would start a process for this queue (65), which takes as long as the start of the run; "
    "nothing goes through it",
    {"get_write_results_queue": "ba9234bf31c4"},
)
WHOLE_CHECKPOINT = Replacement(
    "torch.distributed.checkpoint.default_planner",
    ("_validate_global_plan",),
    "torch sweeps along the longest axis, where every expert meets every other",
    {"_validate_global_plan": "2793fcf32473"},
)
SAFE_INDEX = Replacement(
    "torch.distributed.checkpoint.filesystem",
    ("FileSystemReader.read_metadata",),
    "the index of a checkpoint is a pickle, which may call any function",
    {"FileSystemReader.read_metadata": "9ec482c28049"},
)
SAFE_BYTES = Replacement(
    "torch.distributed.checkpoint.default_planner",
    ("DefaultLoadPlanner.load_bytes",),
    "what is no tensor in a checkpoint is a pickle, which may call any function",
    {"DefaultLoadPlanner.load_bytes": "9340ac227df3"},
)
REPLACED = (
    *(LATENT_LINEARS, LATENT_WITHOUT_TE, MAMBA_KERNELS, GRADIENT_ACCUMULATION),
    *(CHECKPOINT_WITHOUT_OUTPUT, SHARED_STORAGE, RANDOM_STATES, CUSTOM_RECIPES, FP8_WEIGHTS),
    *(GRADIENT_CLIPPING, FUSED_ADAM, FUSED_ADAM_CONFIG, OFFLOADED, OFFLOADED_PARTS),
    *(DDP_COALESCING, FSDP_COALESCING),
    *(RESULTS_QUEUE, WHOLE_CHECKPOINT, SAFE_INDEX, SAFE_BYTES),
)


DERIVED = (
    Replacement(
        "megatron.core.models.hybrid.hybrid_model",
        (),
        "`Hybrid` calls the parts itself, so that losses are left to the objective",
        {"HybridModel.__init__": "cf848b50679f", "HybridModel.forward": "979b9c813607"},
    ),
    Replacement(
        "megatron.core.models.hybrid.hybrid_block",
        (),
        "`Stack` builds the final norm; `SizedLayer` counts on names and numbers of layers",
        {"HybridStack.__init__": "49bfaa028cee", "HybridStack.forward": "896c8747c863"},
    ),
    Replacement(
        "megatron.core.ssm.mamba_mixer",
        (),
        "`MambaMixer` sets epsilon and context parallelism; `window_pass` reads windows by itself",
        {"MambaMixer.__init__": "164d59e24d12", "MambaMixer.forward": "fa7c22ea2474"},
    ),
    Replacement(
        "megatron.core.ssm.mamba_context_parallel",
        (),
        "`_WholeRows` cuts rows wherever documents end",
        {
            "MambaContextParallel.pre_conv_ssm": "b643e4a02e99",
            "MambaContextParallel.post_conv_ssm": "f4422fcf7214",
        },
    ),
    Replacement(
        "megatron.core.transformer.moe.router",
        (),
        "`TopKRouter` chooses, counts, and weighs the balance loss as the family and packed rows "
        "need it",
        {
            "TopKRouter.routing": "ea5331d94da5",
            "TopKRouter._apply_seq_aux_loss": "79b5b632c065",
            "TopKRouter._apply_expert_bias": "a2c299a60d45",
            "TopKRouter.attach_and_log_load_balancing_loss": "5b61d4ba0d28",
        },
    ),
    Replacement(
        "megatron.core.transformer.moe.moe_utils",
        (),
        "`TopKRouter` calls these as core's own router does; `as_lists` is the first one's rule",
        {
            "topk_routing_with_score_function": "9dff04113448",
            "get_tokens_per_expert_and_token_count": "18c79473a58f",
            "switch_load_balancing_loss_func": "49154f3eec10",
            "get_updated_expert_bias": "ad2f5ddd66dc",
        },
    ),
    Replacement(
        "megatron.core.transformer.multi_token_prediction",
        (),
        "`MtpLayer` looks ahead within documents; the block is run by `Hybrid`",
        {
            "MultiTokenPredictionLayer._get_embeddings": "dca687636193",
            "MultiTokenPredictionBlock.forward": "6a6ab1577758",
            "roll_tensor": "93af4c1b2612",
        },
    ),
    *(
        Replacement(module, (), "`window_pass` says with fewer calls what a layer computes", read)
        for module, read in {
            "megatron.core.ssm.mamba_layer": {"MambaLayer.forward": "7e8928f2bb68"},
            "megatron.core.ssm.mlp_layer": {"MLPLayer": "2923771d2859"},
            "megatron.core.transformer.transformer_layer": {
                "TransformerLayer.forward": "0170f6488236"
            },
            "megatron.core.transformer.attention": {
                "SelfAttention.get_query_key_value_tensors": "63c8a6821f2d"
            },
            "megatron.core.transformer.mlp": {"MLP.forward": "ffe0ebc9e200"},
            "megatron.core.transformer.moe.moe_layer": {"MoELayer.forward": "d3a947522750"},
            "megatron.core.transformer.multi_token_prediction": {
                "MultiTokenPredictionLayer._concat_embeddings": "3384f6309ebd",
                "MultiTokenPredictionLayer._proj_and_transformer_layer": "05fa1c4d155c",
            },
        }.items()
    ),
    Replacement(
        "megatron.core.tensor_parallel.layers",
        (),
        "our linears override how they multiply",
        {
            "ColumnParallelLinear.forward": "793ee4ca3a36",
            "ColumnParallelLinear._forward_impl": "0fe4ff96726a",
            "RowParallelLinear.forward": "8e9267c547fb",
            "RowParallelLinear._forward_impl": "0fe4ff96726a",
        },
    ),
    Replacement(
        "megatron.core.distributed.finalize_model_grads",
        (),
        "`Finalizer` stands around it: it divides gradients, and moves the biases of experts",
        {"finalize_model_grads": "12137d044038", "reset_model_temporary_tensors": "c6a37fa85bb3"},
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer",
        (),
        "state and masters are read and reloaded by the groups and ranges of this class",
        {
            "DistributedOptimizer._copy_model_params_to_main_params": "f7200e8c86c8",
            "DistributedOptimizer._get_model_param_range_map": "a5a6d9957506",
            "DistributedOptimizer._build_model_and_main_param_groups": "6f202b3251f4",
        },
    ),
    Replacement(
        "megatron.core.optimizer.optimizer",
        (),
        "state and masters are read by the groups of these classes",
        {
            "Float16OptimizerWithFloat16Params.__init__": "5f14aa814c33",
            "ChainedOptimizer": "4d5a3059e506",
        },
    ),
    Replacement(
        "megatron.core.dist_checkpointing.strategies.torch",
        (),
        "saves are planned by core, written and ended by us",
        {"TorchDistSaveShardedStrategy": "f25d2d98587c"},
    ),
    Replacement(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        (),
        "saves are planned by core, written and ended by us",
        {"FileSystemWriterAsync": "b4aecfef55b4"},
    ),
    Replacement(
        "megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp",
        (),
        "weights and gradients of Megatron-FSDP are read from its buffers",
        {"MegatronFSDP._replace_param_with_distributed_if_needed": "3b807ed60e91"},
    ),
    Replacement(
        "megatron.core.extensions.transformer_engine",
        (),
        "Transformer Engine's attention is handed packed rows as a list of documents",
        {"TEDotProductAttention.forward": "0566e5ab4118"},
    ),
)
TABLE = (*REPLACED, *DERIVED, *TORCH)
