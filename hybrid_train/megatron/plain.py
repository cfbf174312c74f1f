"""Plain PyTorch parts with the parameter names of Transformer Engine's, and the list of linears.

Each class takes the place of the Megatron class that its docstring names, with the same
constructor, the same parameter names and the same sharded checkpoint keys, so that one spec, one
checkpoint and one parity test serve both. They run on any device.

Dimensions: S sequence, B batch, H hidden, T tokens routed to this rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn import Module, Parameter, functional

from hybrid_train.anatomy.gemm_formats import MTP, Linear
from hybrid_train.anatomy.kinds import MTP_PROJECTION, possible_parameters
from hybrid_train.megatron.norms import norm_weight, norm_within
from hybrid_train.ops.attention import causal_attention, split_causal_attention
from hybrid_train.ops.context import in_order
from hybrid_train.ops.experts import expert_mlp, grouped_linear
from hybrid_train.ops.linear import linear
from hybrid_train.ops.nonlinearity import squared_relu, swiglu
from hybrid_train.precision.emulated import EditedLinear

# Path of a linear layer within a layer of Megatron's -> kind, as `anatomy` calls it.
PLACES = {
    one.name.removesuffix(".weight"): one.linear for one in possible_parameters() if one.linear
}


class _SplitLinear:
    """How a linear that is split over tensor ranks multiplies its part: core's `_forward_impl`."""

    edited: EditedLinear | None = None  # set by edits

    def _forward_impl(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Multiply; what core wraps around that is left out where no other rank takes part.

        It serves tensor parallelism (layers.py 755), and costs a small model on a CPU as much as
        its GEMMs, which are the fastest ones we know.
        """
        if self.edited is not None:
            return _edited(self.edited, input, weight, **kwargs)
        bias = kwargs["bias"]
        meets_others = kwargs["allreduce_dgrad"] or kwargs["sequence_parallel"]
        if input.is_cuda or meets_others or not weight.requires_grad:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        # A weight that the embedding shares gets gradients elsewhere too: they meet in an ordinary
        # one. So do those of a weight whose buffer lives from one reduction to the next.
        shared = getattr(weight, "zero_out_wgrad", False) or hasattr(weight, "__fsdp_param__")
        buffer = None if shared else getattr(weight, "main_grad", None)
        if buffer is not None:
            weight.grad_added_to_main_grad = True
        product = linear(input, weight, buffer)
        return product if bias is None else product + bias


def _edited(  # noqa: PLR0913 - the arguments of core's
    edited: EditedLinear,
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> Tensor:
    """Gather, multiply as edited, reduce on the way back, as core's own function (layers.py 755).

    A gathered tensor is quantized as a whole, as Transformer Engine does.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    buffer = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
    product = edited.multiply(input, weight, buffer)
    return product if bias is None else product + bias


class ColumnParallelLinear(_SplitLinear, layers.ColumnParallelLinear):
    """Core's linear split by columns.

    It has core's name, by which Megatron-FSDP knows its split (mcore_fsdp_adapter.py 70).
    """


class RowParallelLinear(_SplitLinear, layers.RowParallelLinear):
    """Core's linear split by rows, with core's name for the same reason."""


class NormColumnLinear(ColumnParallelLinear):
    """RMSNorm, then a linear split by columns; stands for TELayerNormColumnParallelLinear."""

    channels: Tensor | None = None  # of the norm, as its own

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.layer_norm_weight = norm_weight(input_size, self.config)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(norm_within(self, input_), *args, **kwargs)


class LayerNormColumnLinear(NormColumnLinear):
    """LayerNorm, then a linear split by columns; for the same class of Transformer Engine."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.layer_norm_weight.data.zero_()
        self.layer_norm_bias = norm_weight(input_size, self.config, value=0.0)


class DuplicatedLinear(torch.nn.Module):
    """Linear with the whole weight on every rank; stands for TELinear in "duplicated" mode."""

    edited: EditedLinear | None = None  # set by edits

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        assert parallel_mode == "duplicated"
        assert not bias, "no family has a bias here"
        self.weight = Parameter(
            torch.empty(
                output_size,
                input_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.allreduce = True  # type: ignore[attr-defined]
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight.tensor_model_parallel = False  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.edited is not None:
            return self.edited.multiply(x, self.weight), None
        return functional.linear(x, self.weight), None


class GroupedLinear(torch.nn.Module):
    """The same linear of every local expert, as weight0, weight1, ...; stands for TEGroupedLinear.

    Holds the weights only; `Experts` multiplies. It asks for them by calling the module, since
    Megatron waits in a hook of that call for weights that are still on their way to this rank.
    """

    edited: EditedLinear | None = None  # set by edits

    def __init__(
        self,
        num_experts: int,
        size: tuple[int, int],
        split_axis: int,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.split_axis = split_axis
        self.groups = groups
        shape = list(size)
        shape[split_axis] //= groups.expt_tp.size()
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for expert in range(num_experts):
            weight = Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            layers.set_tensor_model_parallel_attributes(weight, True, split_axis, 1)
            weight.allreduce = not own_groups  # type: ignore[attr-defined]
            self.register_parameter(f"weight{expert}", weight)

    def forward(self) -> list[Tensor]:
        """Return the weight of each local expert."""
        held = self._parameters  # asked directly: attributes of a module take ten times as long
        return [held[f"weight{expert}"] for expert in range(self.num_experts)]  # type: ignore[misc]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Give every expert its place on a new first axis, so that any split can load it."""
        total = self.groups.ep.size() * self.num_experts
        first = self.groups.ep.rank() * self.num_experts
        sharded: dict[str, Any] = {}
        for expert, weight in enumerate(self.forward()):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + expert, total))
            one = make_sharded_tensors_for_checkpoint(
                {"weight": weight},
                prefix,
                {"weight": self.split_axis},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
            )[f"{prefix}weight"]
            one.replica_id = (*one.replica_id[:2], self.groups.expt_dp.rank())
            sharded[f"{prefix}weight{expert}"] = one
        return sharded


class Experts(MegatronModule):
    """The routed experts of one layer on this rank; stands for TEGroupedMLP."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        outer = config.moe_latent_size or config.hidden_size
        inner = config.moe_ffn_hidden_size
        self.linear_fc1 = GroupedLinear(num_local_experts, (inner, outer), 0, config, pg_collection)
        self.linear_fc2 = GroupedLinear(num_local_experts, (outer, inner), 1, config, pg_collection)

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """Run tokens [T, H], sorted by expert, each through its own; probs [T] weigh them."""
        counts = tokens_per_expert.tolist()
        up, down = self.linear_fc1(), self.linear_fc2()
        if self.linear_fc1.edited is None and self.linear_fc2.edited is None:
            return expert_mlp(tokens, up, down, counts, probs), None
        inner = squared_relu(_grouped(tokens, up, counts, self.linear_fc1.edited))
        weighed = (inner * probs[:, None]).to(inner.dtype)
        return _grouped(weighed, down, counts, self.linear_fc2.edited), None

    def backward_dw(self) -> None:
        """Weight gradients are never deferred here."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        sharded: dict[str, Any] = {}
        for name in ("linear_fc1", "linear_fc2"):
            part = getattr(self, name).sharded_state_dict(
                f"{prefix}{name}.", sharded_offsets, metadata
            )
            for tensor in part.values():  # the key that Megatron's sequential experts use too
                tensor.key = tensor.key.replace(f"{prefix}{name}.", f"{prefix}experts.{name}.")
            sharded.update(part)
        return sharded


def _grouped(
    x: Tensor, weights: list[Tensor], counts: list[int], edited: EditedLinear | None
) -> Tensor:
    if edited is None:
        return grouped_linear(x, weights, counts)
    return edited.multiply_grouped(x, weights, counts)


class Mlp(MLP):
    """Core's MLP, whose gates are SiLU in one operation where it has any."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map hidden states [S, B, H] -> [S, B, H] and no bias."""
        gates = self.config.gated_linear_unit and self.activation_func is functional.silu
        if not gates or hidden_states.is_cuda:
            return super().forward(hidden_states, *args, **kwargs)
        both, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(both))


class Attention(MegatronModule):
    """Causal softmax attention with grouped queries; stands for TEDotProductAttention.

    Under context parallelism the keys and values of all ranks are gathered; in the backward pass
    their gradients are summed and dealt out again. A query of packed rows sees its own document.
    """

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """Attend: query [S, B, heads, D], key and value [S', B, kv_heads, D] -> [S, B, heads*D].

        The last query stands at the last key.
        """
        group = self.context_group
        index = None if packed_seq_params is None else packed_seq_params.seq_idx
        if group.size() == 1:
            return causal_attention(query, key, value, index)
        key, value = (
            in_order(gather_from_sequence_parallel_region(part, group=group), group.size(), dim=0)
            for part in (key, value)
        )
        return split_causal_attention(
            query, key, value, group.rank(), group.size(), sequence_index=index
        )


def bare_weight(module: Module, tied: Tensor | None = None) -> Tensor | None:
    """Return the weight [O, I] of a linear layer that is a GEMM of the whole matrix and no more.

    Args:
        module: any.
        tied: the weight that it is given in each call, where it has none of its own.

    Returns:
        None of one that is edited, split over ranks, or is no class of this file. A bias is added
        by who asks.
    """
    if not isinstance(module, (_SplitLinear, DuplicatedLinear)) or module.edited is not None:
        return None
    if isinstance(module, _SplitLinear):
        held: Any = module
        if held.tp_group.size() > 1:
            return None
    weight: Tensor | None = module.weight if tied is None else tied
    return weight


def bare_experts(module: Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return both weights, [F, I] and [O, F], of the experts on this rank; see `bare_weight`."""
    if not isinstance(module, Experts):
        return None
    up, down = module.linear_fc1, module.linear_fc2
    is_edited = up.edited is not None or down.edited is not None
    return None if is_edited else (up(), down())


def layer_modules(chunk: Any) -> Iterator[tuple[int, int, Module]]:
    """Yield depth, number and module of every layer that a chunk holds, main layers first."""
    for layer in chunk.decoder.layers:
        yield 0, int(layer.layer_number), layer
    block = getattr(chunk, "mtp", None)
    for depth, one in enumerate(block.layers if block is not None else (), start=1):
        for number, layer in enumerate(one.mtp_model_layer.layers, start=1):
            yield depth, number, layer


def linear_modules(chunk: Any) -> Iterator[tuple[Linear, Module]]:
    """Yield what `anatomy.gemm_formats.linears` lists, as far as this chunk holds it."""
    for depth, number, layer in layer_modules(chunk):
        if depth and number == 1:
            yield Linear(depth, 0, MTP_PROJECTION), chunk.mtp.layers[depth - 1].eh_proj
        yield from _of_layer(layer, depth, number, f"{MTP}." if depth else "")


def _of_layer(
    layer: Module, depth: int, number: int, prefix: str
) -> Iterator[tuple[Linear, Module]]:
    held = dict(layer.named_modules())
    for place, kind in PLACES.items():
        if place in held:
            yield Linear(depth, number, prefix + kind), held[place]
