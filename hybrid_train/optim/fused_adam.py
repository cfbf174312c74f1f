"""AdamW with its state in few bits, on a CPU: stands for Transformer Engine's FusedAdam.

Megatron-Core lowers the precision of moments, master weights and gradients in that class alone
(core 0.19.2, optimizer_config.py 430), which runs on a GPU. This one has what core asks of it, and
computes the same, by the documentation of Transformer Engine 2.20:

- A step is taken in float32: state is brought to float32 before, and rounded behind it.
- bfloat16 state is rounded to nearest. float16 and FP8 (E4M3, called uint8) have a scale, a float32
  number for each tensor, that brings its largest value to half the largest float16, or to 448.
- A float32 master of a bfloat16 weight may be kept as what the weight lacks of it
  (`precision/formats.py`). A float32 weight is its own master.

Where a tensor is all zero Transformer Engine divides by a scale of zero; here it stays zero.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hybrid_train.precision import formats

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master_param"
_RANGES = {  # largest value behind a scale
    torch.float16: torch.finfo(torch.float16).max / 2,
    torch.uint8: torch.finfo(torch.float8_e4m3fn).max,
}


class FusedAdam(torch.optim.Optimizer):
    """AdamW; the arguments are Transformer Engine's that core passes.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        adam_w_mode: must be on.
        capturable: for CUDA graphs; must be off.
        master_weights: keep masters of weights that are not float32.
        master_weight_dtype: float32 or float16.
        exp_avg_dtype: of the first moment: float32, bfloat16, float16 or uint8, which is FP8.
        exp_avg_sq_dtype: of the second moment, alike.
        use_decoupled_grad: take the gradient from `decoupled_grad`, in any format.
        store_param_remainders: keep float32 masters of bfloat16 weights as 16 bits.
    """

    def __init__(  # noqa: PLR0913  the interface is Transformer Engine's
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        assert adam_w_mode, "decay is decoupled"
        assert not capturable, "there are no CUDA graphs here"
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            MASTER: master_weight_dtype,
        }
        self._scales: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.initialize_state(parameter, self._keeps_remainder(parameter))
                gradient = self._gradient(parameter)
                if gradient is not None:
                    self._update(parameter, gradient.float(), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take the step of one parameter in float32."""
        first, second = (self.get_unscaled_state(parameter, name) for name in MOMENTS)
        weights = self._float32_weights(parameter)
        before = torch.tensor(float(group["step"] - 1))
        beta1, beta2 = group["betas"]
        adamw(
            [weights], [gradient], [first], [second], [], [before],
            fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for name, values in zip(MOMENTS, (first, second), strict=True):
            self.set_scaled_state(parameter, name, values)
        if self._keeps_remainder(parameter):
            weights, remainder = formats.split_remainder(weights)
            self.set_scaled_state(parameter, MASTER, remainder)
        elif self._has_master(parameter):
            self.set_scaled_state(parameter, MASTER, weights)
        parameter.copy_(weights)

    def _float32_weights(self, parameter: Tensor) -> Tensor:
        """Return the weights to update: those of a float32 parameter are changed in place."""
        if not self._has_master(parameter):
            return parameter.detach().float()
        kept = self.get_unscaled_state(parameter, MASTER)
        return formats.join_remainder(parameter, kept) if kept.dtype == torch.int16 else kept

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        return getattr(parameter, name, None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero."""
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if set_to_none:
                setattr(parameter, name, None)
            elif getattr(parameter, name, None) is not None:
                getattr(parameter, name).zero_()

    def initialize_state(self, parameter: Tensor, store_param_remainders: bool) -> None:
        """Begin moments at zero and the master with its weight."""
        for name in MOMENTS:
            self.set_scaled_state(parameter, name, torch.zeros_like(parameter, dtype=torch.float32))
        if self._has_master(parameter):
            weights = parameter.detach().float()
            if store_param_remainders:
                weights = torch.zeros_like(parameter, dtype=torch.int16)
            self.set_scaled_state(parameter, MASTER, weights)

    def get_unscaled_state(self, parameter: Tensor, state_name: str) -> Tensor:
        """Return state in float32: the tensor itself where it is; a remainder as it is, int16."""
        kept = self.state[parameter][state_name]
        if kept.dtype in (torch.float32, torch.int16):
            return kept
        return kept.float().mul_(self._scales[parameter][state_name])

    @torch.no_grad()
    def set_scaled_state(self, parameter: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Keep a float32 tensor, or a remainder, in the format that state of this name has."""
        state = self.state[parameter]
        dtype = self.name_to_dtype_map[state_name]
        if state_name not in state:
            stored = torch.float8_e4m3fn if dtype == torch.uint8 else dtype
            stored = torch.int16 if unscaled_state.dtype == torch.int16 else stored
            state[state_name] = torch.empty_like(parameter, dtype=stored, requires_grad=False)
            self._scales.setdefault(parameter, {})[state_name] = torch.ones(1)
        scale = self._scales[parameter][state_name]
        if dtype in _RANGES:
            limit = _RANGES[dtype]
            torch.div(unscaled_state.abs().amax(), limit, out=scale[0])
            scaled = unscaled_state / scale if scale else torch.zeros_like(unscaled_state)
            unscaled_state = scaled.clamp_(-limit, limit)  # the quotient may be an ulp too large
        state[state_name].copy_(unscaled_state)

    def _has_master(self, parameter: Tensor) -> bool:
        return self.master_weights and parameter.dtype != torch.float32

    def _keeps_remainder(self, parameter: Tensor) -> bool:
        return self.store_param_remainders and parameter.dtype == torch.bfloat16

    def state_dict(self) -> dict[str, Any]:
        """Return groups and unscaled state, which another precision can load."""
        result = super().state_dict()
        for number, parameter in self._numbered(result).items():
            if number in result["state"]:
                names = result["state"][number]
                unscaled = {name: self.get_unscaled_state(parameter, name) for name in names}
                result["state"][number] = unscaled
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups and unscaled state."""
        super().load_state_dict({**state_dict, "state": {}})
        for number, parameter in self._numbered(state_dict).items():
            for name, values in state_dict["state"].get(number, {}).items():
                self.set_scaled_state(parameter, name, values)

    def _numbered(self, state_dict: dict[str, Any]) -> dict[int, Tensor]:
        """Return the parameters by the numbers that a state dictionary gives them."""
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        return dict(zip(numbers, ours, strict=True))
