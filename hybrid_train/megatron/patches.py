"""Puts ours in place of names of Megatron-Core when a run starts: the rows of `written_for`.

Nothing is replaced at import. A replacement holds for the process, whatever runs in it: it must not
depend on a job, but for `fused_adam`, which holds while an optimizer is built.
"""

import contextlib
import importlib
import queue
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from hybrid_train.megatron import norms, plain, written_for
from hybrid_train.megatron.offloaded_optimizer import OffloadedAdamW
from hybrid_train.ops import mixer
from hybrid_train.ops.linear import add_gemm
from hybrid_train.optim.fused_adam import FusedAdam
from hybrid_train.precision import fp8_weights
from hybrid_train.runtime import cpu


def for_process(*, on_gpu: bool) -> None:
    """Let core's machinery run in this process."""
    written_for.RESULTS_QUEUE.put(_results_queue=queue.Queue())
    for row in (written_for.OFFLOADED, written_for.OFFLOADED_PARTS):
        row.put(HybridDeviceOptimizer=OffloadedAdamW)
    if on_gpu:
        return
    written_for.RANDOM_STATES.put(
        _get_cuda_rng_state=cpu.random_state, _set_cuda_rng_state=cpu.set_random_state
    )
    fused = types.SimpleNamespace(wgrad_gemm_accum_fp32=_add, wgrad_gemm_accum_fp16=_add)
    written_for.GRADIENT_ACCUMULATION.put(
        fused_weight_gradient_mlp_cuda=fused, _grad_accum_fusion_available=True
    )
    written_for.FSDP_COALESCING.put(_coalescing_manager=cpu.one_by_one)


def _add(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """Add a weight gradient to its buffer, under the signature of apex's extension."""
    add_gemm(main_grad, grad, x)


def for_plain_layers() -> None:
    """Let core build our layers where it names Transformer Engine's, and compute them again."""
    for_plain_latent_linears()
    written_for.LATENT_WITHOUT_TE.put(HAVE_TE=True)
    written_for.CHECKPOINT_WITHOUT_OUTPUT.put(CheckpointWithoutOutput=_WithoutOutput)
    written_for.SHARED_STORAGE.put(_get_share_storage=lambda: _refill)


def for_plain_latent_linears() -> None:
    """Let core build our latent projections beside other parts of Transformer Engine."""
    written_for.LATENT_LINEARS.put(TELinear=plain.DuplicatedLinear)


def for_plain_mamba() -> None:
    """Let core's Mamba mixer run our scan, convolution and gated norm."""
    written_for.MAMBA_KERNELS.put(
        HAVE_MAMBA_SSM=True,
        ExtendedRMSNorm=norms.GatedNorm,
        mamba_split_conv1d_scan_combined=mixer.mamba_split_conv1d_scan_combined,
        MAMBA_HAS_STATE_DTYPE=False,
        _check_mamba_sequence_packing_support=lambda **_: (True, None),
    )


def for_recipes(make: Callable[[str], Any]) -> None:
    """Give core's modules recipes with our options.

    Args:
        make: name of a format -> recipe object of Transformer Engine.
    """
    written_for.CUSTOM_RECIPES.put(_get_custom_recipe=make)


def for_fp8_weights() -> None:
    """Let core's buffers and optimizer know our weights in FP8 as Transformer Engine's."""
    written_for.FP8_WEIGHTS.put(
        HAVE_TE_FP8_TENSOR_CLASS=True,
        FP8_TENSOR_CLASS=fp8_weights.Float8Weight,
        _modify_underlying_storage_impl=fp8_weights.replace_codes,
        _quantize_param_shard_impl=fp8_weights.quantize_shards,
    )


def gather_one_by_one(yes: bool) -> None:
    """Gather parameters one by one, as gloo needs it where they are of several types."""
    coalesced = torch.distributed._coalescing_manager
    written_for.DDP_COALESCING.put(_coalescing_manager=cpu.one_by_one if yes else coalesced)


def fuse_clipping() -> None:
    """Take norms and scale gradients in one pass, where core has neither apex nor its like."""
    clip_grads = importlib.import_module(written_for.GRADIENT_CLIPPING.module)
    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        written_for.GRADIENT_CLIPPING.put(
            l2_norm_impl=_norm_of_all, multi_tensor_scale_impl=_scale_in_place
        )


def _norm_of_all(
    _: int, __: Tensor, lists: list[list[Tensor]], *___: object
) -> tuple[Tensor, None]:
    """L2 norm over many tensors in one pass, under the signature of apex's multi_tensor_l2norm."""
    norms = torch._foreach_norm(lists[0], dtype=torch.float32)  # of bfloat16 gradients too
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def _scale_in_place(_: int, __: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Scale many tensors, under the signature of apex's multi_tensor_scale."""
    torch._foreach_mul_(lists[1], scale)  # Megatron passes the same tensors as source and target


@contextlib.contextmanager
def fused_adam(yes: bool) -> Iterator[None]:
    """Let core find our FusedAdam where it looks for Transformer Engine's, while it builds."""
    if not yes:
        yield
        return
    name = "transformer_engine.pytorch.optimizers"
    absent = {part: sys.modules.get(part) for part in _prefixes(name)}
    rows = (written_for.FUSED_ADAM, written_for.FUSED_ADAM_CONFIG)
    before = [(row, row.present()) for row in rows]
    try:
        sys.modules.update({part: types.ModuleType(part) for part in absent})
        sys.modules[name].FusedAdam = FusedAdam  # type: ignore[attr-defined]
        written_for.FUSED_ADAM.put(
            Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False, is_te_min_version=lambda _: True
        )
        written_for.FUSED_ADAM_CONFIG.put(is_te_min_version=lambda _: True)
        yield
    finally:
        for row, values in before:
            row.put(**values)
        for part, module in absent.items():
            sys.modules.pop(part)
            if module is not None:
                sys.modules[part] = module


def _prefixes(name: str) -> list[str]:
    """Return the names of a module and of the packages that it is in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


class _WithoutOutput(tensor_parallel.random.CheckpointWithoutOutput):
    """Core's checkpoint, which does not ask Transformer Engine for the state of FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = False


def _refill(emptied: Tensor, again: Tensor) -> None:
    """Put what was computed again where the first tensor was; autograd takes it for the first."""
    storage = emptied.untyped_storage()
    storage.resize_(again.untyped_storage().nbytes())
    storage.copy_(again.untyped_storage())
