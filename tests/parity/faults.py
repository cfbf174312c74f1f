"""Typical faults of parallel training, planted on purpose: the parity suite must find each.

All are of the kind that real code bases have had: nothing crashes, and the loss falls.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

_NORM = "decoder.layers.0.mixer.in_proj.layer_norm_weight"
_IN_PROJ = "decoder.layers.0.mixer.in_proj.weight"
_LATENT = "decoder.layers.1.mlp.fc1_latent_proj.weight"
_EXPERT = "decoder.layers.1.mlp.experts.linear_fc1.weight0"
Plant = Callable[[Any, pytest.MonkeyPatch], None]  # (engine, patch)


@dataclass(frozen=True)
class Fault:
    """How to plant a fault into a built engine, where it matters, and what must be noticed."""

    plant: Plant
    layout: str  # of layouts.CASES
    symptom: str  # part of the words of a problem

    def noticed(self, problems: Sequence[str]) -> str | None:
        """Return the problem that gives it away."""
        return next((problem for problem in problems if self.symptom in problem), None)


@contextlib.contextmanager
def planted(name: str | None, engine: Any) -> Iterator[None]:
    """Run with one fault, or without."""
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            FAULTS[name].plant(engine, patch)
        yield


def _parameter(engine: Any, name: str) -> Any:
    return dict(engine.network.chunks[0].module.named_parameters())[name]


def _norm_is_not_reduced(engine: Any, _: pytest.MonkeyPatch) -> None:
    """Take the mark off by which Megatron knows that ranks saw different tokens."""
    _parameter(engine, _NORM).sequence_parallel = False


def _aux_loss_is_not_scaled(_: Any, patch: pytest.MonkeyPatch) -> None:
    """Leave the factor of the context-parallel size out of the gradient of the balance loss."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    scale = MoEAuxLossAutoScaler.set_loss_scale
    patch.setattr(MoEAuxLossAutoScaler, "set_loss_scale", lambda value: scale(value / 2))


def _mtp_denominator_is_of_the_rank(engine: Any, patch: pytest.MonkeyPatch) -> None:
    """Divide the MTP losses by the rank's own share of the valid tokens."""
    objective = engine.objective
    forward, count = objective.forward, objective.count

    def with_own_totals(model: Any, batch: Any, totals: Tensor) -> Any:
        own = count([batch]) * (totals[0] / count([batch])[0])
        return forward(model, batch, torch.cat([totals[:1], own[1:]]))

    patch.setattr(objective, "forward", with_own_totals)


def _labels_of_the_next_document_count(_: Any, patch: pytest.MonkeyPatch) -> None:
    """Let MTP predict across the ends of documents."""
    from hybrid_train.training import next_token

    of_whole_rows = next_token.continues
    patch.setattr(next_token, "continues", lambda *rows: torch.ones_like(of_whole_rows(*rows)))


def _balance_loss_is_of_the_own_share(_: Any, patch: pytest.MonkeyPatch) -> None:
    """Scale the balance loss by the tokens of the rank, of which padding leaves some fewer."""
    from hybrid_train.megatron.router import TopKRouter

    patch.setattr(TopKRouter, "_share", lambda _, own, __: own)


def _in_proj_is_split_in_one_piece(engine: Any, _: pytest.MonkeyPatch) -> None:
    """Split the rows z, x, B, C, dt of in_proj as if they were one part."""
    from hybrid_train.megatron.mamba import MambaMixer

    parts_of_model = engine.network.chunks[0].modules()
    mixer = next(one for one in parts_of_model if isinstance(one, MambaMixer))
    weight, tp = _parameter(engine, _IN_PROJ), engine.network.groups.tp
    ranks = [torch.empty_like(weight) for _ in range(tp.size())]
    dist.all_gather(ranks, weight.detach(), group=tp)
    sizes = [mixer.d_inner_local_tp] * 2 + [mixer.ngroups_local_tp * mixer.d_state] * 2
    parts = zip(*(rank.split([*sizes, mixer.nheads_local_tp]) for rank in ranks), strict=True)
    whole = torch.cat([row for part in parts for row in part])
    weight.data.copy_(whole.chunk(tp.size())[tp.rank()])
    engine.network.optimizer.reload_model_params()


def _expert_bias_is_not_synchronised(_: Any, patch: pytest.MonkeyPatch) -> None:
    """Let every rank move its expert biases by its own tokens."""
    from hybrid_train.megatron import router

    def by_own_tokens(tokens: Tensor, bias: Tensor, rate: float, **_: Any) -> Tensor:
        return bias + torch.sign(tokens.mean(dim=-1, keepdim=True) - tokens) * rate

    patch.setattr(router, "get_updated_expert_bias", by_own_tokens)


def _slots_are_changed(
    change: Callable[[list[Tensor]], list[Tensor]], name: str = "teacher_hidden.0"
) -> Plant:
    """Change what a teacher hands over by microbatch, by default the states of the main head."""

    def plant(engine: Any, patch: pytest.MonkeyPatch) -> None:
        prepare = engine.objective.prepare

        def prepare_and_change(batches: Sequence[Any]) -> list[Any]:
            found = prepare(batches)
            slots = [one.token_extras[name] for one in found if name in one.token_extras]
            if not slots:
                return found
            return [
                replace(one, token_extras={**one.token_extras, name: slot})
                for one, slot in zip(found, change(slots), strict=True)
            ]

        patch.setattr(engine.objective, "prepare", prepare_and_change)

    return plant


def _are_stale(slots: list[Tensor]) -> list[Tensor]:
    return [slots[-1], *slots[:-1]]


def _reduction_is_differentiated(_: Any, patch: pytest.MonkeyPatch) -> None:
    """Scale the gradient as a collective in the loss does that autograd goes through."""
    from hybrid_train.ops.logits import HeadPart

    reduced = HeadPart._reduced
    patch.setattr(
        HeadPart,
        "_reduced",
        lambda head, grad, shape: reduced(head, grad * dist.get_world_size(head.group), shape),
    )


def _padded_rows_have_a_share(engine: Any, patch: pytest.MonkeyPatch) -> None:
    """Let the teacher's padded rows be tokens that no label names."""
    from hybrid_train.ops.distribution import Columns
    from hybrid_train.ops.logits import HeadPart

    of_columns = Columns.of

    def of(logits: Tensor, head: HeadPart, scale: float) -> Any:
        found = of_columns(logits, head, scale)
        rest = logits[:, head.width :].float().mul(scale)
        padded = torch.cat([found.log_sum[:, None], rest], dim=-1).logsumexp(-1)
        return replace(found, log_sum=padded)

    patch.setattr(Columns, "of", staticmethod(of))


def _counted_twice(name: str) -> Plant:
    """Double one gradient on its way to the optimizer."""

    def plant(engine: Any, patch: pytest.MonkeyPatch) -> None:
        reduce = engine.network.finalizer

        def reduce_and_double(chunks: Any, *args: Any, **kwargs: Any) -> None:
            parameter = dict(chunks[0].module.named_parameters()).get(name)
            if parameter is not None:
                parameter.main_grad *= 2
            reduce(chunks, *args, **kwargs)

        patch.setattr(
            engine.network.chunks[0].config, "finalize_model_grads_func", reduce_and_double
        )

    return plant


FAULTS = {
    "sequence-parallel norm without its all-reduce": Fault(_norm_is_not_reduced, "TP2", _NORM),
    "balance loss without the context-parallel factor": Fault(
        _aux_loss_is_not_scaled, "CP2", "gradient of decoder.layers.1.mlp.router.weight"
    ),
    "MTP denominator of one rank": Fault(_mtp_denominator_is_of_the_rank, "DP2", "gradient of mtp"),
    "MTP across the ends of documents": Fault(
        _labels_of_the_next_document_count, "packed, CP2", "mtp_loss_1 of step 1"
    ),
    "balance loss of one rank's share of padded rows": Fault(
        _balance_loss_is_of_the_own_share,
        "packed, CP2",
        "gradient of decoder.layers.1.mlp.router.weight",
    ),
    "in_proj split in one piece": Fault(_in_proj_is_split_in_one_piece, "TP2", "loss of step 1"),
    "expert bias of one rank": Fault(
        _expert_bias_is_not_synchronised, "DP2", "copies of decoder.layers.1.mlp.router.expert_bias"
    ),
    "slot of the microbatch before": Fault(
        _slots_are_changed(_are_stale), "taught, PP2", "loss of step 1"
    ),
    "stale slot of the second teacher": Fault(
        _slots_are_changed(_are_stale, "teacher_hidden.1"),
        "taught the top 8 by two, PP2",
        "divergence of step 1",
    ),
    "stale slot of hidden states": Fault(
        _slots_are_changed(_are_stale, "teacher_layer.2"),
        "taught between layers, PP2",
        "hidden_loss of step 1",
    ),
    "teacher's places moved by one": Fault(
        _slots_are_changed(lambda slots: [one.roll(1, dims=1) for one in slots]),
        "taught, CP2",
        "loss of step 1",
    ),
    "divergence through a differentiated collective": Fault(
        _reduction_is_differentiated, "taught, TP2", "gradient of decoder.layers.0"
    ),
    "padded rows with a share": Fault(
        _padded_rows_have_a_share, "taught, DP2", "divergence of step 1"
    ),
    "norm counted twice": Fault(_counted_twice(_NORM), "TP2", _NORM),
    "expert counted twice": Fault(_counted_twice(_EXPERT), "EP2", "experts.linear_fc1.weight"),
    "latent projection counted twice": Fault(_counted_twice(_LATENT), "TP2", _LATENT),
}
