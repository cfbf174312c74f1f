"""What is computed again is the same to the bit, and less is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.model import Mtp
from hybrid_train.schema.parallel import (
    Parallel,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
)
from hybrid_train.schema.train import TrainJob
from tests.masking import FreezeEmbedding
from tests.sampled import sampled
from tests.tiny import (
    BATCH,
    LENGTH,
    MEGATRON_WARNINGS,
    batch_of,
    losses_of,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
)

pytestmark = MEGATRON_WARNINGS
WIDTH = 32  # hidden size of the tiny model
EPSILON = torch.finfo(torch.float32).eps
FLOAT = 4  # bytes
HIDDEN = BATCH * LENGTH * WIDTH * FLOAT  # bytes of one hidden state of the batch


def selective(*modules: RecomputeModule) -> Parallel:
    return Parallel(recompute=Recompute.selective, recompute_modules=list(modules) or None)


WHOLE = Parallel(recompute=Recompute.full)
BLOCK = Parallel(
    recompute=Recompute.full, recompute_method=RecomputeMethod.block, recompute_layers=2
)
PLANS = {
    **{module.value: selective(module) for module in RecomputeModule},
    "all modules": selective(*RecomputeModule),
    "default": selective(),
    "full": WHOLE,
    "block": BLOCK,
}


def job_of(parallel: Parallel, *, shared_block: bool) -> TrainJob:
    job = tiny_job(parallel=parallel)
    job.model.mtp = Mtp(repeated_block=shared_block)
    # Weights that two MTP depths share get one sum of both gradients, or each by itself: with one
    # microbatch the buffer is empty before them, and the sums are the same.
    job.train.microbatch = BATCH if shared_block else 1
    job.model.moe.top_k = 3  # their weights are added up: the order of three can be seen
    job.objective.moe_aux_loss_scale = 0.1  # large enough to be seen in the gradient
    return job


def trained(job: TrainJob, groups: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """Reports of two steps; gradients of the second, weights and buffers after it."""
    engine = tiny_engine(job, groups)
    batches = microbatches(some_rows(), job.train.microbatch)
    steps = [engine.step(batches, tokens_seen=0) for _ in range(2)]
    reports = [(step.loss, step.grad_norm, step.metrics) for step in steps]
    model = engine.network.chunks[0].module
    gradients = {f"{name}.grad": w.main_grad.clone() for name, w in model.named_parameters()}
    state = {name: v.clone() for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    return reports, {**gradients, **state}


@pytest.fixture(scope="module")
def kept_all(groups: Any) -> dict[bool, Any]:
    """The same steps without recomputation, by whether the MTP depths share a block."""
    return {
        shared: trained(job_of(Parallel(), shared_block=shared), groups) for shared in (False, True)
    }


@pytest.mark.parametrize(
    ("plan", "shared_block"),
    sampled(
        ((plan, shared) for plan in PLANS for shared in (False, True)),
        *(("all modules", False), ("block", False), ("full", True)),
    ),
)
def test_losses_gradients_and_weights_are_the_same_to_the_bit(
    groups: Any, kept_all: Any, plan: str, shared_block: bool
) -> None:
    expected_reports, expected = kept_all[shared_block]
    reports, found = trained(job_of(PLANS[plan], shared_block=shared_block), groups)
    for (*sizes, metrics), (*expected_sizes, expected_metrics) in zip(
        reports, expected_reports, strict=True
    ):
        # Recorded in the second pass, from the last layer to the first: a sum of 3 in other order.
        balance, expected_balance = metrics.pop("moe_aux_loss"), expected_metrics["moe_aux_loss"]
        assert balance == pytest.approx(expected_balance, rel=3 * EPSILON)
        assert sizes == expected_sizes
        assert metrics == {k: v for k, v in expected_metrics.items() if k != "moe_aux_loss"}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def kept_bytes(pattern: str, parallel: Parallel, groups: Any) -> int:
    """Bytes of the tensors that one forward pass keeps, weights aside."""
    engine = tiny_engine(tiny_job(pattern, parallel=parallel), groups)
    (model,) = engine.network.chunks
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # alive while it is in the table: no address twice
        kept[storage.data_ptr()] = storage
        return tensor

    batch = batch_of(some_rows())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = losses_of(model.module, batch)
    total = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
    del output
    return total


@pytest.mark.parametrize(
    ("module", "letter"),
    [
        (RecomputeModule.mamba, "M"),
        (RecomputeModule.mlp, "-"),
        (RecomputeModule.moe, "E"),
        (RecomputeModule.shared_experts, "E"),
        (RecomputeModule.layernorm, "E"),
        (RecomputeModule.core_attn, "*"),
    ],
)
def test_each_module_keeps_less_in_each_of_its_layers(
    groups: Any, module: RecomputeModule, letter: str
) -> None:
    saved = [
        kept_bytes(pattern, Parallel(), groups) - kept_bytes(pattern, selective(module), groups)
        for pattern in (letter, 3 * letter)
    ]
    assert saved[0] > 0
    assert saved[1] == 3 * saved[0]


def test_plain_experts_never_keep_their_activation(groups: Any) -> None:
    plan = selective(RecomputeModule.moe_act)
    assert kept_bytes("E", plan, groups) == kept_bytes("E", Parallel(), groups)


@pytest.mark.parametrize("letter", "M*-E")
def test_full_recomputation_adds_one_hidden_state_a_layer(groups: Any, letter: str) -> None:
    four, eight = (kept_bytes(layers * letter, WHOLE, groups) for layers in (4, 8))
    assert eight - four == 4 * HIDDEN


def test_groups_of_layers_keep_one_hidden_state_each(groups: Any) -> None:
    pairs = Parallel(recompute=Recompute.full, recompute_layers=2)
    found = kept_bytes("ME*-ME*-", pairs, groups)
    assert found == kept_bytes("ME*-ME*-", WHOLE, groups) - 4 * HIDDEN


def test_block_recomputes_the_first_layers_alone(groups: Any) -> None:
    plain, block, full = (kept_bytes("MMMM", plan, groups) for plan in (Parallel(), BLOCK, WHOLE))
    assert plain - block == block - full > 0


def test_validation_recomputes_nothing(groups: Any) -> None:
    engine = tiny_engine(tiny_job(parallel=WHOLE), groups)
    calls = []
    for layer in engine.network.chunks[0].module.decoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    engine.evaluate([batch_of(some_rows())])
    assert len(calls) == len(engine.network.chunks[0].module.decoder.layers)


@pytest.mark.parametrize("mode", [Recompute.full, Recompute.selective])
def test_a_frozen_embedding_takes_no_gradient_from_what_is_computed_again(
    groups: Any, mode: Recompute
) -> None:
    gradients = []
    for recompute in (Recompute.none, mode):
        job = tiny_job("ME*-", parallel=Parallel(recompute=recompute))
        job.edits = [FreezeEmbedding()]
        engine = tiny_engine(job, groups)
        engine.step(microbatches(some_rows(), 2), tokens_seen=0)
        named = engine.network.chunks[0].module.named_parameters()
        gradients.append({name: one.main_grad.clone() for name, one in named if one.requires_grad})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
