"""A masked model computes what the small model computes that a selection makes of it.

The same under splits over processes, in a whole step: `tests/distributed/test_masks.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.counts import parameters
from hybrid_train.anatomy.layers import layers
from hybrid_train.anatomy.selection import Selection, tensor_positions
from hybrid_train.schema.model import LayerRule, MlpSizes, Model
from hybrid_train.schema.parallel import Parallel, Recompute
from hybrid_train.schema.problems import UserError
from tests.packed import documents, packed_batch
from tests.pruned import SIZES, child_of, disturb, roomy, selection_of, sliced
from tests.tiny import (
    LENGTH,
    MEGATRON_WARNINGS,
    as_family,
    batch_of,
    losses_of,
    some_rows,
    tiny_job,
    tiny_model,
)
from tests.unit.megatron.test_window_pass import by_windows

pytestmark = MEGATRON_WARNINGS
PATTERN = "ME-*ME-/*E/*E"
TOLERANCE = 1e-5  # of the largest value; float32 sums of another order


def parent_job(**sections: Any) -> Any:
    """A job with layers of every kind, one of a size of its own, and two MTP depths."""
    job = tiny_job(PATTERN, **sections)
    job.model = roomy(job.model)
    job.model.layers = [LayerRule(layers="7", mlp=MlpSizes(intermediate_size=48))]
    return job


def both(
    groups: Any,
    axes: Collection[Axis],
    seed: int,
    dropped: Collection[int] = (),
    job: Any = None,
) -> tuple[Any, Any, Selection]:
    """A masked model, the small one with the same weights, and what this keeps."""
    from hybrid_train.compression.mask import Mask

    job = job or parent_job()
    random = np.random.default_rng(seed)
    child = child_of(job.model, axes, random, dropped)
    selection = selection_of(job.model, child, random, dropped)
    parent = tiny_model(job, groups)
    disturb(parent, seed)
    small = tiny_model(replace(job, model=child), groups)
    load(small, sliced(parent.state_dict(), selection))
    require_smaller(job.model, child, axes, dropped, small)
    Mask(selection).apply([parent])
    return parent, small, selection


def load(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a model all of its weights; counts of tokens begin anew."""
    told = model.load_state_dict(weights, strict=False)
    assert not told.unexpected_keys
    assert all(name.endswith("local_tokens_per_expert") for name in told.missing_keys)


def require_smaller(
    parent: Model, child: Model, axes: Collection[Axis], dropped: Collection[int], small: Any
) -> None:
    """See that each axis is really cut, and that the weights are as many as anatomy counts."""
    left = [one for one in layers(parent) if one.number not in dropped or one.depth]
    pairs = list(zip(left, layers(child), strict=True))
    for axis in axes:
        cut = [(a.sizes.along(axis), b.sizes.along(axis)) for a, b in pairs if has(a, axis)]
        assert cut, axis
        assert all(less < size for size, less in cut), axis
    held = sum(p.numel() for p in small.parameters())
    biases = sum(one.numel() for name, one in small.named_buffers() if name.endswith("expert_bias"))
    assert held + biases == parameters(child, 64).total


def has(layer: Any, axis: Axis) -> bool:
    return any(axis in part.axes for one in layer.parameters for d in one.dims for part in d.parts)


def require_equal(parent: Any, small: Any, selection: Selection, batch: Any) -> None:
    """Compare logits of all depths, and hidden states where they are kept."""
    told = {"sequence_index": batch.sequence_index, "padding": batch.padding}
    with torch.no_grad():
        masked, wanted = (one(batch.tokens, batch.position_ids, **told) for one in (parent, small))
        states = ((masked.hidden, *masked.mtp_hidden), (wanted.hidden, *wanted.mtp_hidden))
        for found, expected in zip(*states, strict=True):
            close(masked.head.logits(found), wanted.head.logits(expected))
            if selection.hidden is not None:
                left = torch.from_numpy(selection.hidden)
                close(found[..., left], expected)
                assert found.count_nonzero() <= expected.numel()


def close(found: Tensor, expected: Tensor) -> None:
    apart = (found - expected).abs().max() / expected.abs().max()
    assert apart <= TOLERANCE, float(apart)


def dense_job(family: str) -> Any:
    """A job with a Transformer of a family, or with a hybrid that has all of theirs."""
    job = tiny_job("ME-*ME-/*E/*E" if family == "hybrid" else "*-*-*-")
    job.model = roomy(job.model)
    as_family(job.model, family)
    return job


@pytest.mark.parametrize("family", ["llama", "qwen", "nemotron", "hybrid"])
def test_the_axes_of_a_transformer_at_once_and_a_block_less(groups: Any, family: str) -> None:
    axes = (Axis.hidden, Axis.kv_groups, Axis.heads, Axis.ffn)
    dropped = () if family == "hybrid" else (3, 4)
    parent, small, selection = both(groups, axes, 5, dropped, dense_job(family))
    require_equal(parent, small, selection, batch_of(some_rows()))


@pytest.mark.parametrize("axis", SIZES, ids=lambda axis: axis.name)
def test_each_axis_alone(groups: Any, axis: Axis) -> None:
    parent, small, selection = both(groups, [axis], seed=1)
    require_equal(parent, small, selection, batch_of(some_rows()))


def test_layers_alone(groups: Any) -> None:
    parent, small, selection = both(groups, [], seed=1, dropped=(1, 4, 6))
    require_equal(parent, small, selection, batch_of(some_rows()))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 50))]
)
def test_all_axes_at_once(groups: Any, seed: int) -> None:
    """Sizes differ from layer to layer; in every other case layers are missing, too."""
    random = np.random.default_rng(1000 + seed)
    dropped = random.permutation(np.arange(1, 7))[: 2 * (seed % 2)].tolist()
    parent, small, selection = both(groups, list(SIZES), seed, dropped)
    rows = [documents(5, 1, LENGTH - 6, seed=seed), documents(LENGTH, seed=seed + 1)]
    require_equal(parent, small, selection, packed_batch(rows, LENGTH))


def test_windows_of_generation_read_the_masked_model(groups: Any) -> None:
    parent, small, _ = both(groups, list(SIZES), seed=3, dropped=(2,))
    tokens = some_rows()[:2, :9]
    for found, expected in zip(
        by_windows(parent.eval(), tokens), by_windows(small.eval(), tokens), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_gradients_are_those_of_the_small_model(groups: Any, recompute: Recompute) -> None:
    """Those of balance losses, too; what is masked has none."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    job = parent_job(parallel=Parallel(recompute=recompute))
    job.objective.moe_aux_loss_scale = 1.0
    parent, small, selection = both(groups, list(SIZES), 5, (1, 6), job)
    for model in (parent, small):
        losses_of(model.train(), batch_of(some_rows()))[0].backward()
    made = {name: p.grad for name, p in parent.named_parameters()}
    assert all(gradient is not None for gradient in made.values())
    biases = dict(parent.named_buffers())
    left = sliced({**made, **biases}, selection)  # type: ignore[dict-item]
    for name, p in small.named_parameters():
        torch.testing.assert_close(
            left[name], p.grad, rtol=1e-4, atol=2e-5 * float(p.grad.abs().max())
        )
    whole = sum(float(g.square().sum()) for g in made.values())  # type: ignore[union-attr]
    of_child = sum(float(p.grad.square().sum()) for p in small.parameters())
    assert whole == pytest.approx(of_child, rel=1e-5)


def test_masks_can_be_others_in_every_step(groups: Any) -> None:
    """Small, whole, another, small again: each as if it had been the first."""
    job = parent_job()
    whole = tiny_model(job, groups)
    disturb(whole)
    weights = dict(whole.state_dict())
    every = [
        selection_of(job.model, child, np.random.default_rng(seed), dropped)
        for seed, axes, dropped in ((0, list(SIZES), (2, 5)), (1, [], ()), (2, [Axis.ffn], (4,)))
        for child in [child_of(job.model, axes, np.random.default_rng(seed), dropped)]
    ]
    from hybrid_train.compression.mask import Mask

    mask, batch = Mask(every[0]), batch_of(some_rows())
    mask.apply([whole])
    for number in (0, 1, 2, 0):
        mask.use(every[number])
        fresh = tiny_model(job, groups)
        load(fresh, weights)
        Mask(every[number]).apply([fresh])
        with torch.no_grad():
            found, wanted = (one(batch.tokens, batch.position_ids) for one in (whole, fresh))
        torch.testing.assert_close(found.logits(), wanted.logits(), rtol=0, atol=0)
        torch.testing.assert_close(found.mtp_hidden, wanted.mtp_hidden, rtol=0, atol=0)


def test_without_its_mtp_blocks_a_model_has_no_states_of_their_depths(groups: Any) -> None:
    from hybrid_train.compression.mask import Mask

    job, model = parent_job(), tiny_model(parent_job(), groups)
    child = replace(job.model, pattern=PATTERN.partition("/")[0])
    Mask(selection_of(job.model, child, np.random.default_rng(0))).apply([model])
    batch = batch_of(some_rows())
    with torch.no_grad():
        assert model(batch.tokens, batch.position_ids).mtp_hidden == ()


@pytest.mark.parametrize("within", [True, False], ids=["within a group", "across groups"])
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
def test_heads_are_alike_within_their_group_and_not_across(
    groups: Any, exact: bool, within: bool
) -> None:
    """Heads of scans and of attention; in another group one meets other keys, or other states."""
    job = tiny_job("M*M-*")
    job.model = roomy(job.model)
    models, random = [tiny_model(job, groups), tiny_model(job, groups)], np.random.default_rng(0)
    disturb(models[0])
    weights = dict(models[0].state_dict())
    for layer in layers(job.model):
        if layer.kind.groups is None:
            continue
        number, heads = map(layer.sizes.along, layer.kind.groups)
        order = np.arange(heads).reshape(number if within else 1, -1)
        kept = {layer.kind.groups[1]: random.permuted(order, axis=1).ravel()}
        for one in layer.parameters:
            for dim, left in enumerate(tensor_positions(one, layer.sizes, kept)):
                if left is not None:
                    name = layer.prefix + one.name
                    weights[name] = weights[name].index_select(dim, torch.from_numpy(left))
    load(models[1], weights)
    with torch.no_grad():
        one, other = (in_float64(m) if exact else m for m in models)
        tokens = some_rows()[:, :-1]
        expected, found = one(tokens).logits(), other(tokens).logits()
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert apart <= (1e-12 if exact else 1e-6) if within else apart > 1e-3


def in_float64(model: Any) -> Any:
    """A model whose layers compute in float64."""
    for module in model.double().modules():
        if hasattr(module, "config"):
            module.config.params_dtype = torch.float64
    return model


def test_a_norm_of_another_library_is_refused_by_name(groups: Any) -> None:
    from hybrid_train.compression.mask import Mask

    job, model = parent_job(), tiny_model(parent_job(), groups)
    model.decoder.final_norm = torch.nn.RMSNorm(job.model.hidden_size)
    selection = selection_of(job.model, job.model, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"decoder.final_norm is a RMSNorm.*runtime.kernels=plain"):
        Mask(selection).apply([model])
