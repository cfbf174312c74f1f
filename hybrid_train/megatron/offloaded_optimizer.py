"""AdamW that keeps a share of its state, and updates it, in host memory: core's, corrected.

Core's optimizer for this (core 0.19.2, optimizer/cpu_offloading/hybrid_optimizer.py) makes one
optimizer of torch's for what stays on the GPU, and one for each offloaded tensor, so that copies
and updates overlap. A float32 copy of an offloaded tensor lies in host memory with its gradient and
both moments, 16 bytes an element; after the update it is written to the weight on the GPU. Tensors
are taken in the order of the parameters until the share is reached: at most one tensor more.

What of it is wrong where float32 weights lie beside bfloat16 ones, as the decays of Mamba do, or
where the GPU is a CPU, is overridden here.
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from torch import Tensor


class OffloadedAdamW(HybridDeviceOptimizer):
    """AdamW on two devices; `param_groups` hold what is updated of the model's weights.

    Args:
        params: groups of parameters, or of this process's parts of them.
        **options: of core's class.
    """

    def __init__(self, params: list[dict[str, Any]], **options: Any) -> None:
        for group in params:
            for part in group["params"]:
                if not part.is_leaf:  # of a float32 weight, which core cuts with its history
                    part.retain_grad()  # else torch takes no such part ("non-leaf Tensor")
        super().__init__(params, **options)

    def _init_sub_optimizers(self) -> None:
        """Begin with the parts; of whole parameters core reads nothing but the groups.

        Copies of whole parameters would take the host memory of all data-parallel ranks.
        """
        self.of_parts = not any(
            isinstance(one, torch.nn.Parameter)
            for group in self.param_groups
            for one in group["params"]
        )
        if self.of_parts:
            super()._init_sub_optimizers()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """Choose what is offloaded, and copy it.

        Core asks where a tensor lies, and so offloads nothing of a CPU. It would give a tensor that
        is offloaded and then made float32 memory that is not pinned, too.

        Returns:
            Groups of what is updated in host memory, and on the GPU; host copies by part, and the
            other way; float32 copies by part, of those that are not float32.
        """
        parts = [part for group in self.param_groups for part in group["params"]]
        threshold = offload_fraction * sum(part.numel() for part in parts)
        there: list[dict[str, Any]] = []
        here: list[dict[str, Any]] = []
        copies: dict[Tensor, Tensor] = {}
        masters: dict[Tensor, Tensor] = {}
        taken = 0
        for group in self.param_groups:
            inner: dict[bool, list[Tensor]] = {True: [], False: []}
            for part in group["params"]:
                offloaded = taken < threshold
                updated = part
                if offloaded:
                    taken += part.numel()
                    updated = copies[part] = self._host_copy(part)
                elif part.dtype != torch.float32:
                    updated = part.detach().float()
                if part.dtype != torch.float32:
                    masters[part] = updated
                inner[offloaded].append(updated)
            for own, groups in ((inner[True], there), (inner[False], here)):
                if own:
                    groups.append({**group, "params": own})
        return there, here, copies, {copy: part for part, copy in copies.items()}, masters

    def _host_copy(self, part: Tensor) -> Tensor:
        copy = torch.empty(
            part.shape, dtype=torch.float32, pin_memory=part.is_cuda and self.pin_cpu_params
        )
        return copy.copy_(part.detach())

    def _set_sub_optimizer_grads(self) -> None:
        """Hand gradients on; core forgets those of float32 weights that are not offloaded."""
        for optimizer in (self.gpu_optimizer,) if self.gpu_optimizer else ():
            for group in optimizer.param_groups:
                for updated in group["params"]:
                    if self.inner_param_to_orig_param[updated] is updated:
                        updated.grad = updated.decoupled_grad
        super()._set_sub_optimizer_grads()

    def update_fp32_param_by_new_param(self) -> None:
        """Take the weights of the model; core forgets copies of those that are float32."""
        with torch.no_grad():
            for part, updated in self.param_to_inner_param.items():
                if updated is not part:
                    updated.copy_(part)
